"""Fields that a lenient server leaves out of a request instead of refusing it, and says so.

Strict unless someone is `noting`: the names are kept beside the request, in a context variable, so
that no reader of a field has to pass them on. Knows no field and no header.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from urllib.parse import quote

HEADER = "x-chatserve-ignored-fields"
MAX_NAMES = 32
MAX_NAME_LEN = 100


class IgnoredFields:
    """The names of what one request asked for and did not get, each once, in their order."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._num_more = 0

    def __bool__(self) -> bool:
        return bool(self._names)

    def add(self, name: str) -> None:
        if len(self._names) < MAX_NAMES:
            self._names[name[:MAX_NAME_LEN]] = None
        elif name not in self._names:
            self._num_more += 1

    def __str__(self) -> str:
        """In the characters that a header may hold; a comma in a name is escaped."""
        names = [quote(name.encode("utf-8", "replace"), safe="[]:") for name in self._names]
        return ", ".join(names) + (f", and {self._num_more} more" if self._num_more else "")


_current: ContextVar[IgnoredFields | None] = ContextVar("ignored_fields", default=None)


@contextlib.contextmanager
def noting() -> Iterator[IgnoredFields]:
    """From here on fields are ignored and noted, in this task and the threads it hands work to."""
    ignored = IgnoredFields()
    token = _current.set(ignored)
    try:
        yield ignored
    finally:
        _current.reset(token)


def ignored_fields() -> IgnoredFields | None:
    """Where to note a field that is ignored; None where it must be refused."""
    return _current.get()
