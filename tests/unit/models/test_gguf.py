"""GGUF models in Hugging Face's terms: names, row order, config; what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chatserve.errors import ModelLoadError
from chatserve.models.config import ModelConfig
from chatserve.models.gguf import GGUFFile, GGUFWeights, hf_config
from chatserve.models.rope import inverse_frequencies
from tests.unit.models.gguf_bytes import model_tensors, write_model

Open = Callable[..., GGUFWeights]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Writes a model and opens it; closes all at the end."""
    files: list[GGUFFile] = []

    def open_model(
        architecture: str = "llama",
        tensors: dict[str, np.ndarray] | None = None,
        **keys: Any,
    ) -> GGUFWeights:
        renamed = {key.replace("__", "."): value for key, value in keys.items()}
        path = tmp_path / f"{len(files)}.gguf"
        write_model(path, architecture, tensors or model_tensors(architecture), renamed)
        files.append(GGUFFile.open(path))
        return GGUFWeights(files[-1])

    yield open_model
    for file in files:
        file.close()


def metadata(**keys: Any) -> dict[str, Any]:
    """What `hf_config` needs, changed by `keys`; None takes a key away."""
    base = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64,
        "llama.embedding_length": 8, "llama.feed_forward_length": 12,
        "llama.attention.head_count": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    }  # fmt: skip
    merged = {**base, **{key.replace("__", "."): value for key, value in keys.items()}}
    return {key: value for key, value in merged.items() if value is not None}


