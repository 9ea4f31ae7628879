"""Requests of the OpenAI API: schemas, limits, and what is refused by name.

Takes bytes, gives typed requests, raises `InvalidRequest`. No engine, no socket. Nothing is dropped
in silence: an unknown field is refused, and one that chatserve does not implement is accepted only
with a value that changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from chatserve.errors import ChatserveError, InvalidRequest, UnsupportedParameter

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_NESTING = 64
MAX_MESSAGES = 1024
MAX_CONTENT_PARTS = 1024
MAX_PROMPTS = 64
MAX_CHOICES = 8
# of one request: more could never be in the queue together
MAX_SEQUENCES = 64
MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_LOGIT_BIAS = 1024
INT64 = 2**63

NOTHING: tuple[Any, ...] = (None, [], {})
CHAT_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": NOTHING,
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": NOTHING,
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": NOTHING,
    "prediction": NOTHING,
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
}
COMPLETION_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
}
MESSAGE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "name": (None,),
    "refusal": (None,),
    "audio": NOTHING,
    "annotations": NOTHING,
    "tool_calls": NOTHING,
    "function_call": NOTHING,
}
# they label a request and never change its answer
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
# developer is what OpenAI now calls the system role
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str


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
        if not _is_number(bias) or not -100 <= bias <= 100:
            raise InvalidRequest(f"{param} must be a number from -100 to 100", param=param)
        biases[int(key)] = float(bias)
    return biases


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _messages(value: Any) -> list[ChatMessage]:
    if not isinstance(value, list):
        raise InvalidRequest("messages must be a list", param="messages")
    if not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must have 1 to {MAX_MESSAGES} entries, it has {len(value)}", param="messages"
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, param: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with role and content", param=param)
    fields = _without_no_ops(value, MESSAGE_NO_OPS, prefix=f"{param}.")
    _refuse_unknown(fields, frozenset({"role", "content"}), prefix=f"{param}.")
    role = fields.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{param}.role must be a text", param=f"{param}.role")
    if role not in ROLES:
        raise UnsupportedParameter(
            f"{param}.role {role[:20]!r} is not supported; use one of {', '.join(ROLES)}",
            param=f"{param}.role",
        )
    return ChatMessage(ROLES[role], _content(fields.get("content"), f"{param}.content"))


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{param} must be a text or a list of text parts", param=param)
    if len(value) > MAX_CONTENT_PARTS:
        raise InvalidRequest(
            f"{param} has {len(value)} parts, the limit is {MAX_CONTENT_PARTS}", param=param
        )
    return "\n".join(_text_part(part, f"{param}[{i}]") for i, part in enumerate(value))


def _text_part(value: Any, param: str) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    if kind != "text":
        raise UnsupportedParameter(
            f"{param}: parts of type {kind[:40]!r} are not supported, only text", param=param
        )
    _refuse_unknown(value, frozenset({"type", "text"}), prefix=f"{param}.")
    if not isinstance(value.get("text"), str):
        raise InvalidRequest(f"{param}.text must be a text", param=f"{param}.text")
    return str(value["text"])


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


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False


def _stream_options(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    options = _without_no_ops(
        value, {"include_obfuscation": (None, False)}, prefix="stream_options."
    )
    _refuse_unknown(options, frozenset(StreamOptions.model_fields), prefix="stream_options.")
    return options


class SamplingRequest(BaseModel):
    """The fields that chat and text completions share. None means: the model's default."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(max_length=500)
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_stream_options)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = Field(
        default_factory=dict
    )

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
    def num_choices(self) -> int:
        return self.n or 1


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], BeforeValidator(_messages)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)


def parse_chat(body: bytes) -> ChatRequest:
    """Read a chat request. Raises `InvalidRequest` or `UnsupportedParameter` naming the field."""
    request = _validate(ChatRequest, _load(body), CHAT_NO_OPS)
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequest(
            f"max_tokens is {request.max_tokens} but max_completion_tokens is "
            f"{request.max_completion_tokens}; give only one",
            param="max_tokens",
        )
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a text completion request. Raises as `parse_chat` does."""
    request = _validate(CompletionRequest, _load(body), COMPLETION_NO_OPS)
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


def model_of(body: bytes) -> str:
    """The model a request asks for; nothing else of it is looked at."""
    model = _load(body).get("model")
    if not isinstance(model, str):
        raise InvalidRequest("model is missing or not a text", param="model")
    return model


def _load(body: bytes) -> dict[str, Any]:
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(payload, dict):
        raise InvalidRequest("the body must be a JSON object")
    # brackets bound the depth from above, and spare nearly every request the walk
    if body.count(b"[") + body.count(b"{") > MAX_NESTING and _is_too_deep(payload):
        raise InvalidRequest(f"the body is nested deeper than {MAX_NESTING} levels")
    return payload


def _is_too_deep(payload: dict[str, Any]) -> bool:
    level: list[Any] = [payload]
    for _ in range(MAX_NESTING):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


Request = TypeVar("Request", bound=SamplingRequest)


def _validate(
    kind: type[Request], payload: dict[str, Any], no_ops: Mapping[str, tuple[Any, ...]]
) -> Request:
    fields = _without_no_ops(payload, no_ops)
    for label in LABELS & fields.keys():
        _check_label(label, fields.pop(label))
    # one at a time: a list of a million errors is a way to run out of memory
    _refuse_unknown(fields, frozenset(kind.model_fields))
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _as_invalid_request(error) from error
    if request.stream_options is not None and not request.is_stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    return request


def _without_no_ops(
    payload: dict[str, Any], no_ops: Mapping[str, tuple[Any, ...]], *, prefix: str = ""
) -> dict[str, Any]:
    """`payload` less the fields of `no_ops`, refusing those whose value asks for something."""
    for name in no_ops.keys() & payload.keys():
        value = payload[name]
        # by type too: 0 is not False
        if not any(type(value) is type(no_op) and value == no_op for no_op in no_ops[name]):
            raise UnsupportedParameter(
                f"{prefix}{name} is not supported; leave it out", param=prefix + name
            )
    return {name: value for name, value in payload.items() if name not in no_ops}


def _check_label(name: str, value: Any) -> None:
    expected = dict if name == "metadata" else str
    if value is not None and not isinstance(value, expected):
        kind = "an object" if expected is dict else "a text"
        raise InvalidRequest(f"{name} must be {kind}", param=name)


def _refuse_unknown(fields: dict[str, Any], known: frozenset[str], *, prefix: str = "") -> None:
    for name in fields:
        if name not in known:
            shown = prefix + name[:64]
            raise UnsupportedParameter(f"{shown} is not a known field; leave it out", param=shown)


TYPE_NAMES = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "model_type": "an object",
}


def _as_invalid_request(error: ValidationError) -> ChatserveError:
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    value, kind = first["input"], first["type"]
    if kind == "missing":
        return InvalidRequest(f"{param} is missing", param=param)
    if kind in TYPE_NAMES:
        return InvalidRequest(f"{param} must be {TYPE_NAMES[kind]}", param=param)
    message = first["msg"].removeprefix("Input ")
    shown = f" is {value}: it" if _is_number(value) else ""
    return InvalidRequest(f"{param}{shown} {message}", param=param)
