"""What has been imported when a chat asks for its first question: nothing that it need not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e import fake_chat
from tests.e2e.terminal import Terminal
from tests.fake_openai import FakeOpenAI

REPOSITORY = Path(__file__).parents[2]
CODE = """\
import sys
from chatserve.cli import line_editor, main
def read(self, prefill=""):
    with open(sys.argv[1], "w") as file:
        print(*sys.modules, file=file)
    raise EOFError
line_editor.LineEditor.read = read
{how}
"""
JOINED = "sys.exit(main.main(['chat', '--base-url', sys.argv[2]]))"
PRIVATE = """
from chatserve.cli.commands import chat
mute = [sys.executable, sys.argv[2], "mute"]  # or its client would be imported meanwhile
sys.exit(chat.main([], server_command=lambda _: mute))
"""
# rich and what it draws with come with the first answer, in the thread that draws it
LATER = {
    "torch", "transformers", "tokenizers", "numpy", "pydantic", "fastapi", "uvicorn", "jinja2",
    "rich", "pygments.lexer", "pygments.lexers", "markdown_it", "click",
    "chatserve.cli.live_markdown",
}  # fmt: skip
MOST = {"joined": 560, "private": 450}


def modules(how: str, argument: str, tmp_path: Path) -> set[str]:
    variables = {"PYTHONPATH": str(REPOSITORY), "CHATSERVE_HOME": str(tmp_path / "home")}
    file = tmp_path / "modules"
    terminal = Terminal(["-c", CODE.format(how=how), str(file), argument], variables)
    try:
        assert terminal.wait_for_end() == 0, terminal.text
    finally:
        terminal.close()
    return set(file.read_text().split())


@pytest.mark.parametrize("server", ["private", "joined"])
def test_the_first_prompt_waits_for_nothing_heavy(server: str, tmp_path: Path) -> None:
    if server == "private":
        found = modules(PRIVATE, fake_chat.fake_openai.__file__, tmp_path)
        assert "httpx" not in found
    else:
        with FakeOpenAI() as fake:
            found = modules(JOINED, fake.url, tmp_path)
        assert "httpx" in found
    assert not found & LATER
    # each costs half a millisecond, about; what makes them many more should be worth it
    assert len(found) <= MOST[server], sorted(found)


def test_httpx_is_whole_for_others_who_import_it() -> None:
    from chatserve.cli.lean_httpx import httpx

    assert httpx is sys.modules["httpx"] and sys.modules.get("httpx._main", httpx) is not None
