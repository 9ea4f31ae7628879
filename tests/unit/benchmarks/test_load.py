"""What the load client reads out of a stream, however the bytes were cut on the way."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import Answer, RequestFailed, read_answer, streams_figures

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TEXTS = ("a", "b", "é", "d")


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


STREAM = [event({"choices": [{"index": 0, "text": text}]}) for text in TEXTS]
USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
WHOLE = HEAD + chunked(*STREAM, USAGE, b"data: [DONE]\n\n")


@given(st.lists(st.integers(1, len(WHOLE) - 1), max_size=12, unique=True))
def test_a_stream_reads_the_same_however_it_was_cut(cuts: list[int]) -> None:
    ends = [*sorted(cuts), len(WHOLE)]
    starts = [0, *ends[:-1]]
    pieces = [
        (float(number), WHOLE[start:end])
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    answer = read_answer(-1.0, pieces)
    assert (answer.num_prompt_tokens, answer.num_tokens) == (7, 5)
    # each text counts from the piece that brought the end of its chunk
    position, expected = len(HEAD), []
    for part in STREAM:
        position += len(b"%x\r\n" % len(part)) + len(part)
        expected.append(float(next(i for i, end in enumerate(ends) if end >= position)))
        position += len(b"\r\n")
    assert list(answer.times) == expected


def test_a_stream_without_usage_counts_its_texts() -> None:
    answer = read_answer(0.0, [(1.0, HEAD + chunked(*STREAM))])
    assert answer.num_tokens == len(TEXTS)


def test_chat_deltas_and_windows_line_ends_are_read() -> None:
    chat = b'data: {"choices": [{"delta": {"content": "x"}}]}\r\n\r\n'
    body = b"HTTP/1.1 200 OK\r\n\r\n" + chat + chat
    assert read_answer(0.0, [(1.0, body)]).times == (1.0, 1.0)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'HTTP/1.1 429 Too Many Requests\r\n\r\n{"error": {"message": "busy"}}',
        HEAD + chunked(STREAM[0], event({"error": {"message": "the model is gone"}})),
    ],
)
def test_a_failed_request_is_no_answer(raw: bytes) -> None:
    with pytest.raises(RequestFailed):
        read_answer(0.0, [(1.0, raw)])


def test_speed_counts_the_time_in_which_all_streams_run() -> None:
    early = Answer(0.0, (1.0, 2.0, 3.0, 4.0), 1, 4)
    late = Answer(0.0, (2.0, 3.0, 4.0, 5.0), 1, 8)  # two tokens a piece
    figures = streams_figures([early, late])
    assert figures["tokens_per_s"] == pytest.approx(12 / 5)
    assert figures["first_token_median_ms"] == 2000
    # from 2.0 to 4.0: two pieces of one token and two of two
    assert figures["together_tokens_per_s"] == pytest.approx(6 / 2)


def test_streams_without_text_are_no_figure() -> None:
    with pytest.raises(RequestFailed):
        streams_figures([Answer(0.0, (), 1, 0)])
