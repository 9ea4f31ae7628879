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
    assert completion(echo=False, suffix=None, logprobs=None, best_of=1).num_tries == 1
    assert completion(echo=True, logprobs=20, max_tokens=0).asked_tokens == 0
    with pytest.raises(UnsupportedParameter, match="suffix"):
        completion(suffix="x")
    with pytest.raises(UnsupportedParameter):
        completion(max_completion_tokens=5)


@pytest.mark.parametrize(
    ("field", "refused"),
    [
        ("logprobs", [-1, 21, True, "1", 1.0]),
        ("echo", [1, "true"]),
        ("max_tokens", [-1, True]),
        ("best_of", [0, 9, True]),
    ],
)
def test_limits(field: str, refused: list[Any]) -> None:
    for value in refused:
        with pytest.raises(InvalidRequest) as caught:
            completion(**{field: value})
        assert caught.value.param == field


def test_the_best_of_several() -> None:
    request = completion(n=2, best_of=5)
    assert (request.num_choices, request.num_tries) == (2, 5)
    assert completion(n=3, best_of=3, stream=True).num_tries == 3
    with pytest.raises(InvalidRequest, match="best_of is 2, less than n, which is 3"):
        completion(n=3, best_of=2)
    with pytest.raises(UnsupportedParameter, match="best_of 2 cannot be streamed"):
        completion(best_of=2, stream=True)
    with pytest.raises(InvalidRequest, match="best_of is 5, together 65"):
        completion(prompt=["a"] * 13, best_of=5)
