"""Frames round-trip at every cut; the WHATWG examples; limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.errors import BadStream
from chatserve.protocol.sse import (
    DONE_FRAME,
    PING,
    ServerSentEvent,
    SSEDecoder,
    encode_comment,
    encode_event,
    encode_loading,
    encode_place,
    read_loading,
    read_place,
)


def decode(*chunks: bytes) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def message(data: str, event: str = "message") -> ServerSentEvent:
    return ServerSentEvent(event, data)


def test_frame_is_one_data_line() -> None:
    assert encode_event(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert DONE_FRAME == b"data: [DONE]\n\n"


def test_line_breaks_become_data_lines() -> None:
    assert encode_event("a\r\nb\nc\rd") == b"data: a\ndata: b\ndata: c\ndata: d\n\n"


def test_named_event() -> None:
    assert encode_event("x", "message_start") == b"event: message_start\ndata: x\n\n"
    assert decode(encode_event("x", "message_start")) == [message("x", "message_start")]


def test_comments_are_skipped_and_cannot_smuggle_lines() -> None:
    assert PING == b": ping\n\n"
    assert encode_comment("a\ndata: b") == b": a data: b\n\n"
    assert decode(PING, encode_event("x"), PING) == [message("x")]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
        (b": test\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third", ["first", "second"]),
        (b"data\n\ndata\ndata\n\ndata:", ["", "\n"]),
        (b"data:test\n\ndata: test\n\n", ["test", "test"]),
        (b"\xef\xbb\xbfdata: bom\n\n", ["bom"]),
        (b"event: lonely\n\ndata: x\n\n", ["x"]),
        (b"retry: 10\nfoo: bar\ndata: x\n\n", ["x"]),
        (b"data: \xff\n\n", ["\ufffd"]),
    ],
)
def test_examples_of_the_standard(stream: bytes, expected: list[str]) -> None:
    assert decode(stream) == [message(data) for data in expected]


@pytest.mark.parametrize("newline", [b"\n", b"\r", b"\r\n"])
def test_every_cut_gives_the_same_events(newline: bytes) -> None:
    stream = "data: 你好 🙂\n\n: ping\n\nevent: e\ndata: a\ndata: b\n\ndata: [DONE]\n\n".encode()
    stream = stream.replace(b"\n", newline)
    expected = [message("你好 🙂"), message("a\nb", "e"), message("[DONE]")]
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == expected
    for cut in range(len(stream)):
        assert decode(stream[:cut], b"", stream[cut:]) == expected


@given(st.lists(st.text()), st.integers(1, 40))
def test_round_trip(texts: list[str], size: int) -> None:
    stream = b"".join(encode_event(text) for text in texts)
    chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
    normalised = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
    assert decode(*chunks) == [message(text) for text in normalised]


def test_endless_line_is_refused() -> None:
    decoder = SSEDecoder(max_event_bytes=100)
    decoder.feed(b"data: " + b"x" * 90)
    with pytest.raises(BadStream, match="100 bytes"):
        decoder.feed(b"x" * 10)


def test_endless_event_is_refused() -> None:
    decoder = SSEDecoder(max_event_bytes=100)
    with pytest.raises(BadStream, match="100 bytes"):
        for _ in range(20):
            decoder.feed(b"data: 0123456789\n")


def test_limit_counts_per_event_not_per_stream() -> None:
    decoder = SSEDecoder(max_event_bytes=100)
    events = [event for _ in range(20) for event in decoder.feed(b"data: 0123456789\n\n")]
    assert len(events) == 20


def test_a_long_line_in_one_byte_cuts() -> None:
    decoder = SSEDecoder()
    for _ in range(200_000):
        decoder.feed(b"x")
    assert decoder.feed(b"\n\n") == []


@pytest.mark.parametrize("cut", range(1, 12))
def test_comments_go_to_who_wants_them(cut: int) -> None:
    data = b": ping\n\n:none\n\ndata: a\n:\n: queue 3\n\n"
    comments: list[str] = []
    decoder = SSEDecoder(on_comment=comments.append)
    events = [e for i in range(0, len(data), cut) for e in decoder.feed(data[i : i + cut])]
    assert [each.data for each in events] == ["a"]
    assert comments == ["ping", "none", "", "queue 3"]


@pytest.mark.parametrize(
    ("comment", "place"),
    [
        ("queue 3", 3), ("queue 64", 64), ("queue", None), ("queue ", None), ("queue x", None),
        ("queue -1", None), ("queue ٣", None), ("queue 9999999999", None), ("ping", None),
        ("queue 3 4", None), ("", None),
    ],
)  # fmt: skip
def test_places_in_comments(comment: str, place: int | None) -> None:
    assert read_place(comment) == place


def test_a_place_is_a_comment_with_a_space() -> None:
    assert encode_place(3) == b": queue 3\n\n"


@pytest.mark.parametrize(
    ("comment", "loading"),
    [
        ("loading 25 100", (25, 100)), ("loading 0 0", (0, 0)), ("loading 25", None),
        ("loading 25 100 3", None), ("loading -1 100", None), ("loading a b", None),
        ("loading  25", None), ("queue 3", None), ("loading " + "9" * 20 + " 1", None), ("", None),
    ],
)  # fmt: skip
def test_how_far_a_model_is_in_comments(comment: str, loading: tuple[int, int] | None) -> None:
    assert read_loading(comment) == loading


def test_what_is_written_of_a_load_is_read() -> None:
    comments: list[str] = []
    SSEDecoder(on_comment=comments.append).feed(encode_loading(25, 100))
    assert [read_loading(each) for each in comments] == [(25, 100)]
