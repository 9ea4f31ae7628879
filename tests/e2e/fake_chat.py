"""`python fake_chat.py DEED … -- FLAG …`: `chatserve chat` with a fake private server.

Deeds are those of `tests.fake_openai`; `serve` starts the real one, with a fake worker that takes a
second to answer; `careless` leaves the terminal as it is when the chat is killed.
"""

from __future__ import annotations

import contextlib
import sys

from chatserve.cli import main as cli
from chatserve.cli.commands import chat
from tests import fake_openai

SERVE = ("-m", "tests.serve_fake", "--host=127.0.0.1", "--port=0", "seconds")


def main(argv: list[str]) -> int:
    deeds = sys.argv[1 : sys.argv.index("--")]
    if "careless" in deeds:
        deeds.remove("careless")
        vars(chat)["exits_on_signals"] = contextlib.nullcontext
    words = SERVE if "serve" in deeds else (fake_openai.__file__, *deeds)
    return chat.main(argv, server_command=lambda _: [sys.executable, *words])


if __name__ == "__main__":
    cli.COMMANDS["chat"] = cli.CommandEntry("tests.e2e.fake_chat", "chat with a fake")
    raise SystemExit(cli.main(["chat", *sys.argv[sys.argv.index("--") + 1 :]]))
