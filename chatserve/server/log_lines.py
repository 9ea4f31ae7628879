"""How a line of the log is written: for people, or as JSON; one record, one line, whoever's words.

What clients send may stand in a record; it can neither begin a line of its own nor move a terminal.
What an error quotes may be a prompt: of errors that quote values, only the kind is written.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import time
import traceback
from collections.abc import Iterator
from typing import Any, Literal

from chatserve.server.outcome import current_trace_id
from chatserve.server.request_id import NO_REQUEST, current_request_id

LogFormat = Literal["text", "json"]

# control characters of both sets, what turns the direction of a line, and line ends of Unicode
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# their words are ours, the system's or the device's; those of others may be what they choked on
_QUOTES_NOTHING = (OSError, MemoryError, ImportError, RuntimeError)
_ROOMS_THAT_QUOTE_NOTHING = ("chatserve", "sqlite3")
_MAX_WORDS = 300


def formatter(log_format: str, process: str) -> logging.Formatter:
    """For the lines of `process`."""
    return JsonLines(process) if log_format == "json" else TextLines(process)


def shown(text: str) -> str:
    """`text` with everything escaped that is no visible character."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def told(error: BaseException) -> str:
    """What may be written of `error`: its kind, and what it says if it quotes nobody."""
    kind = type(error).__name__
    room = type(error).__module__.partition(".")[0]
    is_plain = isinstance(error, _QUOTES_NOTHING) or room in _ROOMS_THAT_QUOTE_NOTHING
    words = str(error).partition("\n")[0] if is_plain else ""
    return f"{kind}: {words[:_MAX_WORDS]}" if words else kind


def _told(record: logging.LogRecord) -> logging.LogRecord:
    """A copy, which names errors as `told` does; the record is other handlers', too."""
    record = copy.copy(record)
    if isinstance(record.args, tuple):
        record.args = tuple(told(a) if isinstance(a, BaseException) else a for a in record.args)
    return record


def _traceback(error: BaseException) -> str:
    """Where `error` came from, and what it came from, without what it may quote."""
    return "\n".join(line for each in _causes(error) for line in _lines_of(each))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen = [error]
    while (
        before := seen[-1].__cause__ or (None if seen[-1].__suppress_context__ else
                                         seen[-1].__context__)
    ) is not None and before not in seen:  # fmt: skip
        seen.append(before)
    return reversed(seen)


def _lines_of(error: BaseException) -> Iterator[str]:
    for entry in traceback.format_tb(error.__traceback__):
        yield from entry.rstrip("\n").split("\n")
    yield told(error)


class TextLines(logging.Formatter):
    """`16:05:31 INFO    server: …`; a traceback, where there is one, follows indented."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {process}: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return super().format(_told(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join("  " + shown(line) for line in _traceback(ei[1]).split("\n"))


class JsonLines(logging.Formatter):
    """One object a line: time, level, process, logger, message, the ids of the request that it is
    about and of its trace, what else the record is `about` in fields of their own, and a traceback
    as a text."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": _told(record).getMessage(),
        }
        if (request_id := current_request_id()) != NO_REQUEST:
            fields["request"] = request_id
        if trace_id := current_trace_id():
            fields["trace"] = trace_id
        fields |= getattr(record, "about", {})
        if record.exc_info and record.exc_info[1]:
            fields["traceback"] = _traceback(record.exc_info[1])
        # in ASCII: nothing in it can end a line or move a terminal
        return json.dumps(fields)