# Names and rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)]
)
def test_names_and_shapes_are_those_of_transformers(
    architecture: str, tied: bool, opened: Open
) -> None:
    weights = opened(architecture, model_tensors(architecture, tied=tied))
    config = weights.config()
    assert config["tie_word_embeddings"] is tied
    with torch.device("meta"):
        judged = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
    shapes = {name: tuple(value.shape) for name, value in judged.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    assert {name: info.shape for name, info in weights.tensors().items()} == shapes
    assert all(name == info.name for name, info in weights.tensors().items())


@pytest.mark.parametrize("architecture", ["LLAMA", "QWEN2", "QWEN3"])
def test_names_are_those_of_the_converter(architecture: str, opened: Open) -> None:
    arch = gguf.MODEL_ARCH[architecture]
    judge = gguf.get_tensor_name_map(arch, 2)
    tensors = model_tensors(architecture.lower())
    weights = opened(architecture.lower(), tensors)
    converted = {judge.get_name(name, (".weight", ".bias")) for name in weights.tensors()}
    assert converted == set(tensors)


def test_tensors_keep_disk_order_dtype_and_size(opened: Open) -> None:
    tensors = model_tensors("qwen2")
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(np.float16)
    weights = opened("qwen2", tensors)
    infos = list(weights.tensors().values())
    assert [info.num_bytes for info in infos] == [value.nbytes for value in tensors.values()]
    up = weights.tensors()["model.layers.0.mlp.up_proj.weight"]
    assert up.dtype == torch.float16
    found = weights.read("model.layers.0.mlp.up_proj.weight")
    assert np.array_equal(found.numpy(), tensors["blk.0.ffn_up.weight"])


def rotate_neighbours(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """llama.cpp's RoPE: pairs (0, 1), (2, 3) … of x (T, H, D) by angles (T, 1, D/2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """HF's RoPE: pairs (0, D/2), (1, D/2 + 1) …"""
    first, second = x.chunk(2, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(),)
    return torch.cat((*turned, first * angles.sin() + second * angles.cos()), dim=-1)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_rows_of_query_and_key_give_the_same_attention_as_in_the_file(
    architecture: str, opened: Open
) -> None:
    """Rows of the file under llama.cpp's rotation and our rows under HF's: equal scores."""
    rng = np.random.default_rng(0)
    tensors = model_tensors()
    # heads of 8: with heads of 4 the permutation is its own inverse and a wrong one would pass
    tensors |= {
        f"blk.0.attn_{x}.weight": rng.standard_normal((rows, 8), np.float32)
        for x, rows in (("q", 16), ("k", 8))
    }
    tensors |= {
        f"blk.0.attn_{x}.bias": rng.standard_normal(rows, np.float32)
        for x, rows in (("q", 16), ("k", 8))
    }
    weights = opened(architecture, tensors, attention__key_length=8, attention__value_length=8)
    hidden = torch.from_numpy(rng.standard_normal((5, 8), np.float32))
    angles = torch.arange(5.0)[:, None, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])

    def scores(
        read: Callable[[str, str], torch.Tensor], rotate: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        query, key = (
            torch.nn.functional.linear(hidden, read(x, "weight"), read(x, "bias")) for x in "qk"
        )
        query = rotate(query.view(5, 2, 8), angles)
        key = rotate(key.view(5, 1, 8), angles)
        return torch.einsum("thd,sgd->hts", query, key)

    def ours(x: str, part: str) -> torch.Tensor:
        return weights.read(f"model.layers.0.self_attn.{x}_proj.{part}")

    def theirs(x: str, part: str) -> torch.Tensor:
        return torch.from_numpy(tensors[f"blk.0.attn_{x}.{part}"])

    torch.testing.assert_close(scores(ours, rotate_halves), scores(theirs, rotate_neighbours))
    assert not torch.equal(ours("q", "weight"), theirs("q", "weight"))
    assert ours("q", "weight").is_contiguous()


def test_the_converters_permutation_is_undone(opened: Open) -> None:
    """The permutation as convert_hf_to_gguf does it: (heads, 2, D/2) to (heads, D/2, 2)."""
    rng = np.random.default_rng(1)
    original = {"q": rng.standard_normal((16, 8), np.float32), "k": rng.standard_normal((8, 8))}
    tensors = model_tensors()
    for name, heads in (("q", 2), ("k", 1)):
        rows = original[name].astype(np.float32)
        permuted = rows.reshape(heads, 2, 4, 8).swapaxes(1, 2).reshape(rows.shape)
        tensors[f"blk.1.attn_{name}.weight"] = np.ascontiguousarray(permuted)
    weights = opened(tensors=tensors, attention__key_length=8)
    for name in "qk":
        found = weights.read(f"model.layers.1.self_attn.{name}_proj.weight")
        assert np.array_equal(found.numpy(), original[name].astype(np.float32))
        for rows in (range(3), range(3, 7), range(2, len(found))):  # across halves and heads
            part = weights.read(f"model.layers.1.self_attn.{name}_proj.weight", rows)
            assert part.is_contiguous() and part.equal(found[rows.start : rows.stop])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_rows_stay_where_they_are(architecture: str, opened: Open) -> None:
    tensors = model_tensors(architecture)
    found = opened(architecture, tensors).read("model.layers.0.self_attn.q_proj.weight")
    assert np.array_equal(found.numpy(), tensors["blk.0.attn_q.weight"])


def test_old_rotation_tables_are_left_out(opened: Open) -> None:
    tensors = model_tensors() | {"blk.0.attn_rot_embd.weight": np.ones(2, np.float32)}
    assert len(opened(tensors=tensors).tensors()) == len(tensors) - 1


# Rope factors ---------------------------------------------------------------------------------


def test_llama_3_factors_give_the_frequencies_of_the_original(opened: Open) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 100.0,
    }  # fmt: skip
    original = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, rope_parameters=scaling, max_position_embeddings=64
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](original, torch.device("cpu"))
    plain = 100.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = (plain / expected).numpy()
    assert factors.max() == pytest.approx(32) and factors.min() == pytest.approx(1)
    rng = np.random.default_rng(0)
    tensors = model_tensors() | {"rope_freqs.weight": factors}
    for layer in range(2):
        for name, rows in (("q", 32), ("k", 16)):
            tensors[f"blk.{layer}.attn_{name}.weight"] = rng.standard_normal((rows, 8), np.float32)
    keys = {"attention__key_length": 16, "attention__value_length": 16, "rope__freq_base": 100.0}
    weights = opened(tensors=tensors, **keys)
    assert "rope_freqs.weight" not in weights.tensors()
    found = weights.rope_factors()
    assert found is not None and np.array_equal(found, factors)
    rope = ModelConfig.from_hf(weights.config()).rope
    torch.testing.assert_close(inverse_frequencies(rope, 16), expected)


def test_without_factors_there_are_none(opened: Open) -> None:
    weights = opened()
    assert weights.rope_factors() is None
    assert weights.config()["rope_scaling"] is None


@pytest.mark.parametrize(
    ("factors", "keys", "expected"),
    [
        ([1.0], {}, r"rope_freqs.weight has shape \(1,\), expected is \(2,\)"),
        ([1.0, 0.0], {}, "not positive numbers"),
        ([1.0, float("nan")], {}, "not positive numbers"),
        ([1.0, 2.0], {"rope__scaling__factor": 4.0}, "both rope_freqs.weight and rope scaling"),
    ],
)
def test_unusable_factors_are_refused(
    factors: list[float], keys: dict[str, Any], expected: str, opened: Open
) -> None:
    tensors = model_tensors() | {"rope_freqs.weight": np.array(factors, np.float32)}
    weights = opened(tensors=tensors, **keys)
    with pytest.raises(ModelLoadError, match=expected):
        weights.config()


