"""Newer models' forms of calls: what their grammar lets through is read as what the schema says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from chatserve.errors import UnsupportedParameter
from chatserve.grammar.matcher import Matcher, pristine_matcher
from chatserve.grammar.source import to_llguidance
from chatserve.grammar.vocabulary import Vocabulary
from chatserve.models.tool_format import (
    DEEPSEEK,
    DEEPSEEK_FENCED,
    GLM,
    GLM_DENSE,
    MISTRAL_ARGS,
    MISTRAL_IDS,
    NEMOTRON,
    QWEN_XML,
    ToolFormat,
)
from chatserve.protocol.chat import ChatRequest, read_chat
from chatserve.server.tagged_arguments import argument_kinds
from chatserve.server.tool_calls import ToolCallParser
from chatserve.server.tool_grammar import tool_grammar
from tests.grammars import BYTES, Language
from tests.unit.server.test_tool_calls import folded

COLOURS = ["red", "dark red"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "?"},
        "days": {"type": "integer", "minimum": 1},
        "colour": {"$ref": "#/$defs/colour"},
        "code": {"type": ["string", "null"], "maxLength": 2},
        "more": {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]},
        "when": {"type": "string", "format": "date"},
        "on": {"type": "boolean"},
        "or": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    },
    "required": ["city"],
    "$defs": {"colour": {"enum": COLOURS}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "g-2"}},
]
TAGGED = [QWEN_XML, GLM, GLM_DENSE]
WHOLE = [MISTRAL_ARGS, MISTRAL_IDS, DEEPSEEK, DEEPSEEK_FENCED, NEMOTRON]
ALL = pytest.mark.parametrize("tool_format", TAGGED + WHOLE, ids=lambda f: f.name)
TAGS = pytest.mark.parametrize("tool_format", TAGGED, ids=lambda f: f.name)
# what is written, and what it says
HARD = 'a "b"\\ \n\n<x> </paramete </arg_valu 🙂\x01'
VALUES: list[tuple[str, str, Any]] = [
    ("city", "Paris", "Paris"), ("city", "", ""), ("city", "null", "null"), ("city", HARD, HARD),
    ("city", "\n", "\n"), ("city", '"Paris"', '"Paris"'), ("city", "12", "12"),
    ("days", "3", 3), ("colour", "red", "red"), ("colour", "dark red", "dark red"),
    ("code", "", ""), ("code", "n", "n"), ("code", "null", None), ("code", "ab", "ab"),
    ("more", '{"a": ["</parameter>", "</arg_value>", {"b": "\\"<"}, 1]}',
     {"a": ["</parameter>", "</arg_value>", {"b": '"<'}, 1]}),
    ("when", '"2024-02-29"', "2024-02-29"), ("on", "true", True), ("or", '"x"', "x"),
    ("or", "5", 5),
]  # fmt: skip
WRONG = [
    ("days", "0"), ("days", '"3"'), ("days", "three"), ("colour", "green"), ("colour", '"red"'),
    ("code", "abc"), ("code", "nul"), ("more", "{}"), ("when", "2024-02-29"),
    ("when", '"2023-02-29"'), ("on", "yes"), ("or", "x"), ("nothing", "1"),
]  # fmt: skip
ENDS = {QWEN_XML: "</parameter>", GLM: "</arg_value>", GLM_DENSE: "</arg_value>"}


def request(tools: list[dict[str, Any]] = TOOLS, **fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "x"}]
    return read_chat({"model": "m", "messages": messages, "tools": tools, **fields})


def language(tool_format: ToolFormat, **fields: Any) -> Language:
    spec = tool_grammar(request(**fields), tool_format)
    return Language(spec.kind, spec.source)


def argued(tool_format: ToolFormat, arguments: list[tuple[str, str]]) -> str:
    tags = tool_format.tags
    assert tags is not None
    return "".join(
        f"{tags.before_key}{key}{tags.after_key}{value}{tags.after_value}"
        for key, value in arguments
    )


def given_to(tool_format: ToolFormat, arguments: list[tuple[str, str]]) -> str:
    """Arguments that are texts."""
    return argued(tool_format, arguments) if tool_format.tags else json.dumps(dict(arguments))


def called(tool_format: ToolFormat, *calls: tuple[str, str]) -> str:
    """Calls as the model writes them, of names and arguments."""
    form = tool_format
    texts = [
        name + form.before_arguments.replace("\0" * 9, "abc123XYZ") + arguments + form.after_call
        for name, arguments in calls
    ]
    return form.marker + form.before_name + form.between.join(texts) + form.end


def read(tool_format: ToolFormat, answer: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    ids = iter(map("call_{}".format, range(20)))
    kinds = argument_kinds(request().tools, tool_format)
    parser = ToolCallParser(tool_format, lambda: next(ids), kinds=kinds)
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    assert parser.has_tool_calls == (tool_format.marker in answer)
    return folded([*deltas, *parser.finish(is_cut=False)])


CITY = ("city", "Bern")


@TAGS
def test_every_value_is_what_its_schema_says(tool_format: ToolFormat) -> None:
    answers = language(tool_format)
    for key, written, meant in VALUES:
        arguments = [(key, written)] if key == "city" else [CITY, (key, written)]
        answer = called(tool_format, ("f", argued(tool_format, arguments)))
        assert answer in answers, (key, written)
        want = {key: meant} if key == "city" else {"city": "Bern", key: meant}
        Draft202012Validator(SCHEMA).validate(want)
        for size in (1, 2, 3, 7, len(answer)):
            text, [(name, told)] = read(tool_format, f"Well. {answer}", size)
            assert (text, name, json.loads(told)) == ("Well.", "f", want)


@TAGS
def test_nothing_else_is_let_through(tool_format: ToolFormat) -> None:
    answers = language(tool_format)
    for key, written in WRONG:
        answer = called(tool_format, ("f", argued(tool_format, [CITY, (key, written)])))
        assert answer not in answers, (key, written)
    assert called(tool_format, ("f", "")) not in answers, "city is required"
    inside = argued(tool_format, [("city", f"a{ENDS[tool_format]}b")])
    assert called(tool_format, ("f", inside)) not in answers
    twice = argued(tool_format, [CITY, CITY])
    assert called(tool_format, ("f", twice)) not in answers


@ALL
def test_text_and_calls(tool_format: ToolFormat) -> None:
    given, none = given_to(tool_format, [CITY]), given_to(tool_format, [])
    one, last = called(tool_format, ("f", given)), called(tool_format, ("g-2", none))
    two = called(tool_format, ("f", given), ("g-2", none))
    f, g = ("f", {"city": "Bern"}), ("g-2", {})
    expected: list[tuple[str, str, list[tuple[str, dict[str, str]]]]] = [
        ("", "", []), ("hi <tool", "hi <tool", []), ("[TOOL", "[TOOL", []), (one, "", [f]),
        (f"hi {one}", "hi", [f]), (two, "", [f, g]), (last, "", [g]),
    ]  # fmt: skip
    answers = language(tool_format)
    for answer, text, calls in expected:
        assert answer in answers
        for size in (1, 2, 5, 1000):
            said, made = read(tool_format, answer, size)
            assert (said, [(name, json.loads(told)) for name, told in made]) == (text, calls)
    for wrong in (called(tool_format, ("h", given)), one[:-1], f"{one} hi"):
        assert wrong not in answers


@ALL
def test_calls_that_must_be(tool_format: ToolFormat) -> None:
    given, none = given_to(tool_format, [CITY]), given_to(tool_format, [])
    one, last = called(tool_format, ("f", given)), called(tool_format, ("g-2", none))
    two = called(tool_format, ("f", given), ("g-2", none))
    required = language(tool_format, tool_choice="required")
    assert one in required and two in required and "hi" not in required and "" not in required
    single = language(tool_format, parallel_tool_calls=False)
    assert one in single and two not in single
    named = language(tool_format, tool_choice={"type": "function", "function": {"name": "g-2"}})
    assert one not in named and last in named


@ALL
def test_what_is_told_of_a_cut_call_begins_the_whole(tool_format: ToolFormat) -> None:
    given = given_to(tool_format, [("city", "a<b\n"), ("colour", "red"), ("code", "nu")])
    answer = called(tool_format, ("f", given), ("g-2", given_to(tool_format, [])))
    _, whole = read(tool_format, answer, 1000)
    for place in range(len(answer)):
        parser = ToolCallParser(
            tool_format, lambda: "call_0", kinds=argument_kinds(request().tools, tool_format)
        )
        deltas = [*parser.feed(answer[:place]), *parser.finish(is_cut=True)]
        told: dict[int, str] = {}
        for delta in deltas:
            told[delta.index] = told.get(delta.index, "") + delta.arguments  # type: ignore[union-attr]
        for index, arguments in told.items():
            assert whole[index][1].startswith(arguments)


@pytest.mark.parametrize(
    ("schema", "where", "why"),
    [
        ({"anyOf": [{"required": ["a"]}]}, ".anyOf", "cannot be kept"),
        ({"minProperties": 1}, ".minProperties", "cannot be kept"),
        ({"properties": {"a": {"$ref": "#"}}}, ".$ref", "points at something else"),
        ({"properties": {"a>": {}}}, ".properties.a>", "has a name that cannot be written"),
    ],
)
def test_what_tags_cannot_say_is_refused_by_name(
    schema: dict[str, Any], where: str, why: str
) -> None:
    tools = [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(UnsupportedParameter, match=why) as caught:
        tool_grammar(request(tools), QWEN_XML)
    assert caught.value.param == f"tools[1].function.parameters{where}"
    tool_grammar(request(tools), MISTRAL_ARGS)


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        (True, "json"), ({}, "json"), ({"type": "string"}, "text"), ({"const": "a"}, "text"),
        ({"type": "string", "pattern": "a"}, "json"), ({"enum": ["a", 1]}, "json"),
        ({"enum": ["a", "</parameter>"]}, "json"), ({"type": ["string", "null"]}, "text or null"),
        ({"anyOf": [{"enum": ["a"]}, {"type": "null"}]}, "text or null"),
        ({"anyOf": [{"enum": ["null"]}, {"type": "null"}]}, "json"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "json"),
        ({"$ref": "#/$defs/s"}, "text"), ({"$ref": "#/$defs/r"}, "json"),
        ({"type": "string", "maxLength": 3, "title": "t", "x-a": 1}, "text"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "json"),
    ],
)  # fmt: skip
def test_what_is_written_as_it_is(schema: Any, kind: str) -> None:
    definitions = {"s": {"type": "string"}, "r": {"$ref": "#/$defs/r"}}
    parameters = {"properties": {"a": schema}, "$defs": definitions}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert argument_kinds(request([tool]).tools, QWEN_XML) == {"f": {"a": kind}}


def test_more_properties_are_not_invented() -> None:
    open_ = {"properties": {"a": {"type": "null"}, "no": False}, "required": ["b"],
             "additionalProperties": True}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": open_}}]
    answers = language(QWEN_XML, tools=tools)
    both = argued(QWEN_XML, [("a", "null"), ("b", "[1]")])
    assert called(QWEN_XML, ("f", both)) in answers
    assert called(QWEN_XML, ("f", both + argued(QWEN_XML, [("c", "1")]))) not in answers


def walked(matcher: Matcher, answer: str, marks: Mapping[str, int]) -> bool:
    """Whether `answer`, its marks as tokens of their own, matches."""
    ids: list[int] = []
    while answer:
        mark = next((each for each in marks if answer.startswith(each)), None)
        ids += [marks[mark]] if mark else answer[0].encode()
        answer = answer[len(mark or answer[0]) :]
    inner = matcher._inner
    return inner.try_consume_tokens(ids) == len(ids) and inner.is_accepting()


@ALL
def test_marks_that_are_special_tokens(tool_format: ToolFormat) -> None:
    """They have no text: the grammar names them, and the same in letters is no call."""
    first = len(BYTES.tokens)
    marks = {mark: first + i for i, mark in enumerate(tool_format.marks)}
    tokens = (*BYTES.tokens, *(b"" for _ in marks))
    vocabulary = Vocabulary(tokens, BYTES.end_ids).build()

    def matches(answer: str, tokens: Mapping[str, int] = marks, **fields: Any) -> bool:
        spec = tool_grammar(request(**fields), tool_format, marks=marks)
        text = to_llguidance(spec.kind, spec.source, after_space=False)
        return walked(Matcher(pristine_matcher(vocabulary, text, is_json=True)), answer, tokens)

    given = given_to(tool_format, [CITY, ("colour", "red"), ("code", "a")])
    answer = called(tool_format, ("f", given), ("g-2", given_to(tool_format, [])))
    assert matches(answer) and matches(f"hi {answer}") and matches("hi") and matches("")
    assert matches(answer, tool_choice="required")
    assert not matches(answer, {}) and not matches(f"hi {tool_format.marker}", {})
    assert not matches(answer[:-1]) and not matches(f"{answer}x")
