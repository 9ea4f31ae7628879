"""The chat in a real terminal (tmux), as a person uses it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.processes import environment
from tests.weights import default_model

pytestmark = pytest.mark.weights
WAIT_S = 60
PROMPT = re.compile(r"^>", re.MULTILINE)


class Tmux:
    """One tmux server of its own with one window."""

    def __init__(self, socket: str) -> None:
        self._base = ["tmux", "-L", socket]

    def run(self, *arguments: str) -> str:
        result = subprocess.run(
            [*self._base, *arguments], capture_output=True, text=True, check=True,
            env=environment(TERM="xterm-256color", LC_ALL="C.UTF-8"),
        )  # fmt: skip
        return result.stdout

    def type(self, text: str) -> None:
        self.run("send-keys", "-l", text)
        self.press("Enter")

    def press(self, key: str) -> None:
        self.run("send-keys", key)

    def screen(self) -> str:
        return self.run("capture-pane", "-p", "-S", "-200")

    def wait_for(self, condition: Callable[[str], object]) -> str:
        """Poll the screen until `condition` holds; fails with the screen it saw last."""
        deadline = time.monotonic() + WAIT_S
        screen = self.screen()
        while not condition(screen):
            assert time.monotonic() < deadline, screen
            screen = self.screen()
        return screen


@pytest.fixture
def tmux() -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        if os.environ.get("CI"):
            pytest.fail("tmux is missing; .ci/run installs it")
        pytest.skip("needs tmux")
    default_model()
    terminal = Tmux(f"chatserve-test-{os.getpid()}")
    command = [sys.executable, "-m", "chatserve.cli", "--no-save", "--temperature", "0"]
    # long enough to be stopped in the middle, however fast the machine
    command += ["--max-new-tokens", "4000"]
    shell = f"{shlex.join(command)}; echo left with $?; cat"
    terminal.run("-u", "new-session", "-d", "-x", "90", "-y", "40", shell)
    yield terminal
    terminal.run("kill-server")


def test_a_chat_streams_stops_with_ctrl_c_and_leaves_with_ctrl_d(tmux: Tmux) -> None:
    tmux.wait_for(PROMPT.search)
    # typed while the worker still loads: it waits for the model, nothing is lost
    tmux.type("Say hello.")
    answered = tmux.wait_for(lambda screen: len(PROMPT.findall(screen)) == 2)
    assert "Hello" in answered
    tmux.type("Tell me a very long story about a llama.")
    # some words of the story are there, and it still streams
    partial = tmux.wait_for(lambda screen: len(story(screen)) > 8)
    tmux.press("C-c")
    stopped = tmux.wait_for(lambda screen: len(PROMPT.findall(screen)) == 3)
    assert "stopped" in stopped
    assert story(stopped)[:5] == story(partial)[:5]
    tmux.type("/help")
    # a key typed before the prompt is back would belong to nobody
    tmux.wait_for(lambda screen: "Ctrl-D leaves.\n>" in screen)
    tmux.press("C-d")
    tmux.wait_for(lambda screen: "left with 0" in screen)


def story(screen: str) -> list[str]:
    """The answer's words after the question, without the status line; none before it is sent."""
    lines = screen.partition("story about a llama.\n")[2].splitlines()
    return " ".join(line for line in lines if " · cpu · " not in line).split()
