"""How much memory a model takes, before it is loaded: the one place that adds it up.

`chatserve plan`, the loader's check and the worker's KV pool ask here, so that they agree. Reads a
config and headers; allocates nothing and knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from chatserve.errors import ModelLoadError
from chatserve.kernels.library import BLOCK_SIZE
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.device_map import PartBytes
from chatserve.models.form import Form, item_bytes, native_config
from chatserve.models.kernel_limits import HEAD_PACKING, padded
from chatserve.models.packing import GROUP, Packing

MIN_CONTEXT = 256
"""Tokens; below it a chat is not worth starting."""
_KV_SHARE = {"cpu": 0.5, "cuda": 0.9, "mps": 0.7}  # of what is left, where not all fits
# Measured: interpreter, PyTorch and server. On a GPU the driver's context, estimated.
_PROCESS_BYTES = {"cpu": 272 << 20, "cuda": 500 << 20, "mps": 100 << 20}
_TRANSFORMERS_BYTES = 180 << 20  # of main memory, where a network is one of its
_TOKENIZER_BYTES = 800  # of main memory for each token of the vocabulary, while it is read
_LOADING_BYTES = 16 << 20  # slices of tensors, and the holes that they leave in the heap
_SPARE_SHARE = 0.01  # of the weights: what an estimate may be wrong by
_HUGE_PAGE = 2 << 20  # in which the kernels keep larger buffers
_ATTENTION_ROWS = 6  # whose scores the kernels keep at once


@dataclass(frozen=True)
class MemoryPlan:
    """What one worker takes on one device, in bytes.

    `process_bytes` are there before anything is loaded, `spare_bytes` are for what no estimate
    sees. `context`: tokens of each of `concurrency` sequences. `adapter_bytes`: of LoRA adapters
    that are served beside the weights, if somebody has counted them.
    """

    device: str
    form: str
    weights_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    process_bytes: int
    spare_bytes: int
    context: int
    concurrency: int
    adapter_bytes: int = 0

    @property
    def num_kv_tokens(self) -> int:
        """Of all sequences at their full length, in whole blocks."""
        return whole_blocks(self.context) * self.concurrency

    @property
    def kv_bytes(self) -> int:
        return self.num_kv_tokens * self.kv_bytes_per_token

    @property
    def working_bytes(self) -> int:
        """Beside weights, keys and values, in a process that has started."""
        return self.activation_bytes + self.spare_bytes

    @property
    def slack_bytes(self) -> int:
        return self.process_bytes + self.spare_bytes

    @property
    def total_bytes(self) -> int:
        weights = self.weights_bytes + self.adapter_bytes
        return weights + self.kv_bytes + self.activation_bytes + self.slack_bytes

    @property
    def least_bytes(self) -> int:
        """To load the weights, and hold a context that is worth it."""
        least_kv = whole_blocks(min(MIN_CONTEXT, self.context)) * self.kv_bytes_per_token
        return self.weights_bytes + self.working_bytes + least_kv

    def kv_tokens_beside(self, free_bytes: int) -> int:
        """How many tokens a worker keeps with `free_bytes` beside its weights, in whole blocks.

        All that is planned, where it fits; else a share of what is left, so that a machine is not
        filled by what might be asked for, but no less than one sequence may need.
        """
        left = max(0, free_bytes - self.working_bytes)
        if self.kv_bytes <= left:
            return self.num_kv_tokens
        block_bytes = self.kv_bytes_per_token * BLOCK_SIZE
        first = min(left // block_bytes * BLOCK_SIZE, whole_blocks(self.context))
        shared = int(left * _KV_SHARE[self.device]) // block_bytes * BLOCK_SIZE
        return max(first, shared)

    def context_within(self, memory_bytes: int) -> int:
        """The longest context with which `memory_bytes` would do; 0 where none is worth it."""
        left = memory_bytes - (self.total_bytes - self.kv_bytes)
        block_bytes = self.kv_bytes_per_token * BLOCK_SIZE * self.concurrency
        context = min(max(0, left) // block_bytes * BLOCK_SIZE, self.context)
        return context if context >= min(MIN_CONTEXT, self.context) else 0

    def fits(self, memory_bytes: int) -> bool:
        return self.total_bytes <= memory_bytes


def plan_memory(
    checkpoint: Checkpoint,
    form: Form,
    *,
    context: int | None = None,
    concurrency: int = 1,
    max_rows: int = 512,
) -> MemoryPlan:
    """What `checkpoint` takes under `form` with `concurrency` sequences of `context` tokens.

    `context`: at most, None for all that the model holds. `max_rows`: tokens of one step.
    Raises `ModelLoadError` when config.json does not tell.
    """
    longest = context_length(checkpoint.config)
    context = longest if context is None else min(context, longest)
    kind = form.kind
    spare = _LOADING_BYTES
    kv_item_bytes = item_bytes(form)
    if is_native(checkpoint.config):
        config = native_config(checkpoint)
        kv_item_bytes = 2 if form.on_kernels else kv_item_bytes
        weights = weights_bytes(config, form)
        spare += _page_ends(config, form)
        activations = _activation_bytes(config, form, max_rows, context, concurrency)
    else:
        weights = _fallback_weights_bytes(checkpoint, form)
        activations = _fallback_activation_bytes(checkpoint, form, max_rows)
    spare += int(weights * _SPARE_SHARE)
    return MemoryPlan(
        device=kind,
        form=str(form.packing) if form.packing else form.dtype_name,
        weights_bytes=weights,
        kv_bytes_per_token=kv_bytes_per_token(checkpoint.config, kv_item_bytes),
        activation_bytes=activations,
        process_bytes=_process_bytes(checkpoint, kind),
        spare_bytes=spare,
        context=context,
        concurrency=concurrency,
    )


def whole_blocks(num_tokens: int) -> int:
    """`num_tokens` rounded up to blocks of the KV cache."""
    return -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE


def weights_bytes(config: ModelConfig, form: Form) -> int:
    """The network of `config` in the form that `form` gives it."""
    parts = part_bytes(config, form)
    return parts.embedding + config.num_layers * parts.block + parts.head


def part_bytes(config: ModelConfig, form: Form) -> PartBytes:
    """The same part by part; a tied embedding counts as the head."""
    size, hidden = item_bytes(form), config.hidden_size
    matrices, head = _matrices(config), (config.vocab_size, hidden)
    num_plain = config.num_parameters - hidden  # norms and biases, but for the final norm
    num_plain -= math.prod(head) * (1 if config.is_tied else 2)
    num_plain = num_plain // config.num_layers - sum(map(math.prod, matrices))
    table = 0 if config.is_tied else math.prod(head)
    if form.packing is None:
        num_block = sum(map(math.prod, matrices)) + num_plain
        return PartBytes(table * size, num_block * size, (math.prod(head) + hidden) * size)
    if form.on_kernels:
        block = sum(_packed_bytes(*shape, form.packing) for shape in matrices) + 4 * num_plain
        table *= 4 if form.dtype_name == "float32" else 2
        return PartBytes(table, block, _packed_bytes(*head, HEAD_PACKING) + 4 * hidden)

    def packed(rows: int, columns: int) -> int:
        assert form.packing is not None
        per_row = 0 if form.packing.is_grouped else 2
        return int(rows * columns * form.packing.bytes_per_weight) + rows * per_row

    block = sum(packed(*shape) for shape in matrices) + num_plain * size
    return PartBytes(table * size, block, packed(*head) + hidden * size)


def adapter_bytes(form: Form, num_values: int) -> int:
    """Of LoRA adapters beside the base; the CPU kernels have them in half precision."""
    return num_values * (2 if form.on_kernels else item_bytes(form))


def context_length(config: Mapping[str, object]) -> int:
    """Tokens that the model of a `config.json` holds, native or not."""
    if is_native(config):
        return ModelConfig.from_hf(config).context_length
    from chatserve.models.fallback import read_hf_config, refusals

    hf_config = read_hf_config(config)
    with refusals("config.json, context length"):
        hf_config = hf_config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = getattr(hf_config, name, None)
            if type(value) is int and 0 < value <= 1 << 31:
                return value
    raise ModelLoadError("config.json does not say how long a context the model holds")


def kv_bytes_per_token(config: Mapping[str, object], bytes_per_value: int) -> int:
    """Keys and values of one token in all layers, native or not."""
    if is_native(config):
        return ModelConfig.from_hf(config).kv_bytes_per_token(bytes_per_value)
    from chatserve.models.fallback import read_hf_config, refusals

    hf_config = read_hf_config(config)
    with refusals("config.json, size of keys and values"):
        hf_config = hf_config.get_text_config()
        heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
        dim = getattr(hf_config, "head_dim", None)
        dim = dim or hf_config.hidden_size // hf_config.num_attention_heads
        num_bytes = int(2 * hf_config.num_hidden_layers * heads * dim * bytes_per_value)
    if not 0 < num_bytes < 1 << 62:
        raise ModelLoadError(
            "config.json gives no possible size of keys and values; the file is damaged"
        )
    return num_bytes


def _process_bytes(checkpoint: Checkpoint, kind: str) -> int:
    """What is there beside the model; of a GPU its own memory alone."""
    if kind != "cpu":
        return _PROCESS_BYTES[kind]
    size = checkpoint.config.get("vocab_size")
    num_tokens = min(size, 1 << 20) if type(size) is int and size > 0 else 0
    library = 0 if is_native(checkpoint.config) else _TRANSFORMERS_BYTES
    return _PROCESS_BYTES[kind] + library + _TOKENIZER_BYTES * num_tokens


def _matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of one block's matrices: qkv, output, gate and up, down."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads_out = config.num_heads * config.head_dim
    qkv = heads_out + 2 * config.num_kv_heads * config.head_dim
    return [(qkv, hidden), (hidden, heads_out), (2 * ffn, hidden), (hidden, ffn)]


def _packed_bytes(rows: int, columns: int, packing: Packing) -> int:
    """In the kernels' layout: whole panels; one float32 scale a row where there are such."""
    rows = padded(rows)
    return int(rows * columns * packing.bytes_per_weight) + (
        4 * rows if packing.has_row_scales else 0
    )