# Config ---------------------------------------------------------------------------------------


def test_config_is_complete(opened: Open) -> None:
    weights = opened(
        tensors=model_tensors(tied=True),
        rope__freq_base=500_000.0,
        tokenizer__ggml__bos_token_id=0,
        tokenizer__ggml__eos_token_id=1,
        tokenizer__ggml__padding_token_id=3,
    )
    assert weights.config() == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,  # as in config.json, not the nearest float32
        "rope_theta": 500_000.0,
        "rope_scaling": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 3,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    ],
)
def test_the_native_network_reads_the_config(
    architecture: str, expected: str, opened: Open
) -> None:
    config = opened(architecture).config()
    assert config["architectures"] == [expected]
    read = ModelConfig.from_hf(config)
    assert (read.num_layers, read.num_heads, read.num_kv_heads, read.head_dim) == (2, 2, 1, 4)
    assert read.has_qkv_bias is (architecture == "qwen2")
    assert read.has_qk_norm is (architecture == "qwen3")


def test_biases_are_seen_in_the_tensors(opened: Open) -> None:
    rows = {"attn_q": 8, "attn_k": 4, "attn_v": 4, "attn_output": 8}
    rows |= {"ffn_gate": 12, "ffn_up": 12, "ffn_down": 8}
    biases = {
        f"blk.{layer}.{name}.bias": np.ones(size, np.float32)
        for layer in range(2)
        for name, size in rows.items()
    }
    weights = opened(tensors=model_tensors() | biases)
    config = weights.config()
    assert config["attention_bias"] is config["mlp_bias"] is True
    assert "model.layers.1.self_attn.o_proj.bias" in weights.tensors()


def test_rows_of_the_embedding_decide_the_vocabulary(opened: Open) -> None:
    keys = {"tokenizer__ggml__tokens": ["a", "b", "c"], "vocab_size": 2}
    assert opened(**keys).config()["vocab_size"] == 4


