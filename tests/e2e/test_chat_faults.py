"""`chatserve chat` at bad servers and when things die: two lines, and the terminal as it was."""

from __future__ import annotations

import contextlib
import signal
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e import fake_chat
from tests.e2e.terminal import Terminal
from tests.fake_openai import FakeOpenAI

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
STATUS = "fake-1b · cpu · float32 · 8-bit"
REPOSITORY = Path(__file__).parents[2]
BAD = ("die", "cut", "failing", "junk", "ten megabytes", "html", "bare 500", "huge error", "full",
       "gzip")  # fmt: skip
STALLS = ("endless", "silent")
SECOND = "".join(f"{index} " for index in range(20))
WAIT_S = 20.0

Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    terminals = []

    def start_chat(*flags: str, deeds: tuple[str, ...] = (), **more: str) -> Terminal:
        env = {"PYTHONPATH": str(REPOSITORY), "CHATSERVE_HOME": str(tmp_path / "home"), **more}
        argv = [fake_chat.__file__, *deeds, "--", "--style", "simple", *flags]
        terminals.append(Terminal(argv, env))
        return terminals[-1]

    yield start_chat
    for terminal in terminals:
        terminal.close()


def ready(terminal: Terminal) -> Terminal:
    terminal.wait_for(STATUS)
    return terminal


def settings(terminal: Terminal) -> list[Any]:
    """What `stty -a` would say."""
    return termios.tcgetattr(terminal.child.child_fd)


def rounds(start: Start, bad: tuple[str, ...], times: int) -> None:
    with FakeOpenAI() as server:
        check_rounds(ready(start("--base-url", server.url)), server, bad * times)


def check_rounds(terminal: Terminal, server: FakeOpenAI, bad: tuple[str, ...]) -> None:
    at_prompt = settings(terminal)
    slowest_s = 0.0
    for question in bad:
        server.bodies.clear()
        terminal.clear()
        terminal.type(question + ENTER)
        started = time.monotonic()
        if question in STALLS:
            terminal.wait_until(lambda: bool(server.bodies), f"a request for {question}")
            started = time.monotonic()
            terminal.type(CTRL_C)
        terminal.wait_for("\n>\n", STATUS)
        slowest_s = max(slowest_s, time.monotonic() - started)
        message = terminal.text.split("error: " if question not in STALLS else "stopped")[1]
        assert len(message.split("\n>\n")[0].split("\n")) <= 2, (question, terminal.text)
        assert settings(terminal) == at_prompt, question
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert terminal.has_restored_settings()
    print(f"{len(bad)} bad answers: prompt back within {slowest_s:.2f} s")


def test_bad_servers_cost_two_lines(start: Start) -> None:
    rounds(start, (*BAD, *STALLS), 2)


@pytest.mark.soak
def test_bad_servers_cost_two_lines_each_twenty_times(start: Start) -> None:
    rounds(start, (*BAD, *STALLS), 20)


def test_a_server_that_is_too_busy_is_asked_again_and_the_user_told(start: Start) -> None:
    terminal = ready(start())
    terminal.type("later" + ENTER)
    terminal.wait_for("the server is too busy: asking again in 1 s (1 of 2)", "user: later")


def test_ctrl_c_while_a_busy_server_is_waited_for(start: Start) -> None:
    terminal = ready(start())
    terminal.type("busy" + ENTER)
    terminal.wait_for("asking again in 7 s (1 of 2)")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped; /regen asks again")


def test_ctrl_c_cancels_on_the_server(start: Start) -> None:
    with FakeOpenAI() as server:
        terminal = ready(start("--base-url", server.url))
        terminal.type("endless" + ENTER)
        terminal.wait_for("one two three")
        assert not server.cancelled.is_set()
        terminal.type(CTRL_C)
        assert server.cancelled.wait(WAIT_S)
        terminal.wait_for("stopped; /continue goes on")


def test_the_end_of_the_server_in_an_answer_ends_the_chat_and_keeps_what_has_come(
    start: Start,
) -> None:
    terminal = ready(start())
    terminal.type("endless" + ENTER)
    terminal.wait_for("one two three")
    (server,) = psutil.Process(terminal.child.pid).children()
    server.kill()
    assert terminal.wait_for_end() == 1
    text = " ".join(terminal.text.split())
    assert "lost the connection" in text and "the server was killed by SIGKILL" in text
    assert terminal.has_restored_settings()
    again = start("--resume", "last")
    again.wait_for("ASSISTANT: one two three", STATUS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_without_its_guard_a_signal_would_leave_the_terminal_as_it_is(
    number: signal.Signals, start: Start
) -> None:
    """`test_chat_terminal` has the same with the guard."""
    terminal = ready(start(deeds=("careless",)))
    terminal.child.kill(number)
    assert terminal.wait_for_end() == -number
    assert not terminal.has_restored_settings()


def test_an_answer_outlives_its_worker(start: Start) -> None:
    terminal = start(deeds=("serve",), QUICK_RESTARTS="1")
    terminal.wait_for("seconds · ")
    terminal.type("count" + ENTER)
    terminal.wait_for("\n0 1 2 3")
    worker = worker_of(terminal)
    worker.kill()
    terminal.wait_for("\n" + SECOND.strip(), "\n>\n", "seconds · ")
    assert "error" not in terminal.text
    assert worker_of(terminal).pid != worker.pid
    terminal.clear()
    terminal.type("again" + ENTER)
    terminal.wait_for("\n" + SECOND.strip(), "\n>\n")
    terminal.type(CTRL_D)
    assert terminal.wait_for_end() == 0
    assert terminal.has_restored_settings()


def worker_of(terminal: Terminal) -> psutil.Process:
    """The one that answers: it serves a port."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for process in psutil.Process(terminal.child.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it is gone, or a zombie
                if "tests.fake_worker" in process.cmdline():
                    return process
    raise AssertionError("there is no worker")
