"""What a file's headers say about its weights."""

from __future__ import annotations

from chatserve.models.packing import Packing
from chatserve.models.weights import TensorInfo, file_packing

Q4_1 = Packing(4, is_grouped=True, has_minima=True)
Q8_0 = Packing(8, is_grouped=True)


def matrix(name: str, packing: Packing | None) -> TensorInfo:
    return TensorInfo(name, (64, 64), "float32", 2560, packing)


def packing_of(*infos: TensorInfo) -> Packing | None:
    return file_packing({info.name: info for info in infos})


def test_the_form_is_what_all_matrices_of_the_blocks_have() -> None:
    norm = TensorInfo("model.layers.0.input_layernorm.weight", (64,), "float32", 256)
    query = matrix("model.layers.0.self_attn.q_proj.weight", Q4_1)
    value = matrix("model.layers.1.self_attn.v_proj.weight", Q4_1)
    assert packing_of(matrix("model.embed_tokens.weight", Q8_0), norm, query, value) == Q4_1


def test_there_is_no_form_where_matrices_differ_or_are_not_packed() -> None:
    query = matrix("model.layers.0.self_attn.q_proj.weight", Q4_1)
    assert packing_of(query, matrix("model.layers.0.mlp.down_proj.weight", Q8_0)) is None
    assert packing_of(query, matrix("model.layers.0.mlp.down_proj.weight", None)) is None
    assert packing_of(matrix("model.layers.0.mlp.down_proj.weight", None)) is None
    assert packing_of(matrix("model.embed_tokens.weight", Q8_0)) is None
