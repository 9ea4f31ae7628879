"""`POST /v1/embeddings` and `POST /v1/score`: the requests. Takes bytes; no engine, no vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from chatserve.errors import InvalidRequest
from chatserve.protocol.fields import ID_SCHEMA, INT64, Priority, read_object, validate

EMBEDDINGS_PATH = "/v1/embeddings"
SCORE_PATH = "/v1/score"
MAX_INPUTS = 2048

TRUNCATE_SCHEMA = {
    "anyOf": [
        {"const": -1},
        {"type": "integer", "minimum": 1, "maximum": INT64 - 1},
        {"type": "null"},
    ]
}

EMBEDDINGS_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "normalize": (None, True),
    "add_special_tokens": (None, True),
}
SCORE_NO_OPS = EMBEDDINGS_NO_OPS
POOLINGS = ("mean", "last", "cls")

_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_IDS_SCHEMA = {"type": "array", "items": ID_SCHEMA, "minItems": 1}
# what `_inputs` and `_texts` accept
INPUT_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        _IDS_SCHEMA,
        {
            "type": "array",
            "items": {"anyOf": [_TEXT_SCHEMA, _IDS_SCHEMA]},
            "minItems": 1,
            "maxItems": MAX_INPUTS,
        },
    ]
}
TEXTS_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": MAX_INPUTS},
    ]
}

Pooling = Literal["mean", "last", "cls"]


def _is_ids(value: Any) -> bool:
    # bool is an int to isinstance
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def _inputs(value: Any) -> list[str | list[int]]:
    inputs = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(inputs, list) or not all(isinstance(i, str) or _is_ids(i) for i in inputs):
        raise InvalidRequest(
            "input must be a text, a list of token ids, or a list of texts or lists of token ids, "
            "none of them empty",
            param="input",
        )
    _check_count(inputs, "input")
    return inputs


def _texts(name: str) -> BeforeValidator:
    def read(value: Any) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(f"{name} must be a text or a list of texts", param=name)
        _check_count(texts, name)
        return texts

    return BeforeValidator(read)


def _check_count(inputs: list[Any], name: str) -> None:
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InvalidRequest(
            f"{name} must have 1 to {MAX_INPUTS:,} entries, it has {len(inputs):,}", param=name
        )
    for index, each in enumerate(inputs):
        if each == "":
            where = f"{name}[{index}]" if len(inputs) > 1 else name
            raise InvalidRequest(f"{where} is empty; send some text", param=name)


def _pooling(value: Any) -> Pooling | None:
    if value is None or value in POOLINGS:
        return cast("Pooling | None", value)
    raise InvalidRequest("pooling must be mean, last or cls", param="pooling")


class PooledRequest(BaseModel):
    """What both have. `truncate_prompt_tokens` keeps so many tokens of each input, the first; -1:
    as many as the model holds. None: nothing is cut."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str = Field(max_length=500)
    priority: Priority | None = None
    truncate_prompt_tokens: Annotated[int | None, WithJsonSchema(TRUNCATE_SCHEMA)] = Field(
        None, ge=-1, lt=INT64
    )
    pooling: Annotated[
        Pooling | None,
        BeforeValidator(_pooling),
        WithJsonSchema({"enum": [*POOLINGS, None]}),
    ] = None


class EmbeddingRequest(PooledRequest):
    """`POST /v1/embeddings`."""

    input: Annotated[list[str | list[int]], BeforeValidator(_inputs), WithJsonSchema(INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=INT64)


class ScoreRequest(PooledRequest):
    """`POST /v1/score`: `text_1` against each of `text_2`, or each against its fellow.

    Of a reward model `text_1` are questions, `text_2` answers; `use_activation`: the scores go
    through a sigmoid.
    """

    text_1: Annotated[list[str], _texts("text_1"), WithJsonSchema(TEXTS_SCHEMA)]
    text_2: Annotated[list[str], _texts("text_2"), WithJsonSchema(TEXTS_SCHEMA)]
    use_activation: bool | None = None


def parse_embeddings(body: bytes) -> EmbeddingRequest:
    """Raises `InvalidRequest` or `UnsupportedParameter` naming the field."""
    return validate(EmbeddingRequest, read_object(body), EMBEDDINGS_NO_OPS)


def parse_score(body: bytes) -> ScoreRequest:
    """Raises as `parse_embeddings` does."""
    request = validate(ScoreRequest, read_object(body), SCORE_NO_OPS)
    if len(request.text_1) not in (1, len(request.text_2)):
        raise InvalidRequest(
            f"text_1 has {len(request.text_1):,} texts and text_2 {len(request.text_2):,}; send "
            "one and any number, or as many of both",
            param="text_1",
        )
    return request
