"""Lines of a huge file, of which only a bounded part is in memory. Knows no format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

MAX_LINE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Line:
    """`text` is None where the line is longer than `MAX_LINE_BYTES`."""

    number: int  # from 1
    end: int  # bytes, where the next line begins
    text: bytes | None


def lines_from(file: BinaryIO, offset: int, number: int) -> Iterator[Line]:
    """The lines from byte `offset` on, before which there are `number` lines."""
    file.seek(offset)
    end = offset
    while part := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        end += len(part)
        text: bytes | None = part
        if len(part) > MAX_LINE_BYTES:
            text = None
            while part and not part.endswith(b"\n"):
                part = file.readline(MAX_LINE_BYTES)
                end += len(part)
        yield Line(number, end, text)
