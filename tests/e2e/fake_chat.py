"""`python fake_chat.py DEED … -- FLAG …`: `chatserve chat` with a fake private server."""

from __future__ import annotations

import sys

from chatserve.cli import main as cli
from chatserve.cli.commands import chat
from tests import fake_openai


def main(argv: list[str]) -> int:
    deeds = sys.argv[1 : sys.argv.index("--")]
    command = [sys.executable, fake_openai.__file__, *deeds]
    return chat.main(argv, server_command=lambda _: command)


if __name__ == "__main__":
    cli.COMMANDS["chat"] = cli.CommandEntry("tests.e2e.fake_chat", "chat with a fake")
    raise SystemExit(cli.main(["chat", *sys.argv[sys.argv.index("--") + 1 :]]))
