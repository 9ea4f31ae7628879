"""What a chat in a terminal shows while nothing of an answer comes, and of a server that goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.terminal import TIMEOUT_S, Terminal
from tests.fake_openai import FakeOpenAI, Stream

ENTER, CTRL_C = "\r", "\x03"
STATUS = "fake-1b · cpu · float32 · 8-bit"
REPOSITORY = Path(__file__).parents[2]

Join = Callable[..., Terminal]


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Join]:
    """Joins a server in a terminal; the chat is there when its status line is."""
    terminals = []

    def start(server: FakeOpenAI, *flags: str) -> Terminal:
        terminals.append(
            Terminal(
                ["-m", "chatserve", "chat", "--base-url", server.url, *flags],
                {"PYTHONPATH": str(REPOSITORY), "CHATSERVE_HOME": str(tmp_path / "home")},
            )
        )
        terminals[-1].wait_for(STATUS)
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


class Thinker:
    """Scripts whose answers wait until the test lets them go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def think(self, stream: Stream) -> None:
        stream.event({"choices": [{"delta": {"reasoning_content": "The user asks. "}}]})
        self.may_go_on.wait(TIMEOUT_S)
        stream.event({"choices": [{"delta": {"reasoning_content": "So what?"}}]})
        stream.text("Forty", "-two.")
        stream.end(num_tokens=4)

    def queue(self, stream: Stream) -> None:
        stream.raw(b": queue 2\n\n")
        self.may_go_on.wait(TIMEOUT_S)
        stream.text("Served.")
        stream.end()


@pytest.mark.parametrize("style", ["simple", "rich"])
def test_thinking_is_seen_and_folded_away_when_the_answer_begins(style: str, join: Join) -> None:
    with FakeOpenAI() as server:
        thinker = Thinker()
        server.scripts["think"] = thinker.think
        terminal = join(server, "--style", style)
        terminal.type("think" + ENTER)
        terminal.wait_for("thinking … 15 characters")
        thinker.may_go_on.set()
        terminal.wait_for("Forty-two.", STATUS)
        assert terminal.lines[1:5] == ["> think", "Forty-two.", "", ">"]
        terminal.type("what was said?" + ENTER)
        terminal.wait_for("assistant: Forty-two.", "user: what was said?")
        assert "The user asks" not in terminal.raw.decode()


def test_ctrl_c_stops_thinking(join: Join) -> None:
    with FakeOpenAI() as server:
        thinker = Thinker()
        server.scripts["think"] = thinker.think
        terminal = join(server)
        terminal.type("think" + ENTER)
        terminal.wait_for("thinking … 15 characters")
        terminal.type(CTRL_C)
        terminal.wait_for("stopped; /regen asks again", STATUS)
        assert "thinking" not in terminal.text
        thinker.may_go_on.set()


@pytest.mark.parametrize("style", ["simple", "rich"])
def test_the_place_in_the_queue_is_seen_in_every_style(style: str, join: Join) -> None:
    with FakeOpenAI() as server:
        thinker = Thinker()
        server.scripts["queue"] = thinker.queue
        terminal = join(server, "--style", style)
        terminal.type("queue" + ENTER)
        terminal.wait_for("2nd in the queue")
        thinker.may_go_on.set()
        terminal.wait_for("Served.", STATUS)
        assert "in the queue" not in terminal.text


def test_a_joined_server_that_goes_and_comes_back_is_told_of_below_the_prompt(join: Join) -> None:
    with FakeOpenAI() as first:
        port = first.server_address[1]
        terminal = join(first)
    terminal.wait_for("server gone · fake-1b")
    terminal.type("a question that waits")
    with FakeOpenAI(port=port) as second:
        terminal.wait_for("server is back · fake-1b", "> a question that waits")
        terminal.type(ENTER)
        terminal.wait_for("user: a question that waits")
        terminal.wait_until(lambda: terminal.lines[-1] == STATUS, "no news any more")
        assert len(second.bodies) == 1
