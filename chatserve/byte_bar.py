"""A progress bar in bytes on one terminal line; elsewhere one line at the start, one at the end.

Knows a text stream and a clock; not what is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

_WIDTH = 20
_REDRAW_S = 0.1
_ERASE_LINE = "\r\x1b[2K"


class ByteBar:
    """Call it with (bytes done, bytes in all); leave the `with` block to end the line."""

    def __init__(
        self, label: str, err: TextIO, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._label = label
        self._err = err
        self._is_live = err.isatty()
        self._clock = clock
        self._started_s = self._drawn_s = clock()
        self._first_bytes: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now_s = self._clock()
        is_first = self._first_bytes is None
        if self._first_bytes is None:
            self._first_bytes, self._started_s = done, now_s
        if not self._is_live:
            if is_first:
                self._write(f"{self._label} ({_megabytes(total)} MB)\n")
        elif is_first or done >= total or now_s - self._drawn_s >= _REDRAW_S:
            self._drawn_s = now_s
            self._write(_ERASE_LINE + self._line(done, total, now_s))

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._first_bytes is None:
            return
        if self._is_live:
            self._write("\n")
        elif error is None:
            self._write(f"{self._label}: done in {self._clock() - self._started_s:.0f} s\n")

    def _line(self, done: int, total: int, now_s: float) -> str:
        share = min(done / total, 1.0) if total else 1.0
        bar = f"{'█' * int(share * _WIDTH):░<{_WIDTH}}"
        line = f"{self._label} {bar} {share:4.0%}  {_megabytes(done)} / {_megabytes(total)} MB"
        elapsed_s = now_s - self._started_s
        bytes_per_s = (done - (self._first_bytes or 0)) / elapsed_s if elapsed_s > 0 else 0.0
        if bytes_per_s <= 0:
            return line
        left_s = round((total - done) / bytes_per_s)
        return f"{line}  {bytes_per_s / 1e6:.1f} MB/s  {left_s // 60}:{left_s % 60:02} left"

    def _write(self, text: str) -> None:
        self._err.write(text)
        self._err.flush()


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f}"
