"""What went wrong of late, for the operator: how often which code was told, and the last of each.

Bounded and without a client's words: of what is the client's own fault only the code is kept, since
such messages quote what was sent.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from chatserve.errors import ChatserveError, ContextLengthExceeded, Overloaded
from chatserve.protocol.measured import MAX_CODES, MAX_RECENT, RecentError
from chatserve.server.log_lines import shown
from chatserve.server.outcome import Outcome

_MAX_WORDS = 240
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
# numbers and our own words only
_TOLD_BY_NUMBERS = (ContextLengthExceeded, Overloaded)


class ErrorLog:
    """Of one process. The same error again is counted, not kept again."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.by_code: dict[str, int] = {}
        self.by_status: dict[int, int] = {}
        self._clock = clock
        self._recent: dict[tuple[str, str], RecentError] = {}

    def note(self, outcome: Outcome) -> None:
        """A request has ended."""
        if outcome.status:
            self.by_status[outcome.status] = self.by_status.get(outcome.status, 0) + 1
        if outcome.error is not None:
            self.note_error(outcome.error, outcome.error_status)

    def note_error(self, error: Exception, status: int) -> None:
        code = error.code if isinstance(error, ChatserveError) else ChatserveError.code
        if code not in self.by_code and len(self.by_code) >= MAX_CODES:
            return
        self.by_code[code] = self.by_code.get(code, 0) + 1
        message = _message(error, status)
        before = self._recent.pop((code, message), None)
        self._recent[code, message] = RecentError(
            at=self._clock(), code=code, message=message, count=before.count + 1 if before else 1
        )
        while len(self._recent) > MAX_RECENT:
            del self._recent[next(iter(self._recent))]

    def recent(self) -> list[RecentError]:
        """The latest last."""
        return list(self._recent.values())


def _message(error: Exception, status: int) -> str:
    if not isinstance(error, ChatserveError):
        return f"a bug: {type(error).__name__}; the log says more"
    if error.is_foreign or (status < 500 and not isinstance(error, _TOLD_BY_NUMBERS)):
        return ""
    return shown(_QUOTED.sub("…", error.message))[:_MAX_WORDS]
