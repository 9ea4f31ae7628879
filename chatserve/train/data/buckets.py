"""Records on disk, in buckets by their question: what is too much for memory, and is unsorted.

Blocks are appended; whoever keeps the lengths can go back to them. Knows no format of a source.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from chatserve.train.data.records import Record, decode, encode

MAX_BUFFER_BYTES = 8 * 1024 * 1024
BUCKET_BYTES = 8 * 1024 * 1024
MAX_BUCKETS = 4096
_FAST = 1
_HEAD = struct.Struct("<I")


class Buckets:
    """`count` files in `folder`, whose lengths are `lengths`; the rest of a file is cut off."""

    def __init__(self, folder: Path, count: int, lengths: Sequence[int] = ()) -> None:
        self._folder = folder
        self._buffers: list[list[bytes]] = [[] for _ in range(count)]
        self._buffered_bytes = 0
        self.lengths = [*lengths] or [0] * count

    @property
    def is_full(self) -> bool:
        return self._buffered_bytes >= MAX_BUFFER_BYTES

    def cut(self) -> bool:
        """Cut every file to its length; False where one is shorter: then nothing can go on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for bucket, length in enumerate(self.lengths):
            path = bucket_path(self._folder, bucket)
            if not path.exists():
                if length:
                    return False
            elif path.stat().st_size < length:
                return False
            else:
                os.truncate(path, length)
        return True

    def add(self, record: Record, place: int) -> None:
        """Keep a record whose question has this place below 2**64."""
        line = encode(record)
        self._buffers[place * len(self._buffers) >> 64].append(line)
        self._buffered_bytes += len(line)

    def flush(self) -> None:
        """Append what is in memory. Raises `OSError`, after which only `cut` brings order."""
        for bucket, lines in enumerate(self._buffers):
            if lines:
                block = zlib.compress(b"\n".join(lines), _FAST)
                with bucket_path(self._folder, bucket).open("ab") as file:
                    file.write(_HEAD.pack(len(block)) + block)
                self.lengths[bucket] += _HEAD.size + len(block)
                lines.clear()
        self._buffered_bytes = 0


def bucket_path(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket:05}"


def num_buckets(source_bytes: int) -> int:
    """So many that one fits into memory easily."""
    return min(max(-(-source_bytes // BUCKET_BYTES), 1), MAX_BUCKETS)


def read_bucket(path: Path) -> Iterator[Record]:
    """The records in the order in which they came; none where the file is not there."""
    if not path.exists():
        return
    with path.open("rb") as file:
        while head := file.read(_HEAD.size):
            (length,) = _HEAD.unpack(head)
            yield from decode(zlib.decompress(file.read(length)).split(b"\n"))