@pytest.mark.parametrize(
    ("keys", "name", "expected"),
    [
        ({}, "num_key_value_heads", 2),
        ({"llama.attention.head_count_kv": 1}, "num_key_value_heads", 1),
        ({"llama.attention.head_count_kv": [1, 1]}, "num_key_value_heads", 1),
        ({"llama.attention.key_length": 16}, "head_dim", 16),
        ({}, "rope_theta", 10_000.0),
        ({"llama.rope.freq_base": 1e6}, "rope_theta", 1e6),
        ({}, "rope_scaling", None),
        ({"llama.rope.scaling.type": "none"}, "rope_scaling", None),
        ({"llama.rope.scaling.factor": 1.0}, "rope_scaling", None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            "rope_scaling",
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {"llama.rope.scale_linear": 2.0},
            "rope_scaling",
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({"tokenizer.ggml.tokens": None, "llama.vocab_size": 77}, "vocab_size", 77),
        ({"llama.vocab_size": 77}, "vocab_size", 3),
        ({}, "bos_token_id", None),
        ({}, "eos_token_id", None),
        ({"tokenizer.ggml.eos_token_id": 2}, "eos_token_id", 2),
        (
            {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 2},
            "eos_token_id",
            2,
        ),
        (
            {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 1},
            "eos_token_id",
            [2, 1],
        ),
        ({"llama.attention.sliding_window": 32}, "sliding_window", 32),
        ({"llama.attention.sliding_window": 32}, "model_type", "mistral"),
        ({"llama.attention.sliding_window": 0}, "model_type", "llama"),
        ({"split.count": 1, "general.type": "model"}, "model_type", "llama"),
    ],
)
def test_a_key_becomes_a_setting(keys: dict[str, Any], name: str, expected: Any) -> None:
    assert hf_config(metadata(**keys))[name] == expected


def test_linear_scaling_does_not_stretch_the_context_twice() -> None:
    """GGUF's context length is the stretched one; in HF's config it is the trained one."""
    config = hf_config(metadata(**{"llama.rope.scaling.factor": 4.0}))
    assert ModelConfig.from_hf(config).context_length == 64


def test_a_token_outside_the_vocabulary_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = {"tokenizer.ggml.padding_token_id": 2**32 - 1, "tokenizer.ggml.bos_token_id": 2}
    with caplog.at_level(logging.WARNING):
        config = hf_config(metadata(**keys), source="x.gguf")
    assert (config["pad_token_id"], config["bos_token_id"]) == (None, 2)
    assert "x.gguf: tokenizer.ggml.padding_token_id 4294967295 is no token" in caplog.text


REQUIRED = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ModelLoadError, match=f"x.gguf: metadata key 'llama.{key}' is missing; "):
        hf_config(metadata(**{f"llama.{key}": None}), source="x.gguf")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"general.architecture": None}, "architecture None is not supported"),
        ({"general.architecture": ["llama"]}, r"architecture \['llama'\] is not supported"),
        (
            {"general.architecture": "gemma3"},
            "'gemma3' is not supported from GGUF .supported: llama, mistral, qwen2, qwen3.",
        ),
        ({"general.type": "adapter"}, "holds a 'adapter', not a model"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.attention.causal": False}, "encoder"),
        ({"llama.block_count": 0}, "llama.block_count is 0, not a positive whole number"),
        ({"llama.block_count": True}, "llama.block_count is True"),
        ({"llama.block_count": 2.0}, "llama.block_count is 2.0"),
        ({"llama.block_count": "2"}, "llama.block_count is '2'"),
        ({"llama.block_count": 2**31}, "llama.block_count is 2147483648"),
        ({"llama.attention.head_count": [2, 1]}, r"head_count is \[2, 1\], not a positive"),
        ({"llama.attention.head_count": []}, r"head_count is \[\]"),
        ({"llama.attention.head_count": 9}, "attention.key_length' is missing"),
        ({"llama.attention.value_length": 2}, "value_length is 2, only 4"),
        ({"llama.rope.dimension_count": 2}, "dimension_count is 2, only 4"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base is nan, not a positive number"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base is inf"),
        ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "epsilon is 'x'"),
        ({"llama.rope.scaling.type": "yarn"}, "scaling.type is 'yarn', supported are none, linear"),
        ({"llama.rope.scaling.factor": -2.0}, "scaling.factor is -2.0"),
        ({"tokenizer.ggml.tokens": None}, "'llama.vocab_size' is missing"),
    ],
)
def test_unusable_metadata_is_refused(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelLoadError, match=expected) as caught:
        hf_config(metadata(**keys), source="x.gguf")
    assert caught.value.message.startswith("x.gguf: ")
    assert "\n" not in caught.value.message


# Tensors that do not fit ----------------------------------------------------------------------


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in model_tensors().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (without("token_embd.weight"), "no tensor token_embd.weight"),
        (model_tensors(num_layers=1), "says 2 layers, it has tensors of 1"),
        (model_tensors(num_layers=3), "says 2 layers, it has tensors of 3"),
        (
            model_tensors() | {"blk.0.ffn_gate_inp.weight": np.ones((2, 8), np.float32)},
            "'blk.0.ffn_gate_inp.weight' is not part of a dense llama network",
        ),
        (
            model_tensors() | {"blk.00.attn_q.weight": np.ones((8, 8), np.float32)},
            "'blk.00.attn_q.weight' is not part",
        ),
        (model_tensors() | {"cls.weight": np.ones((2, 8), np.float32)}, "'cls.weight' is not part"),
    ],
)
def test_a_file_of_another_network_is_refused(
    tensors: dict[str, np.ndarray], expected: str, opened: Open
) -> None:
    with pytest.raises(ModelLoadError, match=expected):
        opened(tensors=tensors)


def test_rows_that_heads_do_not_share_are_refused(opened: Open) -> None:
    tensors = model_tensors() | {"blk.0.attn_q.weight": np.ones((6, 8), np.float32)}
    weights = opened(tensors=tensors)
    with pytest.raises(ModelLoadError, match="has 6 rows, which 2 heads do not share"):
        weights.read("model.layers.0.self_attn.q_proj.weight")


def test_an_unknown_name_is_refused(opened: Open) -> None:
    with pytest.raises(ModelLoadError, match=r"no tensor for 'lm_head\.bias'"):
        opened().read("lm_head.bias")


def test_closing_closes_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", model_tensors())
    with closing(GGUFWeights(GGUFFile.open(path))) as weights:
        assert weights.read("lm_head.weight").shape == (4, 8)
    with pytest.raises(ModelLoadError, match="cannot read"):
        weights.read("lm_head.weight")
