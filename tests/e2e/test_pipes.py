"""`chatserve chat` in scripts and pipelines: what goes in, what comes out, how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_openai import FakeOpenAI, Stream
from tests.processes import TIMEOUT_S, environment

CHAT = (sys.executable, "-m", "chatserve", "chat", "--base-url")


@pytest.fixture(scope="module")
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        server.scripts |= {"steady": steady, "think": think, "ponder": ponder}
        yield server


def steady(stream: Stream) -> None:
    """More than a pipe holds, unless the client leaves."""
    try:
        for number in range(5000):
            stream.text(f"line {number} {'x' * 200}\n")
    except OSError:
        stream.is_over = True
        stream._handler.server.cancelled.set()
        return
    stream.end()


def think(stream: Stream) -> None:
    stream.event({"choices": [{"delta": {"reasoning": "The user asks. "}}]})
    stream.event({"choices": [{"delta": {"reasoning_content": "So what?"}}]})
    stream.text("Forty", "-two.")
    stream.end()


def ponder(stream: Stream) -> None:
    """Thinks, and says nothing more until the client leaves."""
    stream.event({"choices": [{"delta": {"reasoning_content": "Well. "}}]})
    stream.text("So")
    stream.event({"choices": [{"delta": {"reasoning_content": "Hm."}}]})
    stream.wait_for_disconnect()


def chat(
    server: FakeOpenAI, *flags: str | Path, stdin: bytes | None = None, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*CHAT, server.url, *map(str, flags)], input=stdin or b"", capture_output=True,
        timeout=TIMEOUT_S, env=environment(CHATSERVE_HOME="", **variables), check=False,
    )  # fmt: skip


def asked(server: FakeOpenAI) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in server.bodies[-1]["messages"]]


def test_the_object_has_text_usage_and_times_and_nothing_else_is_said(server: FakeOpenAI) -> None:
    result = chat(server, "-p", "escapes", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    table = json.loads(result.stdout)
    assert result.stdout.count(b"\n") == 1 and result.stdout.isascii()
    times = table.pop("timings")
    assert table == {
        "text": "\x1b]0;owned\x07sa\x1b[2Jfe\x1b[31m 你\u202e好\n", "reasoning": None,
        "model": "fake-1b", "finish_reason": "stop", "error": None,
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
                  "prompt_tokens_details": {"cached_tokens": None}},
    }  # fmt: skip
    assert times["total_s"] >= times["ttft_s"] > 0


def test_what_a_model_thinks_is_in_the_object_and_nowhere_else(server: FakeOpenAI) -> None:
    plain = chat(server, "-p", "think")
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, b"Forty-two.\n", b"")
    *pieces, last = map(
        json.loads, chat(server, "-p", "think", "--stream-json").stdout.splitlines()
    )
    assert pieces == [
        {"reasoning_delta": "The user asks. "}, {"reasoning_delta": "So what?"},
        {"delta": "Forty"}, {"delta": "-two."},
    ]  # fmt: skip
    assert (last["text"], last["reasoning"]) == ("Forty-two.", "The user asks. So what?")


@pytest.mark.parametrize(
    ("question", "pieces", "text"),
    [
        ("endless", [("delta", "one "), ("delta", "two "), ("delta", "three")], "one two three"),
        (
            "ponder",
            [("reasoning_delta", "Well. "), ("delta", "So"), ("reasoning_delta", "Hm.")],
            "So",
        ),
    ],
)
def test_pieces_come_a_line_each_as_soon_as_they_are_there(
    question: str, pieces: list[tuple[str, str]], text: str, server: FakeOpenAI
) -> None:
    process = subprocess.Popen(
        [*CHAT, server.url, "-p", question, "--stream-json"], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(CHATSERVE_HOME=""),
    )  # fmt: skip
    try:
        # the answer has not ended: who buffers would leave this waiting
        assert [json.loads(process.stdout.readline()) for _ in pieces] == [
            {name: piece} for name, piece in pieces
        ]
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.communicate()
    last = json.loads(rest)
    assert (last["text"], last["error"]["code"]) == (text, "interrupted")
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("question", "code", "text", "reason", "error", "told"),
    [
        ("long", 0, "As I was say", "length", None, b"the answer stopped where"),
        ("failing", 1, "half an", None, "worker_died", b"worker died"),
        ("too long", 1, "", None, "context_length_exceeded", b"prompt has 9 tokens"),
    ],
)
def test_however_it_ends_the_object_says_so(
    question: str, code: int, text: str, reason: str, error: str, told: bytes, server: FakeOpenAI
) -> None:
    result = chat(server, "-p", question, "--json")
    table = json.loads(result.stdout)
    assert result.returncode == code
    assert told in result.stderr and result.stderr.count(b"\n") == 1
    assert (table["text"], table["finish_reason"]) == (text, reason)
    assert (table["error"] or {}).get("code") == error


def test_an_error_before_the_question_is_an_object_too(tmp_path: Path) -> None:
    flags = ("-p", "x", "--json", "--file", tmp_path / "none")
    with FakeOpenAI() as server:
        result = chat(server, *flags)
    assert result.returncode == 2
    assert json.loads(result.stdout)["error"]["message"] in result.stderr.decode()


def test_context_comes_before_the_question(server: FakeOpenAI, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print(1)\n")
    (tmp_path / "b.txt").write_bytes("Grüße".encode("latin-1"))
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    flags = ("-f", tmp_path / "a.py", "--file", tmp_path / "b.txt", "--system", "be brief")
    result = chat(
        server, *flags, "-p", "Why?", "--input-errors=replace", "--no-stream", "--schema", schema,
        stdin=b"a\xffb\n",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert asked(server) == [
        ("system", "be brief"),
        ("user", f"{tmp_path}/a.py:\n```py\nprint(1)\n```\n\n"
                 f"{tmp_path}/b.txt:\n```txt\nGr\ufffd\ufffde\n```\n\nWhy?\n\na\ufffdb"),
    ]  # fmt: skip
    body: dict[str, Any] = server.bodies[-1]
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert body["stream"] is False and "stream_options" not in body


@pytest.mark.parametrize(
    ("flags", "stdin", "told"),
    [
        ((), b"ab\xe4c", b"standard input is no UTF-8 text (byte 2); convert it (iconv"),
        ((), b"\x7fELF\0", b"standard input is a binary file, not text"),
        ((), b"", b"there is no prompt"),
        (("-p", "", "--json"), b" ", b"there is no prompt"),
        (("-p", "x", "--schema", "/dev/null"), b"", b"--schema /dev/null is no JSON"),
        (("-p", "x", "-f", "/dev/zero"), b"", b"cannot attach /dev/zero: it is no file"),
        (("--style", "programmatic", "--stream-json"), b"x", b"--stream-json is for one answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_told_in_one_line(
    flags: tuple[str, ...], stdin: bytes, told: bytes, server: FakeOpenAI
) -> None:
    num_asked = len(server.bodies)
    result = chat(server, *flags, stdin=stdin)
    assert (result.returncode, result.stderr.count(b"\n")) == (2, 1)
    assert told in result.stderr
    assert len(server.bodies) == num_asked


def test_a_reader_that_has_enough_ends_the_answer(server: FakeOpenAI) -> None:
    server.cancelled.clear()
    command = '"$@" -p steady | head -1; echo "${PIPESTATUS[@]}"'
    result = subprocess.run(
        ["bash", "-c", command, "chat", *CHAT, server.url], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, env=environment(CHATSERVE_HOME=""),
        check=False,
    )  # fmt: skip
    assert result.stderr == ""
    assert result.stdout.splitlines() == ["line 0 " + "x" * 200, "0 0"]
    assert server.cancelled.wait(TIMEOUT_S), "the server is told"


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_pipe_of_another_encoding_gets_the_answer(
    variables: dict[str, str], server: FakeOpenAI
) -> None:
    result = chat(server, stdin=b"chinese", **variables)
    assert (result.returncode, result.stdout) == (0, b"??????\n"), result.stderr


def test_a_program_of_fastchats_gets_its_form_to_the_byte(server: FakeOpenAI) -> None:
    end = " __END_OF_A_MESSAGE_47582648__\n"
    stdin = f"hello{end}two\nlines{end}".encode()
    result = chat(server, "--style", "programmatic", stdin=stdin)
    assert result.returncode == 0
    asked_again = "user: hello\nassistant: Hello there.\nuser: two\nlines"
    assert result.stdout.decode() == (
        "[!OP:USER]: hello\n[!OP:ASSISTANT]: Hello there.\n"
        f"[!OP:USER]: two\nlines\n[!OP:ASSISTANT]: {asked_again}\n"
    )
