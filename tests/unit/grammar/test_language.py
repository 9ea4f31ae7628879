"""What each kind of spec lets an answer say; blanks, escapes, leading spaces, limits at a token."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from chatserve.engine.grammar import GrammarOrigin
from chatserve.errors import GenerationFailed
from chatserve.grammar import limits
from chatserve.grammar.matcher import Grammar
from chatserve.grammar.source import to_llguidance
from chatserve.protocol.response_format import read_schema
from tests.grammars import BYTES, END_ID, Language, allowed_ids, byte_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_regex_matches_the_whole_answer() -> None:
    answers = Language("regex", r"a|b/c|\n\d")
    assert all(each in answers for each in ("a", "b/c", "\n7"))
    assert not any(each in answers for each in ("", "ab", "xa", "b/c ", "\n٧"))


def test_choice_takes_any_text() -> None:
    choices = ["yes", "no", 'a"b\\c\n\t\x01é日😀/', "", " x"]
    answers = Language("choice", json.dumps(choices))
    assert all(each in answers for each in choices)
    assert not any(each in answers for each in ("y", "yesno", "x", '"yes"'))


def test_gbnf_and_lark() -> None:
    gbnf = Language("gbnf", 'root ::= greeting " " [a-z]+ "!"?\ngreeting ::= "hi" | "bye"\n')
    lark = Language("lark", 'start: greeting " " WORD "!"?\ngreeting: "hi" | "bye"\nWORD: /[a-z]+/')
    for answers in (gbnf, lark):
        assert "hi you" in answers and "bye x!" in answers
        assert "hi" not in answers and "hi You" not in answers


def test_tools_are_lark_with_schemas() -> None:
    answers = Language("tools", f'start: "<call>" %json {json.dumps(PERSON)} "</call>"')
    assert '<call>{"name":"x","age":1}</call>' in answers and "<call></call>" not in answers


def test_any_json_object() -> None:
    answers = Language("json_object", "")
    assert all(each in answers for each in ("{}", '{"a": [1, {"b": null}], "c": "é\\n"}'))
    assert not any(each in answers for each in ("[]", "1", "{", '{"a"}', " {}", "{} "))


def test_blanks_come_to_an_end() -> None:
    answers = Language("json_object", "")
    inside = ["", " ", "\n", "\n" + " " * 24, "\n" + "\t" * 8]
    too_many = ["  ", "\n\n", "\n" + " " * 25, "\t", "\r\n", " \n"]
    assert all(f'{{{blank}"a":{blank}1{blank}}}' in answers for blank in inside)
    assert not any(f'{{{blank}"a":1}}' in answers for blank in too_many)


def test_a_property_cannot_be_smuggled_in_by_another_spelling() -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    answers = Language("json_schema", json.dumps({"type": "object", **schema}))
    assert '{"a":1,"b":"x"}' in answers and '{"b\\n":"x"}' in answers
    assert '{"a":"x"}' not in answers and '{"\\u0061":"x"}' not in answers


@pytest.mark.parametrize(
    ("kind", "source", "answer"),
    [
        ("regex", "yes|no", "yes"),
        ("choice", '[" yes", "no"]', " yes"),
        ("json_object", "", "{}"),
        ("lark", 'start: "yes"', "yes"),
        ("gbnf", 'root ::= "yes"', "yes"),
    ],
)
def test_a_space_that_is_taken_away_comes_first(kind: str, source: str, answer: str) -> None:
    answers = Language(kind, source, after_space=True)
    assert " " + answer in answers and answer not in answers


def compiled(kind: str, source: str) -> Grammar:
    text = to_llguidance(kind, source, after_space=False)
    return Grammar.compile(byte_tokenizer(), text, GrammarOrigin(kind, source))


def test_is_finished_when_only_the_end_is_left() -> None:
    matcher = compiled("regex", "ab?").matcher()
    assert allowed_ids(matcher, 257) == {ord("a")} and not matcher.is_finished
    matcher.accept(ord("a"))
    assert allowed_ids(matcher, 257) == {ord("b"), END_ID} and not matcher.is_finished
    matcher.accept(ord("b"))
    assert matcher.is_finished
    assert allowed_ids(matcher, 257) == {END_ID}


def test_matchers_of_a_grammar_know_nothing_of_each_other() -> None:
    grammar = compiled("regex", "ab")
    first, second = grammar.matcher(), grammar.matcher()
    first.accept(ord("a"))
    assert allowed_ids(first, 257) == {ord("b")} and allowed_ids(second, 257) == {ord("a")}


def test_a_token_that_was_ruled_out_fails_the_answer() -> None:
    matcher = compiled("regex", "ab").matcher()
    with pytest.raises(GenerationFailed, match="can no longer be held"):
        matcher.accept(ord("x"))
    with pytest.raises(GenerationFailed):
        allowed_ids(matcher, 257)


def test_a_mask_that_costs_too_much_fails_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(count: int) -> None:
        matcher = compiled("regex", "(a|b)*a(a|b){14}").matcher()
        for letter in ("ab" * count)[:count]:
            allowed_ids(matcher, 257)
            matcher.accept(ord(letter))

    say(40)
    monkeypatch.setattr(limits, "_MAX_LEXER_STATES", 20)
    with pytest.raises(GenerationFailed) as caught:
        say(40)
    assert "simpler" in caught.value.message and "\n" not in caught.value.message


SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "object", "properties": {"a": PERSON, "b": {"type": "array", "items": PERSON,
     "minItems": 1, "maxItems": 2}}, "required": ["a", "b"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", 1, None, 2.5, {"y": []}]}, "maxItems": 4},
    {"type": "number", "minimum": -3, "exclusiveMaximum": 4.5},
    {"type": "integer", "minimum": -12, "maximum": 345},
    {"type": "integer", "multipleOf": 7, "minimum": 0},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]{2,3}(-[0-9]+)?$"},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "ipv4", "uuid")),
    {"type": ["boolean", "null"]},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}}]},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}},
                "required": ["kind", "n"], "additionalProperties": False},
               {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"],
                "additionalProperties": False}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
        "leaf": {"type": "boolean"}, "left": {"$ref": "#/$defs/tree"}},
        "required": ["leaf"], "additionalProperties": False}}},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
     "additionalProperties": False, "maxProperties": 3},
]  # fmt: skip


def say_anything(kind: str, source: str, seed: int) -> str | None:
    """An answer of random bytes that the grammar allows; None if it does not come to an end."""
    draw = random.Random(seed)
    matcher = compiled(kind, source).matcher()
    answer = bytearray()
    for _ in range(600):
        if matcher.is_finished:
            return answer.decode()
        allowed = sorted(allowed_ids(matcher, len(BYTES.tokens)))
        # a quote ends what could go on for ever
        token_id = ord('"') if ord('"') in allowed and draw.random() < 0.1 else draw.choice(allowed)
        if token_id == END_ID:
            return answer.decode()
        answer.append(token_id)
        matcher.accept(token_id)
    return None


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda each: json.dumps(each)[:50])
def test_whatever_is_said_matches_its_schema(schema: dict[str, Any]) -> None:
    source = read_schema(schema, "schema").source
    check = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    said = [say_anything("json_schema", source, seed) for seed in range(12)]
    whole = [each for each in said if each is not None]
    assert len(whole) >= 3
    for answer in whole:
        check.validate(json.loads(answer))


def test_whatever_is_said_matches_its_regex() -> None:
    for pattern in (r"[^ab]{3,5}", r"(ab|c)*d", r"\d{1,3}(\.\d{1,3}){3}"):
        for seed in range(6):
            answer = say_anything("regex", pattern, seed)
            assert answer is not None and re.fullmatch(pattern, answer)
