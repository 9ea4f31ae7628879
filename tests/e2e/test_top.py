"""`chatserve top` beside a real server, in a real terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.terminal import Terminal
from tests.faults.house import Process
from tests.processes import run_chatserve

TOP = ("-m", "chatserve", "top", "--interval-s=0.2")


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "run").mkdir(mode=0o700)
    return {
        "CHATSERVE_HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "CHATSERVE_CONTROL_TOKEN": "",
    }  # fmt: skip


def start(folder: Path, home: dict[str, str], *models: str) -> tuple[Process, str]:
    process = Process("serve", ["tests.serve_fake", "--port=0", *models], folder, **home)
    return process, f"http://127.0.0.1:{process.wait_for_port()}"


@pytest.fixture
def server(tmp_path: Path, home: dict[str, str]) -> Iterator[tuple[Process, str]]:
    process, url = start(tmp_path, home, "ok")
    yield process, url
    process.end()


def test_it_follows_a_server_that_goes_and_comes_back(
    server: tuple[Process, str], home: dict[str, str], tmp_path: Path
) -> None:
    process, url = server
    once = run_chatserve("top", "--once", **home)
    assert once.returncode == 0 and once.stdout.startswith("chatserve ")
    assert "ok" in once.stdout and "\x1b" not in once.stdout
    named = run_chatserve("top", "--json", "--base-url", url, **home)
    assert json.loads(named.stdout)["workers"][0]["models"] == ["ok"]

    terminal = Terminal(TOP, home)
    try:
        terminal.wait_for(url, "MODEL", "ready", "q leaves")
        terminal.child.setwinsize(10, 34)
        terminal.screen.resize(10, 34)
        terminal.wait_until(lambda: "TOK/S" not in terminal.text, "fewer columns")
        process.end()
        terminal.wait_for("not seen for")
        other, again = start(tmp_path, home, "seconds")
        try:
            terminal.wait_for(again, "seconds")
            terminal.type("q")
            assert terminal.wait_for_end() == 0
            assert terminal.has_restored_settings()
        finally:
            other.end()
    finally:
        terminal.close()


def test_where_there_is_no_server_it_says_so_in_one_line(home: dict[str, str]) -> None:
    result = run_chatserve("top", **home)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "start one by `chatserve serve`" in result.stderr
    unreachable = run_chatserve("top", "--base-url", "http://127.0.0.1:9", **home)
    assert unreachable.returncode == 1 and unreachable.stderr.count("\n") == 1
