"""One record is one line of the log, whatever a client wrote into it."""

from __future__ import annotations

import io
import json
import logging
import sqlite3
from collections.abc import Iterator

import pytest

from chatserve.errors import Overloaded
from chatserve.server.heartbeat import Unreachable
from chatserve.server.log_lines import formatter, shown
from chatserve.server.process import configure_logging, forbid_core_dumps

INJECTED = (
    "a\nb", "a\r\nb", "\x1b[2Jx", "\x1b]0;title\x07", "a\x00b", "a\x85b", "a\u2028b", "a\u202eb",
    "12:00:00 INFO    server: forged\n12:00:00 INFO    server: twice", "\x9b31m", "\x7f",
)  # fmt: skip


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(params=["text", "json"])
def logger(request: pytest.FixtureRequest, stream: io.StringIO) -> Iterator[logging.Logger]:
    logger = logging.Logger("chatserve.test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(request.param, "server"))
    logger.addHandler(handler)
    yield logger


@pytest.mark.parametrize("text", INJECTED)
def test_a_record_is_one_visible_line(
    logger: logging.Logger, stream: io.StringIO, text: str
) -> None:
    logger.info("%s asked for %s", "a client", text)
    line = stream.getvalue()
    assert len(line.splitlines()) == 1 and line.endswith("\n")
    assert line.removesuffix("\n").isprintable()


@pytest.mark.parametrize("text", INJECTED)
def test_without_it_lines_could_be_forged(stream: io.StringIO, text: str) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.emit(logging.makeLogRecord({"msg": text}))
    assert not stream.getvalue().removesuffix("\n").isprintable()


def test_letters_of_all_scripts_stay() -> None:
    assert shown("schön 模型 🙂 \\n") == "schön 模型 🙂 \\n"


def test_json_lines_say_who_when_and_what(stream: io.StringIO) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter("json", "worker m"))
    record = logging.makeLogRecord(
        {"name": "chatserve.x", "levelname": "INFO", "msg": "é %d", "args": (5,), "created": 0.0,
         "msecs": 7.0}
    )  # fmt: skip
    handler.emit(record)
    assert json.loads(stream.getvalue()) == {
        "time": "1970-01-01T00:00:00.007Z", "level": "INFO", "process": "worker m",
        "logger": "chatserve.x", "message": "é 5",
    }  # fmt: skip


def fail() -> None:
    try:
        {}["a prompt"]  # it fails
    except KeyError:
        raise OSError(28, "No space\nleft \x1b[2J") from ValueError("another prompt")


def test_tracebacks_say_where_and_cannot_pass_for_lines(
    logger: logging.Logger, stream: io.StringIO
) -> None:
    try:
        fail()
    except OSError:
        logger.error("failed", exc_info=True)
    text = stream.getvalue()
    assert "\x1b" not in text and "in fail" in text and "No space" in text
    first, *rest = text.splitlines()
    if first.startswith("{"):
        assert not rest and json.loads(first)["traceback"].endswith("OSError: [Errno 28] No space")
    else:
        assert rest and all(line.startswith("  ") for line in rest)


@pytest.mark.parametrize(
    "error",
    [KeyError("SECRET"), ValueError("SECRET"), UnicodeDecodeError("utf-8", b"SECRET", 0, 1, "no"),
     AssertionError("SECRET"), Exception("SECRET"), TypeError("no SECRET"),
     RuntimeError("\nSECRET"), RuntimeError("x" * 500 + "SECRET")],
)  # fmt: skip
def test_what_an_error_quotes_is_not_written(
    logger: logging.Logger, stream: io.StringIO, error: Exception
) -> None:
    logger.error("failed: %s", error, exc_info=error)
    assert "SECRET" not in stream.getvalue() and type(error).__name__ in stream.getvalue()


@pytest.mark.parametrize(
    "error",
    [Unreachable("the controller is away"), Overloaded("the queue is full"),
     sqlite3.OperationalError("database or disk is full"), RuntimeError("CUDA error: bad device"),
     ConnectionRefusedError(111, "Connect call failed")],
)  # fmt: skip
def test_what_it_says_for_itself_is(
    logger: logging.Logger, stream: io.StringIO, error: Exception
) -> None:
    logger.warning("failed: %s", error)
    assert str(error) in stream.getvalue()


def test_the_record_stays_as_it_is_for_other_handlers(stream: io.StringIO) -> None:
    error = ValueError("secret")
    record = logging.LogRecord("x", logging.ERROR, "f.py", 1, "failed: %s", (error,), None)
    assert "secret" not in formatter("text", "p").format(record)
    assert record.args == (error,) and record.getMessage() == "failed: secret"


def test_causes_of_errors_are_told_in_their_order(
    logger: logging.Logger, stream: io.StringIO
) -> None:
    first, second = ValueError("SECRET"), OSError("the disk")
    first.__context__ = second
    second.__context__ = first  # a ring, as an error handler may tie it
    logger.error("failed", exc_info=first)
    text = stream.getvalue()
    assert text.index("OSError: the disk") < text.index("ValueError") and "SECRET" not in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_it_is_what_processes_log_with(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:], logging.root.level
    try:
        configure_logging("server", debug=False, log_format=log_format)
        logging.getLogger("chatserve.x").info("a\nb")
        logging.getLogger("uvicorn.error").info("nothing below a warning of others")
    finally:
        logging.root.handlers[:], level = before
        logging.root.setLevel(level)
        logging.getLogger("chatserve").setLevel(logging.NOTSET)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("{") == (log_format == "json")


def test_no_core_is_dumped(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits: list[object] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    forbid_core_dumps()
    assert limits == [(resource.RLIMIT_CORE, (0, 0))]
