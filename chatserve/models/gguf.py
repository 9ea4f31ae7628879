"""A GGUF model in Hugging Face's terms: `GGUFWeights` by HF names, `hf_config` as a `config.json`.

Knows the architectures; the bytes are `gguf_file.py`'s and `gguf_header.py`'s.
Source of keys and names: docs/gguf.md of ggml, tensor names of llama.cpp.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from chatserve.errors import ModelLoadError
from chatserve.models.gguf_file import GGUFFile
from chatserve.models.gguf_header import quote
from chatserve.models.gguf_parts import GGUFSource
from chatserve.models.gguf_quants import Floats
from chatserve.models.weights import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["GGUFFile", "GGUFWeights", "hf_config"]

logger = logging.getLogger(__name__)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# llama.cpp rotates neighbours (0, 1), (2, 3) … in these: its converter moves the rows of q and k.
_INTERLEAVED_ROPE = {"llama", "mistral"}

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
# Tables that old converters stored; every network computes them itself.
_TABLES = re.compile(r"blk\.[0-9]+\.attn_rot_embd\.weight")


class GGUFWeights:
    """The weights of a GGUF file under Hugging Face names: a `WeightSource`.

    Query and key rows come in HF's layout (halves), whatever the file holds. Owns the file.
    Raises `ModelLoadError` for an architecture, a tensor or a metadata value that the native
    network does not have.
    """

    def __init__(self, file: GGUFSource) -> None:
        self._file = file
        self._config = hf_config(file.metadata, source=str(file.path))
        self._sources: dict[str, str] = {}  # HF name -> GGUF name
        for name in file.tensors():
            if name != _ROPE_FACTORS and not _TABLES.fullmatch(name):
                self._sources[self._hf_name(name)] = name
        self._check_parts()
        self._num_heads = {
            "q": self._config["num_attention_heads"],
            "k": self._config["num_key_value_heads"],
        }
        self._is_interleaved = file.metadata["general.architecture"] in _INTERLEAVED_ROPE

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers by HF name, in disk order."""
        headers = self._file.tensors()
        return {name: headers[raw]._replace(name=name) for name, raw in self._sources.items()}

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """One tensor on the CPU, or some of its rows, contiguous; quantised types as float32."""
        source = self._sources.get(name)
        if source is None:
            raise ModelLoadError(f"{self._file.path} has no tensor for {name!r}; download it again")
        layer = _LAYER.fullmatch(source)
        if self._is_interleaved and layer and layer[2] in ("attn_q", "attn_k"):
            return self._read_halves(source, self._num_heads[layer[2][-1]], rows)
        return self._file.read(source, rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def config(self) -> dict[str, Any]:
        """`hf_config` and what only the tensors tell: a tied head, biases, rope factors, rows.

        Llama 3's rope scaling becomes {"rope_type": "factors", "factors": [...]}.
        """
        names = self._file.tensors().keys()
        config = dict(self._config)
        config["vocab_size"] = self._file.tensors()["token_embd.weight"].shape[0]
        config["tie_word_embeddings"] = "output.weight" not in names
        config["attention_bias"] = "blk.0.attn_q.bias" in names
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
        factors = self.rope_factors()
        if factors is not None:
            if config["rope_scaling"] is not None:
                self._fail(
                    f"has both {_ROPE_FACTORS} and rope scaling {config['rope_scaling']}, "
                    "which exclude each other"
                )
            config["rope_scaling"] = {"rope_type": "factors", "factors": factors.tolist()}
        return config

    def rope_factors(self) -> Floats | None:
        """Divisors of the rotary frequencies, (D/2,) float32; None where the file has none.

        llama.cpp's converter stores Llama 3's scaling in this form: the frequencies of `rope_theta`
        divided by these factors are those that the original `rope_scaling` gives.
        """
        header = self._file.tensors().get(_ROPE_FACTORS)
        if header is None:
            return None
        expected = (self._config["head_dim"] // 2,)
        if header.shape != expected:
            self._fail(f"{_ROPE_FACTORS} has shape {header.shape}, expected is {expected}")
        factors = self._file.read_floats(_ROPE_FACTORS)
        if not (np.isfinite(factors) & (factors > 0)).all():
            self._fail(f"{_ROPE_FACTORS} holds values that are not positive numbers")
        return factors

    def _check_parts(self) -> None:
        """The embedding is there, and as many layers as the metadata says."""
        if "model.embed_tokens.weight" not in self._sources:
            raise ModelLoadError(
                f"{self._file.path} has no tensor token_embd.weight: it holds a vocabulary or a "
                "part of a model; give the file of a whole model"
            )
        layers = (_LAYER.fullmatch(source) for source in self._sources.values())
        num_layers = len({layer[1] for layer in layers if layer})
        expected = self._config["num_hidden_layers"]
        if num_layers != expected:
            self._fail(f"its metadata says {expected:,} layers, it has tensors of {num_layers:,}")

    def _hf_name(self, name: str) -> str:
        if known := _NAMES.get(name):
            return known
        layer = _LAYER.fullmatch(name)
        if layer is None or layer[2] not in _LAYER_NAMES:
            self._fail(
                f"tensor {quote(name)} is not part of a dense {self._config['model_type']} network"
            )
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"

    def _read_halves(self, name: str, num_heads: int, rows: range | None) -> torch.Tensor:
        """Undo the converter's permutation of rows: in each head (D/2, 2) goes back to (2, D/2)."""
        num_rows = self._file.tensors()[name].shape[0]
        if num_rows % (2 * num_heads):
            self._fail(
                f"tensor {quote(name)} has {num_rows:,} rows, which {num_heads} heads do not share"
            )
        dim = num_rows // num_heads
        wanted = range(num_rows) if rows is None else rows
        whole = range(wanted.start // dim * dim, -(-wanted.stop // dim) * dim)  # whole heads
        tensor = self._file.read(name, whole)
        pairs = tensor.reshape(len(whole) // dim, dim // 2, 2, -1)
        halves = pairs.transpose(1, 2).reshape(tensor.shape)
        return halves[wanted.start - whole.start : wanted.stop - whole.start]

    def _fail(self, what: str) -> NoReturn:
        raise ModelLoadError(f"{self._file.path}: {what}; take another conversion of the model")


def hf_config(metadata: Mapping[str, Any], *, source: str = "the GGUF metadata") -> dict[str, Any]:
    """What a `config.json` would say, as far as the metadata tells; the rest: `GGUFWeights.config`.

    `max_sequence_length` is there beside linear scaling: GGUF's context length is the stretched
    one. Raises `ModelLoadError` naming `source` and the key that is missing, wrong or unsupported.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ModelLoadError(
            f"{source}: architecture {quote(architecture)} is not supported from GGUF (supported: "
            f"{', '.join(_ARCHITECTURES)}); take the model's Hugging Face folder"
        )
    reader = _Metadata(metadata, architecture, source)
    reader.refuse_unsupported()
    heads = reader.count("attention.head_count")
    hidden = reader.count("embedding_length")
    head_dim = reader.count("attention.key_length", default=hidden // heads or None)
    reader.expect("attention.value_length", head_dim)
    reader.expect("rope.dimension_count", head_dim)
    window = reader.count("attention.sliding_window", default=0)
    if architecture == "llama" and window:
        architecture = "mistral"  # the same network, in HF's terms the one that has a window
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": reader.count("feed_forward_length"),
        "num_hidden_layers": reader.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.count("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "vocab_size": reader.vocab_size(),
        "max_position_embeddings": reader.count("context_length"),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": reader.number("rope.freq_base", default=10_000.0),
        "rope_scaling": reader.rope_scaling(),
        **reader.token_ids(),
    }
    if config["rope_scaling"] is not None:
        config["max_sequence_length"] = config["max_position_embeddings"]
    if window:
        config["sliding_window"] = window
    return config


class _Metadata:
    """Typed access to the keys of one architecture, with messages that name file and key."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: str) -> None:
        self._metadata = metadata
        self._architecture = architecture
        self._source = source

    def refuse_unsupported(self) -> None:
        """Raise for files that are parts of models, or networks that only share the name."""
        kind = self._metadata.get("general.type", "model")
        if kind != "model":
            self._fail(f"it holds a {quote(kind)}, not a model; give the file of the model itself")
        if self._get("expert_count"):
            self._fail("mixture-of-experts models are not supported; take a dense one")
        if self._get("attention.causal") is False:
            self._fail("it is an encoder, not a chat model; take a causal model")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; one value per layer is accepted where all are equal."""
        value = self._get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None and default is not None:
            return default
        if value == 0 and default == 0:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            self._fail_value(key, value, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; float32 as people write it: 1e-05, not 9.999999747378752e-06."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < 1e30:
            self._fail_value(key, value, "a positive number")
        return float(str(np.float32(value)))

    def expect(self, key: str, expected: int) -> None:
        """Raise unless the key is absent or has the value that the native network assumes."""
        value = self._get(key)
        if value not in (None, expected):
            self._fail(
                f"{self._key(key)} is {quote(value)}, only {expected} (the head size) is "
                "supported; take the model's Hugging Face folder"
            )

    def vocab_size(self) -> int:
        """The number of tokens; its own key is stale in files to which tokens were added."""
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and tokens:
            return len(tokens)
        return self.count("vocab_size")

    def rope_scaling(self) -> dict[str, Any] | None:
        """HF's table for linear scaling, None without scaling."""
        kind = self._get("rope.scaling.type")
        key = "rope.scaling.factor"
        if self._get(key) is None and self._get("rope.scale_linear") is not None:
            key = "rope.scale_linear"  # its name in 2023
        if kind not in (None, "none", "linear"):
            self._fail(
                f"{self._key('rope.scaling.type')} is {quote(kind)}, supported are none, linear "
                f"and {_ROPE_FACTORS}; take the model's Hugging Face folder"
            )
        if kind == "none" or self._get(key) in (None, 0, 1):  # llama.cpp: 0 means not scaled
            return None
        return {"rope_type": "linear", "factor": self.number(key)}

    def token_ids(self) -> dict[str, Any]:
        """`bos_token_id`, `eos_token_id` (a list where turns have ends of their own), `pad_…`."""
        ends = [self._token_id(name) for name in ("eos", "eot", "eom")]
        unique = list(dict.fromkeys(end for end in ends if end is not None))
        return {
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": unique[0] if len(unique) == 1 else unique or None,
            "pad_token_id": self._token_id("padding"),
        }

    def _token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < self.vocab_size():
            # llama.cpp does the same: converters have written -1 for "none"
            logger.warning("%s: %s %s is no token: ignored", self._source, key, quote(value))
            return None
        return value

    def _key(self, key: str) -> str:
        return f"{self._architecture}.{key}"

    def _get(self, key: str) -> Any:
        return self._metadata.get(self._key(key))

    def _fail_value(self, key: str, value: Any, expected: str) -> NoReturn:
        if value is None:
            self._fail(f"metadata key {self._key(key)!r} is missing; convert the model again")
        self._fail(f"{self._key(key)} is {quote(value)}, not {expected}; convert the model again")

    def _fail(self, what: str) -> NoReturn:
        raise ModelLoadError(f"{self._source}: {what}")
