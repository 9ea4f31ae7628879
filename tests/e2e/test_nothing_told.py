"""Prompts, answers and keys are in no log, metric, traceback or command line of any process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from chatserve.server.log_lines import formatter
from tests.e2e.test_serve_process import SERVE, Process
from tests.fake_worker import PROMPT
from tests.fakes import ANSWER

KEY = "CANARY-KEY-5519"
WRONG_KEY = "CANARY-GUESS-7743"
SYSTEM = "CANARY-SYSTEM-1182"
OUTPUT = ANSWER[2]
CANARIES = (KEY, WRONG_KEY, PROMPT, SYSTEM, OUTPUT, OUTPUT.encode("unicode_escape").decode())
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
CHAT = {"model": "ok", "messages": MESSAGES}


def good(client: httpx.Client, number: int) -> httpx.Response:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True, "user": PROMPT}),
        ("/v1/completions", {"model": "ok", "prompt": PROMPT}),
        ("/v1/messages", {"model": "ok", "system": SYSTEM, "messages": MESSAGES[1:],
                          "max_tokens": 5}),
        ("/v1/responses", {"model": "ok", "instructions": SYSTEM, "input": PROMPT}),
        ("/tokenize", {"model": "ok", "prompt": PROMPT}),
    ]  # fmt: skip
    path, body = kinds[number % len(kinds)]
    return client.post(path, json=body)


def bad(client: httpx.Client, number: int) -> httpx.Response:
    chat = "/v1/chat/completions"
    json_type = {"Content-Type": "application/json"}
    kinds: list[dict[str, Any]] = [
        {"json": {**CHAT, "model": PROMPT}},
        {"json": {**CHAT, PROMPT: 1}},
        {"json": {**CHAT, "temperature": PROMPT}},
        {"json": {**CHAT, "messages": [{"role": PROMPT, "content": SYSTEM}]}},
        {"json": {**CHAT, "messages": MESSAGES * 2000}},
        {"content": f'{{"messages": "{PROMPT}'.encode(), "headers": json_type},
        {"content": PROMPT.encode(), "headers": {"Content-Type": "text/plain"}},
        {"json": CHAT, "headers": {"Authorization": f"Bearer {WRONG_KEY}"}},
        {"json": CHAT, "headers": {"Authorization": f"Basic {WRONG_KEY}", "x-api-key": WRONG_KEY}},
        {"json": CHAT, "headers": {"Host": "evil.example", "Cookie": PROMPT, "Referer": PROMPT}},
        {"json": {**CHAT, "model": "quoting"}},
        # a stream that has got nothing is tried again for a while: twice is enough
        {"json": {**CHAT, "model": "quoting", "stream": number < 28}},
        {"json": {**CHAT, "response_format": {"type": PROMPT}}},
        {"json": {**CHAT, "tools": [{"type": "function", "function": {"name": PROMPT + "\n"}}]}},
    ]
    return client.post(chat, **kinds[number % len(kinds)])


def ask_all(url: str, num_good: int, num_bad: int) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        for number in range(num_good):
            answer = good(client, number)
            assert answer.status_code == 200, (number, answer.text)
        for number in range(num_bad):
            answer = bad(client, number)
            told = answer.status_code >= 400 or '"error"' in answer.text
            assert told, (number, answer.text[:300])
        for path in ("/metrics", "/health/ready", "/health/decode", "/v1/models", "/openapi.json"):
            found = client.get(path)
            assert not [each for each in CANARIES if each in found.text], path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@contextlib.contextmanager
def serving(home: Path, *flags: str) -> Iterator[Process]:
    arguments = (*SERVE, "--port", "0", "ok", "quoting", "--no-store-responses", *flags)
    process = Process(*arguments, home=home, CHATSERVE_API_KEYS=f"{KEY},another")
    try:
        yield process
    finally:
        process.end()


def check(home: Path, num_good: int, num_bad: int, *flags: str) -> None:
    with serving(home, *flags) as process:
        url = process.ready_url()
        ask_all(url, num_good, num_bad)
        family = [psutil.Process(process.popen.pid), *process.children()]
        assert len(family) == 3
        for member in family:
            line = " ".join(member.cmdline())
            assert not [each for each in CANARIES if each in line]
            # no file with its memory is left when one dies
            if hasattr(member, "rlimit"):
                assert member.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        for member in family[1:]:
            # the clients' keys are none of a worker's business
            assert KEY not in " ".join(member.environ().values())
        process.popen.terminate()
        process.wait()
    log = "".join(process.err)
    # a bug with one request costs the worker no place
    assert "is ejected" not in log
    assert not [each for each in CANARIES if each in log], log
    # the log is one, and tells of the bug
    assert "ValueError" in log and "in submit" in log and "finish" in log
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert not [path for path in kept if any(c.encode() in path.read_bytes() for c in CANARIES)]


@pytest.mark.parametrize("flags", [(), ("--debug", "--log-format", "json")])
def test_logs_and_processes_tell_nothing(home: Path, flags: tuple[str, ...]) -> None:
    check(home, 18, 28, *flags)


@pytest.mark.soak
@pytest.mark.parametrize("flags", [(), ("--debug",), ("--log-format", "json")])
def test_seven_hundred_requests_tell_nothing(home: Path, flags: tuple[str, ...]) -> None:
    check(home, 500, 200, *flags)


def test_python_s_own_formatter_would_tell() -> None:
    """The bug's error quotes the prompt: what the test above looks for is there to be found."""
    error = ValueError(f"cannot do {PROMPT!r}")

    def line(formatter: logging.Formatter) -> str:
        record = {"msg": "%s", "args": (error,), "exc_info": (ValueError, error, None)}
        return formatter.format(logging.makeLogRecord(record))

    assert line(logging.Formatter()).count(PROMPT) == 2
    for log_format in ("text", "json"):
        assert PROMPT not in line(formatter(log_format, "worker"))
