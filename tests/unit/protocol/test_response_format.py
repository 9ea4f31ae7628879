"""What an answer must match, as requests say it: kinds, limits at their edges, refusals by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import ChatRequest, parse_chat
from chatserve.protocol.completions import parse_completion
from chatserve.protocol.json_schema import MAX_DEPTH
from chatserve.protocol.response_format import (
    MAX_GRAMMAR_BYTES,
    MAX_GRAMMAR_CHOICES,
    MAX_GROUPS_DEPTH,
    GrammarSpec,
)

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def spec(**fields: Any) -> GrammarSpec | None:
    return chat(**fields).grammar


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        spec(**fields)
    assert caught.value.param is not None and caught.value.param in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 500
    return caught.value


def named(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


def test_nothing_is_asked_for() -> None:
    fields = ("response_format", "structured_outputs", "guided_json", "guided_regex",
              "guided_choice", "guided_grammar")  # fmt: skip
    assert spec(**dict.fromkeys(fields)) is None
    assert spec(response_format={"type": "text"}) is None
    assert spec(structured_outputs={"json": None, "json_object": False}) is None


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": named({"type": "null"})}, "json_schema", '{"type":"null"}'),
        ({"response_format": named({"type": "null"}, strict=True, description="d")},
         "json_schema", '{"type":"null"}'),
        ({"guided_json": '{"b": 1, "title": "a"}'.replace('"b": 1, ', "")}, "json_schema",
         '{"title":"a"}'),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type":"null"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["é", ""]}, "choice", '["é",""]'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"guided_grammar": 'start: "x ::= y"'}, "lark", 'start: "x ::= y"'),
        ({"guided_grammar": 'root ::= "a"'}, "gbnf", 'root ::= "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structured_outputs": {"grammar": "root::=x"}}, "gbnf", "root::=x"),
        ({"structured_outputs": {"json": {"enum": [1]}}}, "json_schema", '{"enum":[1]}'),
    ],
)  # fmt: skip
def test_each_kind(fields: dict[str, Any], kind: str, source: str) -> None:
    found = spec(**fields)
    assert found is not None and (found.kind, found.source) == (kind, source)
    body = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    assert parse_completion(body).grammar == found


def test_properties_keep_their_order() -> None:
    found = spec(guided_json={"properties": {"b": {}, "a": {}}, "required": ["b"]})
    assert found is not None
    assert found.source == '{"properties":{"b":{},"a":{}},"required":["b"]}'


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json_object", ""), ({}, ""), ({"type": 1}, ""), ({"type": "xml"}, ".type"),
        ({"type": "json_object", "schema": {}}, ".schema"),
        ({"type": "json_schema"}, ".json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, ".json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, ".json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
         ".json_schema.name"),
        ({"type": "json_schema", "json_schema": {"name": "n" * 65, "schema": {}}},
         ".json_schema.name"),
        (named({}, strict=1), ".json_schema.strict"),
        (named({}, description=1), ".json_schema.description"),
        (named({}, foo=1), ".json_schema.foo"),
        (named([]), ".json_schema.schema"), (named(True), ".json_schema.schema"),
        (named({"type": "array", "uniqueItems": True}), ".json_schema.schema.uniqueItems"),
        (named({"maxlength": 3}), ".json_schema.schema.maxlength"),
        (named({"x-guidance": {"lenient": True}}), ".json_schema.schema.x-guidance"),
        (named({"properties": {"a": {"items": [{}, {"not": {}}]}}}),
         ".json_schema.schema.properties.a.items[1].not"),
        (named({"$defs": {"a": {"if": {}}}}), ".json_schema.schema.$defs.a.if"),
        (named({"additionalProperties": {"nullable": True}}),
         ".json_schema.schema.additionalProperties.nullable"),
        (named({"format": "color"}), ".json_schema.schema.format"),
        (named({"$ref": "http://x/y"}), ".json_schema.schema.$ref"),
        (named({"properties": []}), ".json_schema.schema.properties"),
        (named({"anyOf": {}}), ".json_schema.schema.anyOf"),
        (named({"anyOf": [1]}), ".json_schema.schema.anyOf[0]"),
        (named({"const": {"a": ["x\x01"]}}), ".json_schema.schema.const"),
        (named({"enum": [{"x\x7f": 1}]}), ".json_schema.schema.enum"),
        (named({"pattern": "a\\x01"}), ".json_schema.schema.pattern"),
        (named({"patternProperties": {"a\\u0001": {}}}), ".json_schema.schema.patternProperties"),
    ],
)  # fmt: skip
def test_what_is_refused_of_a_response_format(value: Any, param: str) -> None:
    assert refusal(response_format=value).param == f"response_format{param}"


@pytest.mark.parametrize(
    ("keyword", "way_out"),
    [
        ("not", "list what is allowed with enum"), ("contains", "prefixItems"),
        ("uniqueItems", "an object with a property for each"), ("if", "anyOf of objects"),
        ("dependentRequired", "anyOf of objects"), ("minContains", "leave it out"),
    ],
)  # fmt: skip
def test_a_keyword_that_cannot_be_kept_is_named_with_its_place_and_a_way_out(
    keyword: str, way_out: str
) -> None:
    error = refusal(response_format=named({"properties": {"a": {"items": {keyword: {}}}}}))
    place = f"response_format.json_schema.schema.properties.a.items.{keyword}"
    assert error.param == place and "\n" not in error.message
    assert error.message.startswith(f"{place} is not a keyword that an answer can be held to; ")
    assert way_out in error.message


def test_what_describes_is_left_alone() -> None:
    schema = {"title": "t", "description": "d", "default": {"not": 1}, "examples": [{"if": 1}],
              "$comment": "c", "deprecated": True, "x-order": 3, "const": {"not": "a schema"},
              "pattern": "\\\\x01[\\n\\t]", "properties": {"not": {}, "if": {}}}  # fmt: skip
    found = spec(guided_json=schema)
    assert found is not None and json.loads(found.source) == schema


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("guided_regex", ["", 1, ["a"]]),
        ("guided_choice", ["a", [], [1], [None], {}]),
        ("guided_grammar", ["", 5, 'start: <|im_end|> "a"', "start: <[5]>",
                            'start[temperature=0.3]: "a"']),
        ("guided_json", ["{", "[]", "1", "null", 1, True, '{"not": {}}', "[" * 2000 + "]" * 2000]),
        ("structured_outputs", [[], {}, "x", {"foo": 1}, {"json_object": 1},
                                {"regex": "a", "json": {}}, {"structural_tag": "x"},
                                {"whitespace_pattern": " "}]),
    ],
)  # fmt: skip
def test_what_is_refused_of_the_others(field: str, values: list[Any]) -> None:
    for value in values:
        assert str(refusal(**{field: value}).param).startswith(field), value


def test_a_grammar_may_speak_of_brackets() -> None:
    for source in ('start: "<|im_end|>" /<[a-z]>/ // <x>', 'start: "[temperature=1]"'):
        assert spec(guided_grammar=source) is not None


def test_only_one_may_be_given() -> None:
    both = {"response_format": {"type": "json_object"}, "guided_regex": "a"}
    error = refusal(**both)
    assert error.param == "guided_regex" and "response_format" in error.message


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_limits_at_their_edges() -> None:
    text = "a" * MAX_GRAMMAR_BYTES
    assert spec(guided_regex=text) is not None
    assert f"{MAX_GRAMMAR_BYTES:,}" in refusal(guided_regex=text + "a").message
    assert f"{MAX_GRAMMAR_BYTES:,}" in refusal(guided_grammar="é" + text[:-1]).message
    assert f"{MAX_GRAMMAR_BYTES:,}" in refusal(guided_json={"const": text}).message
    assert f"{MAX_GRAMMAR_BYTES:,}" in refusal(guided_json=f'{{"const": "{text}"}}').message
    assert spec(guided_choice=["a"] * MAX_GRAMMAR_CHOICES) is not None
    refusal(guided_choice=["a"] * (MAX_GRAMMAR_CHOICES + 1))
    assert f"{MAX_GRAMMAR_BYTES:,}" in refusal(guided_choice=[text]).message
    assert spec(guided_regex="(" * MAX_GROUPS_DEPTH + ")" * MAX_GROUPS_DEPTH) is not None
    refusal(guided_regex="(" * (MAX_GROUPS_DEPTH + 1) + ")" * (MAX_GROUPS_DEPTH + 1))
    assert spec(guided_regex="()" * 1000) is not None
    assert spec(guided_json=nested(MAX_DEPTH)) is not None
    assert f"{MAX_DEPTH} levels" in refusal(guided_json=nested(MAX_DEPTH + 1)).message
    deep = '{"const": ' + "[" * 500 + "]" * 500 + "}"
    assert "nested too deeply" in refusal(guided_json=deep).message


def test_unsupported_says_so() -> None:
    assert isinstance(refusal(guided_json={"not": {}}), UnsupportedParameter)
