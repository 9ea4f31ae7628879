"""The calls in an answer, wherever its text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from chatserve.engine.sequence import TokenEvent
from chatserve.models.tool_format import LLAMA_3, MISTRAL, TAGS, WORDS, ToolFormat
from chatserve.server.choices import CallingChoice, PlainChoice
from chatserve.server.deltas import Delta, TextDelta, ToolCallDelta
from chatserve.server.tool_calls import ToolCallParser

HARD = '{"a": "}\\"]</tool_call> {[\\\\", "b": [{}, [1]], "c": {"d": "<tool_call>"}}'
ONE = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TWO = f'{ONE}\n<tool_call>\n{{"name": "g-2", "arguments": {HARD}}}\n</tool_call>'

# format, the answer's text, what is text of it, the calls
ANSWERS: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (TAGS, "", "", []),
    (TAGS, "Just  text\n\n", "Just  text\n\n", []),
    (TAGS, "a < b, <tool_, <tool_cal1, </tool_call> <", "a < b, <tool_, <tool_cal1, </tool_call> <",
     []),
    (TAGS, ONE, "", [("f", '{"x": 1}')]),
    (TAGS, f"I look it up.\n\n {ONE}", "I look it up.", [("f", '{"x": 1}')]),
    (TAGS, f"<<tool_call{ONE}", "<<tool_call", [("f", '{"x": 1}')]),
    (TAGS, f" \n{TWO}", "", [("f", '{"x": 1}'), ("g-2", HARD)]),
    (replace(TAGS, follows_text=False), '{"x": "<tool_call>"}', '{"x": "<tool_call>"}', []),
    (WORDS, f"hi {ONE}{ONE}", "hi", [("f", '{"x": 1}')] * 2),
    (replace(TAGS, follows_text=False), TWO, "", [("f", '{"x": 1}'), ("g-2", HARD)]),
    (LLAMA_3, "", "", []),
    (LLAMA_3, '{"name', '{"name', []),
    (LLAMA_3, '{"nam": "f"}', '{"nam": "f"}', []),
    (LLAMA_3, ' text {"name": "f"', ' text {"name": "f"', []),
    (LLAMA_3, f'{{"name": "f", "parameters": {HARD}}}', "", [("f", HARD)]),
    (MISTRAL, ' [{"name": "f", "arguments": {}}]', "", [("f", "{}")]),
    (MISTRAL, f'[{{"name": "f", "arguments": {HARD}}}, {{"name": "g", "arguments": {{}}}}]', "",
     [("f", HARD), ("g", "{}")]),
    (MISTRAL, "[1, 2]", "[1, 2]", []),
]  # fmt: skip


def read(tool_format: ToolFormat, pieces: Iterable[str], *, is_cut: bool = False) -> list[Delta]:
    ids = map("call_{}".format, itertools.count())
    parser = ToolCallParser(tool_format, lambda: next(ids))
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return [*deltas, *parser.finish(is_cut=is_cut)]


def folded(deltas: Sequence[Delta]) -> tuple[str, list[tuple[str, str]]]:
    """The whole text and all calls; each call is told once, its index in order."""
    text, calls = "", list[tuple[str, str]]()
    for delta in deltas:
        if isinstance(delta, TextDelta):
            text += delta.text
        elif delta.call_id is not None:
            assert (delta.index, delta.call_id) == (len(calls), f"call_{len(calls)}")
            calls.append((delta.name or "", delta.arguments))
        else:
            assert delta.index == len(calls) - 1 and delta.name is None
            calls[-1] = calls[-1][0], calls[-1][1] + delta.arguments
    return text, calls


@pytest.mark.parametrize(("tool_format", "answer", "text", "calls"), ANSWERS)
def test_cut_anywhere_it_is_the_same(
    tool_format: ToolFormat, answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    assert folded(read(tool_format, [answer])) == (text, calls)
    assert folded(read(tool_format, answer)) == (text, calls)
    for place in range(len(answer)):
        assert folded(read(tool_format, [answer[:place], answer[place:]])) == (text, calls)
    for size in (2, 3, 5):
        pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
        assert folded(read(tool_format, pieces)) == (text, calls)


@pytest.mark.parametrize(("tool_format", "answer", "text", "calls"), ANSWERS)
def test_no_half_of_a_marker_is_ever_text(
    tool_format: ToolFormat, answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    parser = ToolCallParser(tool_format, lambda: "id")
    said = ""
    for sign in answer:
        said += "".join(d.text for d in parser.feed(sign) if isinstance(d, TextDelta))
        assert text.startswith(said)


@pytest.mark.parametrize(("tool_format", "answer", "text", "calls"), ANSWERS)
def test_an_answer_that_was_cut_short_tells_what_it_has(
    tool_format: ToolFormat, answer: str, text: str, calls: list[tuple[str, str]]
) -> None:
    for place in range(len(answer)):
        # the blanks before a call are no text, those at the end of an answer are
        said, begun = folded(read(tool_format, answer[:place], is_cut=True))
        assert text.startswith(said.rstrip())
        assert len(begun) <= len(calls)
        for (name, arguments), (whole_name, whole) in zip(begun, calls, strict=False):
            assert name == whole_name and whole.startswith(arguments)


def test_text_is_told_as_soon_as_it_cannot_be_a_marker() -> None:
    parser = ToolCallParser(TAGS, lambda: "id")
    assert parser.feed("a") == [TextDelta("a")]
    assert parser.feed(" ") == []
    assert parser.feed("<tool") == []
    assert parser.feed("s") == [TextDelta(" <tools")]


def test_blanks_are_not_read_again_with_each_that_follows() -> None:
    """The cost would be the square of their number."""
    parser = ToolCallParser(TAGS, lambda: "id")
    for _ in range(1000):
        assert parser.feed("\n") == []
        assert len(parser._rest) <= 1
    assert parser.feed("x") == [TextDelta("\n" * 1000 + "x")]
    assert parser.feed(" \n") == [] == parser.feed("<")
    assert parser.finish(is_cut=False) == [TextDelta(" \n<")]


def test_arguments_are_told_as_they_come() -> None:
    parser = ToolCallParser(TAGS, lambda: "id")
    parser.feed('<tool_call>\n{"name": "f", "arguments": ')
    assert parser.feed('{"x"') == [ToolCallDelta(0, arguments='{"x"')]
    assert not parser.has_tool_calls
    assert parser.feed(": 1}}") == [ToolCallDelta(0, arguments=": 1}")]
    assert parser.has_tool_calls


def pieces_of(answer: str, reason: str) -> tuple[str, str | None, list[tuple[int, str]]]:
    """Text, finish reason and calls of an answer in two events."""
    choice = CallingChoice(PlainChoice(), ToolCallParser(TAGS, lambda: "id"))
    end: object = reason
    first = choice.feed(TokenEvent("s", text=answer))
    last = choice.feed(TokenEvent("s", finish_reason=end))  # type: ignore[arg-type]  # either
    assert first.finish_reason is None
    calls = [(call.index, call.arguments) for call in (*first.tool_calls, *last.tool_calls)]
    return first.text + last.text, last.finish_reason, calls


def test_the_reason_of_an_answer_with_calls() -> None:
    # one delta for each call, although its name and its arguments came together
    assert pieces_of(TWO, "stop") == ("", "tool_calls", [(0, '{"x": 1}'), (1, HARD)])
    assert pieces_of("text <", "stop") == ("text <", "stop", [])


def test_a_call_that_was_cut_short_is_no_call() -> None:
    cut = ONE[:-18]
    assert pieces_of(cut, "length")[1:] == ("length", [(0, '{"x"')])
    assert pieces_of(ONE, "length")[1] == "length", "there may have been more"
    # by a stop text
    assert pieces_of(cut, "stop")[1:] == ("stop", [(0, '{"x"')])
    assert pieces_of("text <too", "length")[0] == "text "
