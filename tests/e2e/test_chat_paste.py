"""A megabyte pasted into the chat through a real terminal, brackets and all."""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path

from tests.e2e.terminal import TIMEOUT_S, Terminal
from tests.fake_openai import FakeOpenAI

REPOSITORY = Path(__file__).parents[2]
LINE = "{:06} über 好 \t / !!quit and some words that fill the line up to 64\n"
PASTE_BEGIN, PASTE_END = b"\x1b[200~", b"\x1b[201~"


def send(terminal: Terminal, data: bytes) -> None:
    """All of it, reading meanwhile: a terminal that nobody reads takes nothing more."""
    descriptor, until = terminal.child.child_fd, time.monotonic() + 3 * TIMEOUT_S
    os.set_blocking(descriptor, False)
    while data:
        assert time.monotonic() < until, f"{len(data)} bytes were never taken"
        if select.select([], [descriptor], [], 0.05)[1]:
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(descriptor, data[:4096]) :]
        if select.select([descriptor], [], [], 0)[0]:
            terminal._read()
    os.set_blocking(descriptor, True)


def test_a_megabyte_pasted_is_one_question_and_whole(tmp_path: Path) -> None:
    text = "".join(map(LINE.format, range(15_000))).rstrip("\n")
    assert len(text.encode()) > 1_000_000
    with FakeOpenAI() as server:
        server.scripts[text] = lambda stream: (stream.text("Read."), stream.end())
        terminal = Terminal(
            ["-m", "chatserve", "chat", "--base-url", server.url],
            {"PYTHONPATH": str(REPOSITORY), "CHATSERVE_HOME": str(tmp_path / "home")},
        )
        try:
            terminal.wait_for("fake-1b", ">")
            # a terminal sends returns for the ends of lines
            send(terminal, PASTE_BEGIN + text.replace("\n", "\r").encode() + PASTE_END)
            terminal.wait_for("> [pasted 15,000 lines]")
            assert not server.bodies
            terminal.type("\r")
            terminal.wait_for("Read.")
            assert server.bodies[-1]["messages"][-1]["content"] == text
            assert len(server.bodies) == 1
            terminal.type("\x04")
            assert terminal.wait_for_end() == 0
        finally:
            terminal.close()
