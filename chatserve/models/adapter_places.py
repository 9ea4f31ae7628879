"""Which matrix of a Llama-family network an adapter's pair changes, and which of its rows.

Networks fuse q, k and v, and gate and up; adapters name them one by one. Names and sizes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from chatserve.models.config import ModelConfig

MATRICES = ("qkv", "output", "gate_up", "down")
"""Of each block, in the order in which a step reads them."""


class Place(NamedTuple):
    """Rows `start` … `start` + `rows` - 1 of a fused matrix (·, `columns`).

    `matrix`: 4 * layer + its place in `MATRICES`; behind the last layer comes the head.
    """

    matrix: int
    start: int
    rows: int
    columns: int


def num_matrices(config: ModelConfig) -> int:
    return len(MATRICES) * config.num_layers + 1


def adapter_places(config: ModelConfig) -> Mapping[str, Place]:
    """Every matrix that an adapter may change, by its module ("model.layers.0.mlp.up_proj").

    A head that is the embedding, too, is none of them: changing it would change both.
    """
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, keys = config.num_heads * dim, config.num_kv_heads * dim
    places = {}
    for layer in range(config.num_layers):
        qkv = len(MATRICES) * layer
        block = {
            "self_attn.q_proj": Place(qkv, 0, heads, hidden),
            "self_attn.k_proj": Place(qkv, heads, keys, hidden),
            "self_attn.v_proj": Place(qkv, heads + keys, keys, hidden),
            "self_attn.o_proj": Place(qkv + 1, 0, hidden, heads),
            "mlp.gate_proj": Place(qkv + 2, 0, ffn, hidden),
            "mlp.up_proj": Place(qkv + 2, ffn, ffn, hidden),
            "mlp.down_proj": Place(qkv + 3, 0, hidden, ffn),
        }
        places.update({f"model.layers.{layer}.{name}": place for name, place in block.items()})
    if not config.is_tied:
        places["lm_head"] = Place(num_matrices(config) - 1, 0, config.vocab_size, hidden)
    return places
