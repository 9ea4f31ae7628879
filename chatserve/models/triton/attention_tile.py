"""One tile of keys and values: read by block table, and mixed into what the tiles before it gave.

Parts of the attention kernels; which keys a query may see is theirs to say.
Method: online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_tile(
    keys,
    values,
    table,
    kv_head,
    token,
    is_read,
    dim,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Keys and values (TILE, DIM_BLOCK) of one head; zeros where `is_read` (TILE,) says no.

    token: (TILE,) positions in the sequence whose block ids are at `table`. dim: (DIM_BLOCK,).
    """
    block = tl.load(table + token // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
    place = ((block * BLOCK_SIZE + token % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
    mask = is_read[:, None] & (dim < HEAD_DIM)[None, :]
    key = tl.load(keys + place[:, None] + dim[None, :], mask=mask, other=0.0)
    value = tl.load(values + place[:, None] + dim[None, :], mask=mask, other=0.0)
    return key, value


@triton.jit
def mix_tile(query, key, value, is_seen, scale, maximum, total, mix):
    """The new (maximum, total, mix): largest score, sum of weights, and weighted sum of values.

    query, mix: (Q, DIM_BLOCK). key, value: (TILE, DIM_BLOCK). is_seen: (1 or Q, TILE).
    maximum, total: (Q,), -inf and 0 before the first tile.
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(is_seen, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # a window may hide a whole tile from a row: no finite maximum yet, and nothing to add
    finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    shrink = tl.exp(maximum - finite)
    weights = tl.exp(scores - finite[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    mix = mix * shrink[:, None]
    mix = tl.dot(weights.to(value.dtype), value, mix, input_precision="ieee")
    return new_maximum, total, mix
