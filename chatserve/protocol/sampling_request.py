"""The fields that chat and text completions share: sampling, stops, streaming.

Knows no prompt and no route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.fields import (
    INT64,
    Priority,
    is_number,
    no_op_schemas,
    refuse_unknown,
    without_no_ops,
)
from chatserve.protocol.response_format import (
    GrammarSpec,
    GuidedChoice,
    GuidedGrammar,
    GuidedJSON,
    GuidedRegex,
    ResponseFormat,
    StructuredOutputs,
    only_one,
)

MAX_CHOICES = 8
# of one request: more could never be in the queue together
MAX_SEQUENCES = 64
MAX_ADAPTER_NAME_LEN = 300
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20

# what the functions below accept, for the OpenAPI document; a test holds the two together
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_BYTES}
STOPS_SCHEMA = {
    "anyOf": [
        _STOP_SCHEMA,
        {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS},
        {"type": "null"},
    ]
}
STOP_TOKENS_SCHEMA = {
    "anyOf": [
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            "maxItems": MAX_STOP_TOKENS,
        },
        {"type": "null"},
    ]
}
LOGIT_BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        },
        {"type": "null"},
    ]
}
STREAM_NO_OPS: Mapping[str, tuple[Any, ...]] = {"include_obfuscation": (None, False)}


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be a text or a list of texts", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} texts, the limit is {MAX_STOPS}", param="stop")
    for stop in stops:
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidRequest(
                f"a stop text must have 1 to {MAX_STOP_BYTES} bytes, one has {len(stop.encode())}",
                param="stop",
            )
    return tuple(stops)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(id_) is int and id_ >= 0 for id_ in value):
        raise InvalidRequest("stop_token_ids must be a list of token ids", param="stop_token_ids")
    if len(value) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"stop_token_ids has {len(value)} ids, the limit is {MAX_STOP_TOKENS}",
            param="stop_token_ids",
        )
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest("logit_bias must map token ids to numbers", param="logit_bias")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias has {len(value)} entries, the limit is {MAX_LOGIT_BIAS}",
            param="logit_bias",
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        param = f"logit_bias.{key[:20]}"
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise InvalidRequest(f"{param}: the key must be a token id", param=param)
        if not is_number(bias) or not -100 <= bias <= 100:
            raise InvalidRequest(f"{param} must be a number from -100 to 100", param=param)
        biases[int(key)] = float(bias)
    return biases


class StreamOptions(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True,
        json_schema_extra=lambda schema: schema["properties"].update(no_op_schemas(STREAM_NO_OPS)),
    )  # fmt: skip

    include_usage: bool = False
    continuous_usage_stats: bool = False


def _stream_options(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    options = without_no_ops(value, STREAM_NO_OPS, prefix="stream_options.")
    refuse_unknown(options, frozenset(StreamOptions.model_fields), prefix="stream_options.")
    return options


class SamplingRequest(BaseModel):
    """The fields that chat and text completions share. None means: the model's default."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(max_length=500)
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_stream_options)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    rank_by: str | None = Field(None, min_length=1, max_length=MAX_ADAPTER_NAME_LEN)
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    min_tokens: int | None = Field(None, ge=0, lt=INT64)
    ignore_eos: bool | None = None
    priority: Priority | None = None
    return_token_ids: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops), WithJsonSchema(STOPS_SCHEMA)] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], BeforeValidator(_stop_token_ids), WithJsonSchema(STOP_TOKENS_SCHEMA)
    ] = ()
    logit_bias: Annotated[
        dict[int, float], BeforeValidator(_logit_bias), WithJsonSchema(LOGIT_BIAS_SCHEMA)
    ] = Field(default_factory=dict)
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    guided_json: GuidedJSON = None
    guided_regex: GuidedRegex = None
    guided_choice: GuidedChoice = None
    guided_grammar: GuidedGrammar = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_usage_in_chunks(self) -> bool:
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_tries(self) -> int:
        """How many answers to each prompt are generated; `num_choices` of them are returned."""
        return self.best_of or self.num_choices

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the answer must match. Raises `InvalidRequest` where that is said twice."""
        return only_one(
            (
                self.response_format, self.structured_outputs, self.guided_json, self.guided_regex,
                self.guided_choice, self.guided_grammar,
            )
        )  # fmt: skip

    def check_streaming(self) -> None:
        """Raises `InvalidRequest` for options of a stream that was not asked for."""
        if self.stream_options is None:
            return
        if not self.is_stream:
            raise InvalidRequest("stream_options needs stream: true", param="stream_options")
        if self.stream_options.continuous_usage_stats and not self.includes_usage:
            raise InvalidRequest(
                "stream_options.continuous_usage_stats needs include_usage: true",
                param="stream_options.continuous_usage_stats",
            )

    def check_choice_among_answers(self) -> None:
        """Raises `InvalidRequest` where `best_of` or `rank_by` have nothing to choose from, and
        `UnsupportedParameter` where the answers would have to go out before the best is known."""
        if self.num_tries < self.num_choices:
            raise InvalidRequest(
                f"best_of is {self.best_of}, less than n, which is {self.num_choices}; raise it",
                param="best_of",
            )
        if self.num_tries > self.num_choices and self.is_stream:
            raise UnsupportedParameter(
                f"best_of {self.best_of} cannot be streamed: the best is known at the end; "
                "make it n or leave stream out",
                param="best_of",
            )
        if self.rank_by is None:
            return
        if self.num_tries == 1:
            raise InvalidRequest(
                f"rank_by ranks several answers, and this asks for one; ask for 2 to {MAX_CHOICES} "
                "with n, or with best_of where fewer are to be returned",
                param="rank_by",
            )
        if self.is_stream:
            raise UnsupportedParameter(
                "rank_by cannot be streamed: which answer is the best is known at the end; leave "
                "stream out, or leave rank_by out and score the answers at /v1/score",
                param="rank_by",
            )
