"""Embeddings and scores, in the document."""

from __future__ import annotations

from chatserve.protocol.embeddings import (
    EMBEDDINGS_NO_OPS,
    EMBEDDINGS_PATH,
    SCORE_NO_OPS,
    SCORE_PATH,
    EmbeddingRequest,
    ScoreRequest,
)
from chatserve.protocol.replies import EmbeddingReply, ScoreReply
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
        "post", EMBEDDINGS_PATH, "embed", "Embeddings", "A vector for each of some texts",
        EmbeddingReply,
        about="The pooled hidden states of the model, of length 1. A text is never cut in silence.",
        body=Body(
            EmbeddingRequest,
            {"model": "smollm2-135m", "input": ["A cat.", "A dog."]},
            EMBEDDINGS_NO_OPS,
        ),
        errors=ERRORS,
    ),
    Operation(
        "post", SCORE_PATH, "score", "Embeddings", "How alike two texts are, or how good an answer",
        ScoreReply,
        about="The cosine of their embeddings; of a reward model (`MODEL:NAME`), its own number "
        "for an answer. One text against each of many, or pair by pair.",
        body=Body(
            ScoreRequest,
            {"model": "smollm2-135m", "text_1": "A cat.", "text_2": ["A dog.", "Rain."]},
            SCORE_NO_OPS,
        ),
        errors=ERRORS,
    ),
)  # fmt: skip
