"""Server-sent events: frames to bytes, bytes to events.

Knows bytes and events only: no socket, no JSON, no OpenAI. Follows the WHATWG HTML standard, §9.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chatserve.errors import BadStream

DONE = "[DONE]"
"""The data of the event that says an OpenAI stream is complete."""

MAX_EVENT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class ServerSentEvent:
    """One event as a browser would dispatch it; `event` is "message" unless named."""

    event: str
    data: str


def encode_event(data: bytes | str, event: str | None = None) -> bytes:
    """One frame; line breaks inside `data` become further data lines, as the standard has it."""
    payload = data.encode() if isinstance(data, str) else data
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    if b"\n" not in payload and b"\r" not in payload:
        return head + b"data: " + payload + b"\n\n"
    lines = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return head + b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"


def encode_comment(text: str) -> bytes:
    """A frame that every reader skips: it keeps connections and proxies awake."""
    return b": " + " ".join(text.splitlines()).encode() + b"\n\n"


def encode_place(place: int) -> bytes:
    """The place of a stream that waits for its turn; 1 is next."""
    return encode_comment(f"queue {place}")


def read_place(comment: str) -> int | None:
    """The place that a comment tells, if it is one of those."""
    word, _, number = comment.partition(" ")
    is_place = word == "queue" and number.isascii() and number.isdigit() and len(number) < 10
    return int(number) if is_place else None


def encode_loading(loaded_bytes: int, total_bytes: int) -> bytes:
    """How far the model is that a stream waits for; 0 of 0 where nobody knows yet."""
    return encode_comment(f"loading {loaded_bytes} {total_bytes}")


def read_loading(comment: str) -> tuple[int, int] | None:
    """What a comment tells of a model that is being loaded, if it is one of those."""
    word, _, rest = comment.partition(" ")
    numbers = rest.split(" ")
    are_numbers = all(each.isascii() and each.isdigit() and len(each) < 20 for each in numbers)
    if word != "loading" or len(numbers) != 2 or not are_numbers:
        return None
    return int(numbers[0]), int(numbers[1])


PING = encode_comment("ping")
DONE_FRAME = encode_event(DONE)


class SSEDecoder:
    """Turns the bytes of a stream, cut anywhere, into events.

    LF, CR and CRLF end a line; `id` and `retry` are skipped, and comments unless somebody wants
    them; an event that the end of the stream cuts off is never seen. Cost is linear in the bytes
    fed.
    """

    def __init__(
        self,
        *,
        max_event_bytes: int = MAX_EVENT_BYTES,
        on_comment: Callable[[str], object] | None = None,
    ) -> None:
        self._max_event_bytes = max_event_bytes
        self._on_comment = on_comment
        self._line = bytearray()
        self._skip_newline = False
        self._at_start = True
        self._event = ""
        self._data: list[bytes] = []
        self._num_data_bytes = 0

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes of the stream and return the events that they complete.

        Raises `BadStream` when a line or an event grows over the limit.
        """
        if not chunk:
            return []
        if self._skip_newline:
            # a chunk ended in CR: the LF that may follow belongs to the same line end
            chunk = chunk.removeprefix(b"\n")
        events = []
        for piece in chunk.splitlines(keepends=True):
            is_complete = piece.endswith((b"\n", b"\r"))
            self._line += piece.rstrip(b"\r\n") if is_complete else piece
            if len(self._line) > self._max_event_bytes:
                raise BadStream(f"a line of the stream is over {self._max_event_bytes} bytes")
            if not is_complete:
                break
            line = bytes(self._line)
            self._line.clear()
            if (event := self._take_line(line)) is not None:
                events.append(event)
        self._skip_newline = chunk.endswith(b"\r")
        return events

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._num_data_bytes += len(value)
            if self._num_data_bytes > self._max_event_bytes:
                raise BadStream(f"an event of the stream is over {self._max_event_bytes} bytes")
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif not name and self._on_comment is not None:
            self._on_comment(value.decode("utf-8", "replace"))
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        event, data = self._event or "message", self._data
        self._event, self._data, self._num_data_bytes = "", [], 0
        if not data:
            return None
        return ServerSentEvent(event, b"\n".join(data).decode("utf-8", "replace"))