def _page_ends(config: ModelConfig, form: Form) -> int:
    """What the kernels' packed matrices leave unused at the end of their last huge pages."""
    if not form.on_kernels or form.packing is None:
        return 0
    # codes and scales lie apart, and scales are mostly smaller than such a page
    sizes = [padded(rows) * columns * form.packing.bits // 8 for rows, columns in _matrices(config)]
    return config.num_layers * sum(-size % _HUGE_PAGE for size in sizes if size >= _HUGE_PAGE)


def _activation_bytes(
    config: ModelConfig, form: Form, max_rows: int, context: int, concurrency: int
) -> int:
    """A step of `max_rows` tokens, its logits, and the table of angles."""
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads_out, kv_out = config.num_heads * dim, 2 * config.num_kv_heads * dim
    logits = concurrency * config.vocab_size * 4
    angles = 2 * context * dim * 4  # float32, and what they are computed from
    if form.on_kernels and form.packing:
        floats = hidden + 2 * heads_out + kv_out + ffn
        widest = max(hidden, ffn, heads_out)
        codes = form.packing.activation_bits // 8 * (widest + 8 * widest // GROUP)
        scores = 2 * _ATTENTION_ROWS * context * 4
        return max_rows * (4 * floats + codes) + scores + logits + angles
    # gate and up, their product on the way, and the rows that stay beside them
    values = 4 * ffn + 3 * hidden + heads_out + kv_out
    gathered = context * kv_out  # keys and values of a sequence whose blocks lie scattered
    return (max_rows * values + gathered) * item_bytes(form) + logits + angles


def _fallback_weights_bytes(checkpoint: Checkpoint, form: Form) -> int:
    """At the peak: they come whole in half precision, and are packed one by one after that."""
    infos = checkpoint.weights.tensors().values()
    num_weights = sum(math.prod(info.shape) for info in infos)
    return num_weights * item_bytes(form)


def _fallback_activation_bytes(checkpoint: Checkpoint, form: Form, max_rows: int) -> int:
    """Sixteen times the hidden size, as blocks of other families have it: a guess."""
    shapes = (info.shape for info in checkpoint.weights.tensors().values())
    hidden = max((min(shape) for shape in shapes if len(shape) == 2), default=0)
    return 16 * max_rows * min(hidden, 1 << 16) * item_bytes(form)
