"""`POST /tokenize` and `POST /detokenize`, in vLLM's shape: requests and replies. No tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from chatserve.errors import InvalidRequest
from chatserve.protocol.chat import MESSAGES_SCHEMA, ChatMessage, read_messages
from chatserve.protocol.fields import ID_SCHEMA, NOTHING, read_object, validate
from chatserve.protocol.tools import Tools

TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
MAX_TOKENS = 1 << 18

TOKENIZE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "chat_template": (None,),
    "chat_template_kwargs": NOTHING,
    "mm_processor_kwargs": NOTHING,
}
IDS_SCHEMA = {
    "type": "array", "items": ID_SCHEMA, "maxItems": MAX_TOKENS,
}  # fmt: skip


def _messages(value: Any) -> list[ChatMessage] | None:
    return None if value is None else read_messages(value)


def _ids(value: Any) -> list[int]:
    # bool is an int to isinstance
    if not isinstance(value, list) or not all(type(token_id) is int for token_id in value):
        raise InvalidRequest("tokens must be a list of token ids", param="tokens")
    if len(value) > MAX_TOKENS:
        raise InvalidRequest(
            f"tokens has {len(value):,} ids, the limit is {MAX_TOKENS:,}; send them in parts",
            param="tokens",
        )
    return value


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = Field(None, max_length=500)
    """None: the only one that is served."""


class TokenizeRequest(_Request):
    """A text (`prompt`) or a chat (`messages`). Booleans that are None have vLLM's defaults."""

    prompt: str | None = None
    messages: Annotated[
        list[ChatMessage] | None,
        BeforeValidator(_messages),
        WithJsonSchema({"anyOf": [MESSAGES_SCHEMA, {"type": "null"}]}),
    ] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools = ()
    return_token_strs: bool | None = None


class DetokenizeRequest(_Request):
    """`skip_special_tokens`: leave out what a client of the chat route would not see either."""

    tokens: Annotated[list[int], BeforeValidator(_ids), WithJsonSchema(IDS_SCHEMA)]
    skip_special_tokens: bool | None = None


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises `InvalidRequest` or `UnsupportedParameter` naming the field."""
    request = validate(TokenizeRequest, read_object(body), TOKENIZE_NO_OPS)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if request.messages is not None and request.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens is for a prompt; the chat template puts its own into messages",
            param="add_special_tokens",
        )
    for name in ("add_generation_prompt", "continue_final_message"):
        if request.messages is None and getattr(request, name) is not None:
            raise InvalidRequest(f"{name} is for messages", param=name)
    if request.messages is None and request.tools:
        raise InvalidRequest("tools is for messages", param="tools")
    if request.add_generation_prompt and request.continue_final_message:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message cannot both be true; the answer "
            "begins either with its last message or behind it",
            param="add_generation_prompt",
        )
    return request


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises as `parse_tokenize` does."""
    return validate(DetokenizeRequest, read_object(body), {})


def tokenize_reply(
    ids: Sequence[int], max_model_len: int, token_strs: Sequence[str] | None
) -> dict[str, Any]:
    return {
        "count": len(ids),
        "max_model_len": max_model_len,
        "tokens": ids,
        "token_strs": token_strs,
    }
