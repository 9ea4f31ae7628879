"""What a record says: status, frames with their times, how the answer ended.

Reads strictly, and anew: nothing of the product decodes here, or it could not be judged.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.faults.client import Record

_LAST = ("message_stop", "response.completed", "response.incomplete")


class Malformed(Exception):
    """What came is no HTTP, no stream of events or no JSON."""


@dataclass(frozen=True)
class Frame:
    """One event: when its last byte came, its name, and its data."""

    at: float
    event: str
    data: str

    @cached_property
    def is_done(self) -> bool:
        """Whether it says that the answer is whole."""
        return self.data == "[DONE]" or self.json.get("type") in _LAST

    @cached_property
    def error(self) -> Mapping[str, Any] | None:
        return None if self.data == "[DONE]" else _error_in(self.json)

    @cached_property
    def choices(self) -> Sequence[tuple[int, str, str | None]]:
        """Index, text and finish reason of each choice in it."""
        if self.data == "[DONE]":
            return ()
        value, delta = self.json, self.json.get("delta")
        if "choices" in value:
            return [(c["index"], _said(c), c["finish_reason"]) for c in value["choices"]]
        if value.get("type") == "content_block_delta":
            return [(0, delta["text"], None)]
        if value.get("type") == "response.output_text.delta":
            return [(0, value["delta"], None)]
        return ()

    @cached_property
    def json(self) -> Mapping[str, Any]:
        try:
            value = json.loads(self.data)
        except ValueError as error:
            raise Malformed(f"no JSON in an event: {self.data[:200]!r}") from error
        if not isinstance(value, dict):
            raise Malformed(f"no object in an event: {self.data[:200]!r}")
        return value


class Reply:
    """An answer as far as it came. Raises `Malformed`."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_whole = False
        self._ends: list[int] = []
        self._places: list[int] = []
        self.frames: list[Frame] = []
        raw = record.raw
        head, blank, rest = raw.partition(b"\r\n\r\n")
        if not blank:
            return
        self._read_head(head)
        place = len(head) + 4
        if self.headers.get("transfer-encoding") == "chunked":
            self._read_chunks(rest, place)
        else:
            self._take(rest, place)
            self.is_whole = len(rest) == int(self.headers.get("content-length", len(rest)))
        if self.is_stream:
            self._read_frames()

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @cached_property
    def error(self) -> Mapping[str, Any] | None:
        """The error that it ends with, in whichever form: of the body, or of the last frame."""
        if self.status is None or not self.is_whole:
            return None
        if not self.is_stream:
            return _error_in(self.json) if self.status >= 400 else None
        return self.frames[-1].error if self.frames else None

    @property
    def is_done(self) -> bool:
        return bool(self.frames) and self.frames[-1].is_done

    @cached_property
    def texts(self) -> dict[int, str]:
        """What each choice has said, as far as it came."""
        texts: dict[int, str] = {}
        if not self.is_stream:
            if self.status == 200 and self.is_whole:
                texts = {i: _said(each) for i, each in enumerate(_parts(self.json))}
            return texts
        for frame in self.frames:
            for index, text, _ in frame.choices:
                texts[index] = texts.get(index, "") + text
        return texts

    @cached_property
    def json(self) -> Mapping[str, Any]:
        """Of an answer that is no stream."""
        try:
            value = json.loads(self.body)
        except ValueError as error:
            raise Malformed(f"no JSON: {self.body[:200]!r}") from error
        assert isinstance(value, dict)
        return value

    def _read_head(self, head: bytes) -> None:
        lines = head.split(b"\r\n")
        words = lines[0].split(b" ")
        if len(words) < 2 or words[0] != b"HTTP/1.1" or not words[1].isdigit():
            raise Malformed(f"no answer of HTTP: {lines[0][:100]!r}")
        self.status = int(words[1])
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if not colon:
                raise Malformed(f"no header: {line[:100]!r}")
            self.headers[name.decode().lower()] = value.strip().decode("latin-1")

    def _read_chunks(self, rest: bytes, place: int) -> None:
        start = 0
        while (line_end := rest.find(b"\r\n", start)) >= 0:
            try:
                size = int(rest[start:line_end], 16)
            except ValueError:
                raise Malformed(f"no size of a chunk: {rest[start:line_end][:50]!r}") from None
            data_start, data_end = line_end + 2, line_end + 2 + size
            if len(rest) < data_end + 2:
                # cut inside: what there is of it was never confirmed
                self._take(rest[data_start:data_end], place + data_start)
                return
            if rest[data_end : data_end + 2] != b"\r\n":
                raise Malformed("a chunk is longer than its size")
            if size == 0:
                self.is_whole = True
                if len(rest) > data_end + 2:
                    raise Malformed(f"bytes behind the end: {rest[data_end + 2 :][:50]!r}")
                return
            self._take(rest[data_start:data_end], place + data_start)
            start = data_end + 2

    def _take(self, data: bytes, place: int) -> None:
        """Bytes of the body, and where they stood in what came."""
        self.body += data
        self._ends.append(len(self.body))
        self._places.append(place + len(data))

    @cached_property
    def _piece_ends(self) -> list[int]:
        ends, total = [], 0
        for _, piece in self.record.pieces:
            total += len(piece)
            ends.append(total)
        return ends

    def _time_of(self, body_end: int) -> float:
        """When the byte before this place of the body came."""
        i = bisect_left(self._ends, body_end)
        end = self._places[i] - (self._ends[i] - body_end)
        return self.record.pieces[bisect_left(self._piece_ends, end)][0]

    def _read_frames(self) -> None:
        position = 0
        while (end := self.body.find(b"\n\n", position)) >= 0:
            block, position = self.body[position:end], end + 2
            frame = _frame(block, self._time_of(position))
            if frame is not None:
                self.frames.append(frame)
        if self.is_whole and position != len(self.body):
            raise Malformed(f"the end of the body is no frame: {self.body[position:][:100]!r}")


def _frame(block: bytes, at: float) -> Frame | None:
    """None for a comment."""
    try:
        lines = block.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise Malformed(f"a frame is no UTF-8: {block[:200]!r}") from error
    event, data = "message", []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise Malformed(f"a line of a frame has no colon: {line[:100]!r}")
        if name == "data":
            data.append(value.removeprefix(" "))
        elif name == "event":
            event = value.removeprefix(" ")
        elif name:
            raise Malformed(f"a field that we never send: {line[:100]!r}")
    return Frame(at, event, "\n".join(data)) if data else None


def _parts(value: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Of a whole answer of any API: what has the text of its choices."""
    if "choices" in value:
        return list(value["choices"])
    if "output" in value:
        return [part for item in value["output"] for part in item.get("content", ())]
    return list(value.get("content", ()))


def _said(part: Mapping[str, Any]) -> str:
    said = part.get("text") or (part.get("delta") or part.get("message") or {}).get("content")
    return said or ""


def _error_in(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    error = value.get("error")
    if isinstance(error, dict):
        return error
    # of a stream of /v1/responses
    if value.get("type") == "response.failed":
        failed = value["response"]["error"]
        return failed if isinstance(failed, dict) else {}
    return value if value.get("type") == "error" else None
