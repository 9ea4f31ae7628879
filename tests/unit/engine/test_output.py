"""Streaming text is exact: whole characters, nothing of a stop string, linear work."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.output import Detokenizer, OutputText, ShownTokenBytes, StopMatcher


class Bytes:
    """A tokenizer whose token n is the n-th of a list of byte strings."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.num_calls = 0

    def token_bytes(self, token_id: int) -> bytes:
        self.num_calls += 1
        return self.pieces[token_id]


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return [*pieces, data[start:]]


@given(st.text(), st.lists(st.integers(0, 5), max_size=60))
def test_any_text_cut_anywhere_comes_out_whole_and_without_replacement(
    text: str, sizes: list[int]
) -> None:
    pieces = cut(text.encode(), sizes)
    detokenizer = Detokenizer(Bytes(*pieces), strip_leading_space=False)
    parts = [detokenizer.add(index) for index in range(len(pieces))]
    assert "".join(parts) == text
    assert all(text.count("\ufffd") >= part.count("\ufffd") for part in parts)


def test_special_tokens_are_shown_where_that_is_wanted() -> None:
    tokens = ShownTokenBytes(Bytes(b"a", b"", b""), {1: "[CALL]"})
    output = OutputText(tokens, ("]b",))
    assert [output.add(index)[0] for index in (0, 1, 2, 0)] == ["a", "[CALL", "", "]a"]


def test_half_an_emoji_is_withheld_until_it_is_whole() -> None:
    emoji = "🦙".encode()
    detokenizer = Detokenizer(Bytes(emoji[:1], emoji[1:3], emoji[3:]), strip_leading_space=False)
    assert [detokenizer.add(index) for index in range(3)] == ["", "", "🦙"]


def test_half_an_emoji_at_the_end_is_dropped() -> None:
    output = OutputText(Bytes(b"ok ", "🦙".encode()[:2]), ())
    assert [output.add(0)[0], output.add(1)[0], output.finish()] == ["ok ", "", ""]


def test_bytes_that_are_no_character_show_as_replacement() -> None:
    detokenizer = Detokenizer(Bytes(b"a\xff", b"b"), strip_leading_space=False)
    assert detokenizer.add(0) + detokenizer.add(1) == "a\ufffdb"


def test_only_the_first_leading_space_is_stripped() -> None:
    output = OutputText(Bytes(b"", b"  a", b" b"), (), strip_leading_space=True)
    assert [output.add(index)[0] for index in range(3)] == ["", " a", " b"]


def test_stop_string_split_across_tokens_is_not_shown() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.add("a#") == ("a", False)
    assert matcher.add("#") == ("", False)
    assert matcher.add("# Human") == ("", True)


def test_what_only_looked_like_a_stop_string_is_shown_later() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.add("a##") == ("a", False)
    assert matcher.add("b#") == ("##b", False)
    assert matcher.finish() == "#"


def test_the_first_of_several_stop_strings_wins() -> None:
    assert StopMatcher(["world", "lo"]).add("hello world") == ("hel", True)


@given(st.text("ab#", max_size=40), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=4),
       st.lists(st.integers(1, 4), max_size=20))  # fmt: skip
def test_streamed_text_equals_the_text_cut_at_the_first_match(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for piece in (part.decode() for part in cut(text.encode(), sizes)):
        safe, stopped = matcher.add(piece)
        shown += safe
        if stopped:
            break
    if not stopped:
        shown += matcher.finish()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    # an earlier match may complete in the same piece as a longer one that began before it
    candidates = {text[:end] for end in ends} if stopped else {text}
    assert shown in candidates


def test_each_token_is_decoded_once() -> None:
    tokenizer = Bytes(b"word ")
    output = OutputText(tokenizer, ("never",))
    for _ in range(1000):
        output.add(0)
    assert tokenizer.num_calls == 1000


def test_a_hidden_token_gives_no_text() -> None:
    assert OutputText(Bytes(b"</s>"), ()).add(0, is_hidden=True) == ("", False)
