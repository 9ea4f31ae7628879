"""Vectors of length 1, cut or whole, as numbers and in base64; scores from -1 to 1."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from chatserve.errors import GenerationFailed, InvalidRequest
from chatserve.server.embedding_replies import (
    Vector,
    cosine,
    embeddings_reply,
    normalised,
    score_reply,
)

VECTOR = np.array([3, -4, 12, 0.1], np.float32)
USAGE = {"prompt_tokens": 3, "total_tokens": 3}


def reply(vectors: list[Vector], num_dimensions: int | None = None, *, is_base64: bool) -> dict:
    text = embeddings_reply(vectors, "m", USAGE, num_dimensions=num_dimensions, is_base64=is_base64)
    return json.loads(text)


@pytest.mark.parametrize("num_dimensions", [None, 4, 3, 1])
def test_numbers_and_base64_are_the_same_vector_of_length_1(num_dimensions: int | None) -> None:
    cut = VECTOR[:num_dimensions].astype(np.float64)
    expected = (cut / np.sqrt((cut**2).sum())).astype(np.float32)
    numbers = reply([VECTOR, 2 * VECTOR], num_dimensions, is_base64=False)
    assert numbers["object"] == "list"
    assert (numbers["model"], numbers["usage"]) == ("m", USAGE)
    coded = reply([VECTOR, 2 * VECTOR], num_dimensions, is_base64=True)
    for index in (0, 1):
        found = numbers["data"][index]
        assert (found["object"], found["index"]) == ("embedding", index)
        assert np.array_equal(np.array(found["embedding"], np.float32), expected)
        raw = base64.b64decode(coded["data"][index]["embedding"])
        assert np.array_equal(np.frombuffer(raw, "<f4"), expected)


def test_what_has_no_direction_is_told() -> None:
    sparse = np.array([0, 0, 1], np.float32)
    with pytest.raises(InvalidRequest, match="ask for more"):
        normalised(sparse, 2)
    assert normalised(sparse, 3)[2] == 1
    with pytest.raises(GenerationFailed, match="no direction"):
        cosine(sparse, 0 * sparse)


def test_tiny_and_huge_vectors_have_a_direction() -> None:
    for size in (1e-30, 1e30):
        assert np.allclose(normalised(np.float32(size) * VECTOR), normalised(VECTOR))


def test_scores() -> None:
    other = np.array([4, 3, 0, 0], np.float32)
    vectors = [VECTOR, other, -3 * VECTOR]
    found = json.loads(
        score_reply(
            [cosine(VECTOR, vector) for vector in vectors], reply_id="score-1", created=5,
            model="m", usage=USAGE,
        )
    )  # fmt: skip
    assert found == {
        "id": "score-1", "object": "list", "created": 5, "model": "m", "usage": USAGE,
        "data": [
            {"index": index, "object": "score", "score": pytest.approx(score, abs=1e-7)}
            for index, score in enumerate((1, 0, -1))
        ],
    }  # fmt: skip
    assert all(-1 <= each["score"] <= 1 for each in found["data"])
