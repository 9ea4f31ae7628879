"""How a line of the log is written: for people, or as JSON; one record, one line, whoever's words.

What clients send may stand in a record; it can neither begin a line of its own nor move a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Any, Literal

from chatserve.server.request_id import NO_REQUEST, current_request_id

LogFormat = Literal["text", "json"]

# control characters of both sets, what turns the direction of a line, and line ends of Unicode
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def formatter(log_format: str, process: str) -> logging.Formatter:
    """For the lines of `process`."""
    return JsonLines(process) if log_format == "json" else TextLines(process)


def shown(text: str) -> str:
    """`text` with everything escaped that is no visible character."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class TextLines(logging.Formatter):
    """`16:05:31 INFO    server: …`; a traceback, where there is one, follows indented."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {process}: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join("  " + shown(line) for line in lines)


class JsonLines(logging.Formatter):
    """One object a line: time, level, process, logger, message, the id of the request that it is
    about, and a traceback as a text."""

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
            "message": record.getMessage(),
        }
        if (request_id := current_request_id()) != NO_REQUEST:
            fields["request"] = request_id
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        # in ASCII: nothing in it can end a line or move a terminal
        return json.dumps(fields)
