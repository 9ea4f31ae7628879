"""What a text completion may ask for: prompts, limits, refusals by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.completions import MAX_PROMPTS, CompletionRequest, parse_completion


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a"] * MAX_PROMPTS, ["a"] * MAX_PROMPTS),
    ],
)
def test_prompts(prompt: Any, expected: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt", [None, 1, [], [[]], [True], [1, "a"], [1.0], {"a": 1}, ["a"] * 65, [[1]] * 65]
)
def test_prompts_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_prompts_times_choices_have_a_limit() -> None:
    assert completion(prompt=["a"] * 8, n=8).num_choices == 8
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=["a"] * 13, n=5)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "prompt")
    assert "13 entries and n is 5, together 65 answers; the limit is 64" in caught.value.message


def test_completion_fields() -> None:
    assert completion(echo=False, suffix=None, logprobs=None, best_of=1).best_of == 1
    assert completion(n=3, best_of=3).num_choices == 3
    for field, value in (("echo", True), ("suffix", "x"), ("logprobs", 0), ("best_of", 2)):
        with pytest.raises(UnsupportedParameter) as caught:
            completion(**{field: value})
        assert caught.value.param == field
    with pytest.raises(UnsupportedParameter):
        completion(max_completion_tokens=5)
