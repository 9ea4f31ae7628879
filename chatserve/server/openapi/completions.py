"""Chat and text completions, in the document."""

from __future__ import annotations

from chatserve.protocol.chat import CHAT_NO_OPS, ChatRequest
from chatserve.protocol.completions import COMPLETION_NO_OPS, CompletionRequest
from chatserve.protocol.replies import ChatCompletion, ChatCompletionChunk, TextCompletion
from chatserve.server.openapi.operation import (
    ANY_REQUEST,
    WITH_BODY,
    WITH_MODEL,
    Body,
    Operation,
)

ERRORS = (*ANY_REQUEST, *WITH_BODY, *WITH_MODEL)

OPERATIONS = (
    Operation(
        "post", "/v1/chat/completions", "createChatCompletion", "Completions",
        "Answer a chat",
        ChatCompletion,
        about="With `stream: true` the answer comes as server-sent events and ends with `[DONE]`.",
        body=Body(
            ChatRequest,
            {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Say hello."}]},
            CHAT_NO_OPS,
        ),
        event=ChatCompletionChunk,
        errors=ERRORS,
    ),
    Operation(
        "post", "/v1/completions", "createCompletion", "Completions",
        "Continue a text",
        TextCompletion,
        about="Choice k of prompt p has index p * n + k.",
        body=Body(
            CompletionRequest,
            {"model": "smollm2-135m", "prompt": "Once upon a time"},
            COMPLETION_NO_OPS,
        ),
        event=TextCompletion,
        errors=ERRORS,
    ),
)  # fmt: skip
