"""What is warned of while something is tried, collected instead of printed."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LOGGER = logging.getLogger("chatserve")


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Our own log's warnings, and PyTorch's of operators that fall back to the CPU.

    The list is whole when the context ends.
    """
    notes: list[str] = []
    handler = _Notes(notes)
    propagate = _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.propagate = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield notes
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.propagate = propagate
    # PyTorch's own words for an operator that Metal lacks
    notes += [str(item.message) for item in caught if "fall back" in str(item.message)]


class _Notes(logging.Handler):
    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.append(record.getMessage())
