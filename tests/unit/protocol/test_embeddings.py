"""/v1/embeddings and /v1/score: what is accepted, and what is refused by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.embeddings import MAX_INPUTS, parse_embeddings, parse_score


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


@pytest.mark.parametrize(
    ("value", "inputs"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_inputs(value: Any, inputs: Any) -> None:
    request = parse_embeddings(body(input=value, user="someone", normalize=True))
    assert request.input == inputs
    assert (request.encoding_format, request.dimensions, request.pooling) == (None, None, None)


@pytest.mark.parametrize(
    "value", ["", [], [""], ["a", ""], [[]], [[1], []], [True], [1.5], None, 3]
)
def test_what_is_no_input(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_embeddings(body(input=value))
    assert caught.value.param == "input"


def test_so_many_inputs() -> None:
    assert len(parse_embeddings(body(input=["a"] * MAX_INPUTS)).input) == MAX_INPUTS
    with pytest.raises(InvalidRequest, match="2,048 entries, it has 2,049"):
        parse_embeddings(body(input=["a"] * (MAX_INPUTS + 1)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dimensions", 0),
        ("dimensions", -1),
        ("dimensions", 2**63),
        ("dimensions", True),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", 2**63),
        ("encoding_format", "int8"),
        ("pooling", "max"),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_embeddings(body(input="a", **{name: value}))
    assert caught.value.param == name


@pytest.mark.parametrize(("name", "value"), [("normalize", False), ("colour", 1), ("messages", [])])
def test_what_is_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter, match=name):
        parse_embeddings(body(input="a", **{name: value}))


def test_scores_of_one_and_of_many() -> None:
    assert parse_score(body(text_1="a", text_2="b")).text_1 == ["a"]
    assert parse_score(body(text_1=["a"], text_2=["b", "c"])).text_2 == ["b", "c"]
    assert len(parse_score(body(text_1=["a", "b"], text_2=["c", "d"])).text_1) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text_1": ["a", "b"], "text_2": "c"}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["c"] * 3}, "text_1"),
        ({"text_1": "", "text_2": "c"}, "text_1"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a", "text_2": ["b"] * (MAX_INPUTS + 1)}, "text_2"),
        ({"text_1": "a", "text_2": [1]}, "text_2"),
        ({"text_1": "a"}, "text_2"),
    ],
)
def test_refused_scores(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_score(body(**fields))
    assert caught.value.param == param
