"""From pooled hidden states to the replies of /v1/embeddings and /v1/score.

A reply is put together piece by piece, so that a large one stops no stream. Knows no engine.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from chatserve.errors import GenerationFailed, InvalidRequest

Vector = NDArray[np.float32]


def normalised(pooled: Vector, num_dimensions: int | None = None) -> Vector:
    """The first so many dimensions, of length 1. Raises `InvalidRequest` if these are zero."""
    wide = pooled[:num_dimensions].astype(np.float64)
    length = float(np.linalg.norm(wide))
    if length == 0:
        raise InvalidRequest(
            f"dimensions: the embedding is zero in its first {len(wide)}; ask for more",
            param="dimensions",
        )
    return (wide / length).astype(np.float32)


def cosine(first: Vector, second: Vector) -> float:
    """Of two vectors of any length, from -1 to 1."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    if lengths == 0:
        raise GenerationFailed("an embedding is zero in all of its dimensions; it has no direction")
    return min(1.0, max(-1.0, float(a @ b) / lengths))


def embeddings_reply(
    vectors: Sequence[Vector],
    model: str,
    usage: Mapping[str, int],
    *,
    num_dimensions: int | None,
    is_base64: bool,
) -> bytes:
    """JSON; `vectors` as they were pooled become little-endian float32 in base64, or numbers."""
    return _reply(
        (
            b'{"object":"embedding","index":%d,"embedding":%b}'
            % (index, _dumped(normalised(vector, num_dimensions), is_base64))
            for index, vector in enumerate(vectors)
        ),
        {"object": "list", "model": model, "usage": usage},
    )


def score_reply(
    scores: Sequence[float], *, reply_id: str, created: int, model: str, usage: Mapping[str, int]
) -> bytes:
    """JSON, in the order of the pairs."""
    return _reply(
        (
            orjson.dumps({"index": index, "object": "score", "score": score})
            for index, score in enumerate(scores)
        ),
        {"id": reply_id, "object": "list", "created": created, "model": model, "usage": usage},
    )


def _reply(data: Iterable[bytes], rest: Mapping[str, Any]) -> bytes:
    return b'{"data":[%b],%b' % (b",".join(data), orjson.dumps(rest)[1:])


def _dumped(vector: Vector, is_base64: bool) -> bytes:
    if is_base64:
        return b'"%b"' % base64.b64encode(vector.astype("<f4").tobytes())
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)
