"""A worker's stream, cut where the client may get it: in whole frames, or in whole units.

A unit is some frames and a block that says what they stand for, a comment for this controller alone
(`chatserve/server/journal.py` writes them). Frames go on when their block is there, without it, so
what is kept of a stream is always exactly what its client has got. Of a very long frame not all is
held. Knows no socket and no JSON.
"""

from __future__ import annotations

from typing import Protocol

from chatserve.server.stream_memory import StreamMemory

FRAME_ENDS = (b"\n\n", b"\r\n\r\n")
MAX_HELD_BYTES = 1024 * 1024
# of an end of a frame that may be cut
_MAX_CUT = max(map(len, FRAME_ENDS)) - 1
_END = b"\n\n"
_BLOCK = b"\n\n:"
_COLON, _SPACE = b": "


class Reader(Protocol):
    """Takes a stream as it comes."""

    is_inside: bool
    """Whether the last that went on was a piece of a frame."""

    def feed(self, chunk: bytes) -> bytes:
        """What may go on."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether all is there, if the stream ends now."""
        ...


class FrameReader:
    """The same bytes, cut only where a frame ends; a frame that is never finished is dropped.

    Of a frame that is larger than what is held here, the beginning goes on before its end is there.
    """

    is_whole = True

    def __init__(self) -> None:
        self.is_inside = False
        self._held = bytearray()

    def feed(self, chunk: bytes) -> bytes:
        held = self._held
        if not held and chunk.endswith(FRAME_ENDS):
            self.is_inside = False
            return chunk
        # what was held before has no end in it
        start = max(0, len(held) - _MAX_CUT)
        held += chunk
        end = max(_end_of(mark, held, start) for mark in FRAME_ENDS)
        if end:
            self.is_inside = False
        elif len(held) > MAX_HELD_BYTES:
            self.is_inside = True
            end = len(held) - _MAX_CUT
        data = bytes(held[:end])
        del held[:end]
        return data


def _end_of(mark: bytes, data: bytearray, start: int) -> int:
    """Where the last `mark` ends, 0 if there is none."""
    place = data.rfind(mark, start)
    return 0 if place < 0 else place + len(mark)


class UnitReader:
    """The frames of a stream of units; `memory` keeps their blocks.

    `failure` is why this worker cannot go on, once it has said so. Without a block at its end
    (`is_whole`) a stream has been cut, however it ended.
    """

    def __init__(self, memory: StreamMemory) -> None:
        self.is_inside = False
        self.is_whole = False
        self.failure: bytes | None = None
        self._memory = memory
        self._held = bytearray()
        # where the block or frame begins whose end is not there yet
        self._begin = 0

    def feed(self, chunk: bytes) -> bytes:
        if not self._held:
            # nearly always a chunk is one unit of one token: a frame and a block, which has no line
            # break inside. Of the two ways to see that there is only one block the first is quick
            place = chunk.rfind(b"\n", 0, -2) + 1
            if (
                chunk.startswith(b":t", place)
                and chunk.endswith(_END)
                and (chunk.find(b"\n") == place - 2 or chunk.find(_BLOCK) == place - 2)
                and chunk[0] != _COLON
            ):
                self._memory.keep(chunk[place:])
                return chunk[:place]
        return self._feed_any(chunk)

    def _feed_any(self, chunk: bytes) -> bytes:
        held, begin = self._held, self._begin
        search = max(begin, len(held) - 1)
        held += chunk
        passed = bytearray()
        num_passed = 0  # or dropped
        while (end := held.find(_END, search)) >= 0:
            search = end = end + 2
            if self.is_inside:
                self.is_inside = False
                passed += held[num_passed:end]
                num_passed = end
            elif held[begin] == _COLON and held[begin + 1] != _SPACE:
                passed += held[num_passed:begin]
                num_passed = end
                self._take(bytes(held[begin:end]))
            elif not self._memory.is_kept:
                # who will not go on elsewhere need not know how far it came
                passed += held[num_passed:end]
                num_passed = end
            elif held[begin] == _COLON and begin == num_passed:
                # a comment that belongs to no unit
                passed += held[begin:end]
                num_passed = end
            begin = end
        if len(held) - num_passed > MAX_HELD_BYTES:
            self._memory.forget()
            self.is_inside = True
            passed += held[num_passed : len(held) - 1]
            num_passed = begin = len(held) - 1
        del held[:num_passed]
        self._begin = begin - num_passed
        return bytes(passed)

    def _take(self, block: bytes) -> None:
        kind = block[1:2]
        if kind in (b"t", b"f"):
            self._memory.keep(block)
        elif kind == b"s":
            self._memory.begin(block)
        elif kind == b"e":
            self.is_whole = True
        elif kind == b"x":
            self.failure = block[3:-2]
