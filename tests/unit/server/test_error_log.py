"""Errors as the operator sees them: counted, bounded, without a client's words."""

from __future__ import annotations

from contextvars import copy_context

import pytest

from chatserve.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    WorkerLost,
)
from chatserve.protocol.measured import MAX_CODES, MAX_RECENT
from chatserve.server.error_log import ErrorLog
from chatserve.server.outcome import Outcome, begin, note_error, note_status
from chatserve.server.upstream import told_error
from tests.fakes import FakeClock

CANARY = "CANARY-5512"


def test_the_same_error_again_is_counted() -> None:
    clock = FakeClock()
    log = ErrorLog(clock)
    log.note_error(Overloaded("7 requests are waiting", retry_after_s=1), 429)
    log.note_error(WorkerLost("the worker died"), 502)
    clock.advance(5)
    log.note_error(Overloaded("7 requests are waiting", retry_after_s=1), 429)
    assert [(each.code, each.count, each.at) for each in log.recent()] == [
        ("worker_died", 1, 100.0), ("rate_limit_exceeded", 2, 105.0)
    ]  # fmt: skip
    assert log.by_code == {"rate_limit_exceeded": 2, "worker_died": 1}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ModelNotFound(f"model {CANARY!r} is not served here"), 404, ""),
        (InvalidRequest(f"no field {CANARY}"), 400, ""),
        (ValueError(CANARY), 500, "a bug: ValueError; the log says more"),
        (GenerationFailed(f"cannot do '{CANARY}' now"), 500, "cannot do … now"),
        (GenerationFailed("cut \x1b[31m here"), 500, "cut \\x1b[31m here"),
        (ContextLengthExceeded("prompt has 9 tokens, m holds 4"), 400,
         "prompt has 9 tokens, m holds 4"),
        (told_error(b'{"error": {"message": "CANARY-5512", "code": "worker_died"}}'), 502, ""),
        (told_error(b'{"error": {"message": "CANARY-5512"}}'), 502, ""),
        (told_error(b'{"error": {"message": "CANARY-5512", "code": ["x"]}}'), 502, ""),
    ],
)  # fmt: skip
def test_no_words_of_a_client_are_kept(error: Exception, status: int, message: str) -> None:
    log = ErrorLog()
    log.note_error(error, status)
    [found] = log.recent()
    assert found.message == message and CANARY not in str(log.recent())


def test_it_is_bounded() -> None:
    log = ErrorLog()
    for number in range(500):
        log.note_error(GenerationFailed(f"fault {number} " + "x" * 1000), 500)
        other = GenerationFailed("fault")
        vars(other)["code"] = f"kind_{number}"
        log.note_error(other, 500)
    assert len(log.recent()) == MAX_RECENT and len(log.by_code) == MAX_CODES
    assert max(len(each.message) for each in log.recent()) < 300


def test_a_request_tells_its_last_error_and_its_status() -> None:
    copy_context().run(check_a_request)


def check_a_request() -> None:
    note_error(WorkerLost("nobody has begun"), 502)
    log = ErrorLog()
    outcome = begin()
    note_status(200)
    note_error(GenerationFailed("a fault"), 500)
    note_error(WorkerLost("the worker died"), 502)
    log.note(outcome)
    log.note(Outcome())  # one that was cut before its answer
    assert log.by_status == {200: 1} and log.by_code == {"worker_died": 1}
