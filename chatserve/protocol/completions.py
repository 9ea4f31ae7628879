"""`POST /v1/completions`: the request. Takes bytes, gives a typed request; no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.fields import read_object, validate
from chatserve.protocol.sampling_request import MAX_CHOICES, MAX_SEQUENCES, SamplingRequest

MAX_PROMPTS = 64

_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
# what `_prompts` accepts; a test holds the two together
PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        _IDS_SCHEMA,
        {
            "type": "array",
            "items": {"anyOf": [{"type": "string"}, _IDS_SCHEMA]},
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
    ]
}

COMPLETION_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
}


def _prompts(value: Any) -> list[str | list[int]]:
    """Text, ids, or a list of either -> a list of prompts."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not all(isinstance(p, str) or _is_ids(p) for p in value):
        raise InvalidRequest(
            "prompt must be a text, a list of token ids, or a list of texts or lists of token ids",
            param="prompt",
        )
    if not 1 <= len(value) <= MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt must have 1 to {MAX_PROMPTS} entries, it has {len(value)}", param="prompt"
        )
    return value


def _is_ids(value: Any) -> bool:
    # bool is an int to isinstance
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[
        list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(PROMPTS_SCHEMA)
    ]
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a text completion request. Raises as `parse_chat` does."""
    request = validate(CompletionRequest, read_object(body), COMPLETION_NO_OPS)
    request.check_streaming()
    if request.best_of not in (None, request.num_choices):
        raise UnsupportedParameter(
            f"best_of {request.best_of} is not supported; leave it out or make it n",
            param="best_of",
        )
    num_sequences = len(request.prompt) * request.num_choices
    if num_sequences > MAX_SEQUENCES:
        raise InvalidRequest(
            f"prompt has {len(request.prompt)} entries and n is {request.num_choices}, together "
            f"{num_sequences} answers; the limit is {MAX_SEQUENCES}, send several requests",
            param="prompt",
        )
    return request
