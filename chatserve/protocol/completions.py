"""`POST /v1/completions`: the request. Takes bytes, gives a typed request; no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from chatserve.errors import InvalidRequest
from chatserve.protocol.fields import ID_SCHEMA, INT64, read_object, validate
from chatserve.protocol.replay import REPLAY_SCHEMA, Replay, read_replay
from chatserve.protocol.response_format import GrammarSpec, only_one
from chatserve.protocol.sampling_request import (
    MAX_SEQUENCES,
    MAX_TOP_LOGPROBS,
    SamplingRequest,
)

MAX_PROMPTS = 64

_IDS_SCHEMA = {"type": "array", "items": ID_SCHEMA, "minItems": 1}
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

COMPLETION_NO_OPS: Mapping[str, tuple[Any, ...]] = {"suffix": (None, "")}


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
    # 0 only reads the prompt, to score it
    max_tokens: int | None = Field(None, ge=0, lt=INT64)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    replay: Annotated[
        Replay | None, BeforeValidator(read_replay), WithJsonSchema(REPLAY_SCHEMA)
    ] = None

    @property
    def grammar(self) -> GrammarSpec | None:
        logged = None if self.replay is None else self.replay.grammar
        return only_one((super().grammar, logged))


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a text completion request. Raises as `parse_chat` does."""
    request = validate(CompletionRequest, read_object(body), COMPLETION_NO_OPS)
    request.check_streaming()
    request.check_choice_among_answers()
    if request.rank_by is not None and request.max_tokens == 0:
        raise InvalidRequest(
            "rank_by ranks answers, and max_tokens is 0; raise it, or score texts at /v1/score",
            param="rank_by",
        )
    num_sequences = len(request.prompt) * request.num_tries
    if num_sequences > MAX_SEQUENCES:
        name = "n" if request.num_tries == request.num_choices else "best_of"
        raise InvalidRequest(
            f"prompt has {len(request.prompt)} entries and {name} is {request.num_tries}, together "
            f"{num_sequences} answers; the limit is {MAX_SEQUENCES}, send several requests",
            param="prompt",
        )
    return request
