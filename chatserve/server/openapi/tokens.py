"""Token ids of texts and chats, in the document."""

from __future__ import annotations

from chatserve.protocol.replies import DetokenizeReply, TokenizeReply
from chatserve.protocol.tokens import (
    DETOKENIZE_PATH,
    TOKENIZE_NO_OPS,
    TOKENIZE_PATH,
    DetokenizeRequest,
    TokenizeRequest,
)
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
        "post", TOKENIZE_PATH, "tokenize", "Tokens", "The token ids of a text or a chat",
        TokenizeReply,
        about="Either `prompt` or `messages`; of a chat, as its template renders it.",
        body=Body(TokenizeRequest, {"prompt": "Say hello."}, TOKENIZE_NO_OPS),
        errors=ERRORS,
    ),
    Operation(
        "post", DETOKENIZE_PATH, "detokenize", "Tokens", "The text of token ids", DetokenizeReply,
        body=Body(DetokenizeRequest, {"tokens": [19556, 28]}),
        errors=ERRORS,
    ),
)  # fmt: skip
