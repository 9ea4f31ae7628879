"""The Llama family's network, readable in one sitting. No files, no cache policy, no family names.

LLaMA, Vicuna, StackLLaMA, Llama 2/3, Mistral, Qwen2, Qwen3, SmolLM2, TinyLlama: one block with
optional biases, q/k norms and sliding windows. Source: modeling_llama.py, modeling_qwen2.py,
modeling_qwen3.py and modeling_mistral.py of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from chatserve.models.attention import attend_batch
from chatserve.models.batch import Batch
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.kv_pool import Placement, TorchKVPool
from chatserve.models.linear import Linear, Parameter, RowLoader, build_matrix
from chatserve.models.rope import RotaryTable, rotate


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint tensor of `shape` goes: rows `start` and on of `target`."""

    target: RowLoader
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """What every layer needs to know of a batch: its angles (N, ·), and its place in the pool."""

    cos: torch.Tensor
    sin: torch.Tensor
    pool: TorchKVPool
    placement: Placement


class RMSNorm:
    """x / sqrt(mean(x²) + eps) in float32, cast back, times the weight (D,)."""

    def __init__(self, size: int, eps: float, policy: DevicePolicy) -> None:
        self.scale = Parameter(size, policy.device, policy.dtype)
        self._eps = eps
        self._size = (size,)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self._size, self.scale.weight, self._eps)


class Attention:
    """Self-attention with fused q, k, v rows."""

    def __init__(self, config: ModelConfig, layer: int, policy: DevicePolicy) -> None:
        self._layer = layer
        self._backend = policy.attention
        self._window = config.sliding_windows[layer]
        self._heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._head_dim = config.head_dim
        heads_out = config.num_heads * config.head_dim
        self.qkv = build_matrix(
            sum(self._heads) * config.head_dim,
            config.hidden_size,
            bias=config.has_qkv_bias,
            policy=policy,
        )
        self.output = build_matrix(
            config.hidden_size, heads_out, bias=config.has_output_bias, policy=policy
        )
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if config.has_qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, policy)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, policy)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        cos, sin = step.cos, step.sin
        heads = self.qkv(x).view(x.shape[0], -1, self._head_dim)  # (N, H + 2K, D)
        num_heads, num_kv_heads, _ = self._heads
        values = heads[:, num_heads + num_kv_heads :]
        if self.query_norm is None or self.key_norm is None:
            turned = rotate(heads[:, : num_heads + num_kv_heads], cos, sin)
            queries, keys = turned[:, :num_heads], turned[:, num_heads:]
        else:
            queries = rotate(self.query_norm(heads[:, :num_heads]), cos, sin)
            keys = rotate(self.key_norm(heads[:, num_heads : num_heads + num_kv_heads]), cos, sin)
        mixed = attend_batch(
            queries,
            keys,
            values,
            self._layer,
            step.pool,
            step.placement,
            backend=self._backend,
            window=self._window,
        )
        return self.output(mixed)


class MLP:
    """down(silu(gate x) * up x) with gate and up fused."""

    def __init__(self, config: ModelConfig, policy: DevicePolicy) -> None:
        hidden, bias = config.hidden_size, config.has_mlp_bias
        self._size = config.intermediate_size
        self.gate_up = build_matrix(2 * self._size, hidden, bias=bias, policy=policy)
        self.down = build_matrix(hidden, self._size, bias=bias, policy=policy)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)  # (N, 2F)
        return self.down(F.silu(both[:, : self._size]) * both[:, self._size :])


class Block:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, policy: DevicePolicy) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, policy)
        self.attention = Attention(config, layer, policy)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, policy)
        self.mlp = MLP(config, policy)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), step)
        return x + self.mlp(self.mlp_norm(x))


class Llama:
    """Token ids in, logits out, over a flat batch of sequences."""

    def __init__(self, config: ModelConfig, policy: DevicePolicy) -> None:
        self.config = config
        self.policy = policy
        size = (config.vocab_size, config.hidden_size)
        self.head = build_matrix(*size, bias=False, policy=policy)
        # an untied embedding is only ever looked up, row by row: it stays in the model's dtype
        self.embedding = self.head if config.is_tied else Linear(*size, bias=False, policy=policy)
        self.blocks = [Block(config, layer, policy) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, policy)
        self.rotary = RotaryTable(config.rope, config.head_dim, policy.device, policy.dtype)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def build_kv_pool(self, num_blocks: int, block_size: int) -> TorchKVPool:
        return TorchKVPool(num_blocks, block_size, self.device)

    def forward(self, batch: Batch, pool: TorchKVPool) -> torch.Tensor:
        """Logits (R, V) of the batch's output rows, in the dtype. Stores keys and values."""
        ids = torch.tensor(batch.token_ids, device=self.device)
        positions = torch.tensor(batch.positions, device=self.device)
        num_positions = max(segment.num_total for segment in batch.segments)
        cos, sin = self.rotary.at(positions, num_positions)
        step = Step(cos, sin, pool, pool.place(batch.segments))
        x = self.embedding.embed(ids, self.policy.dtype)
        for block in self.blocks:
            x = block(x, step)
        if not batch.output_rows:
            return x.new_empty(0, self.config.vocab_size)
        rows = torch.tensor(batch.output_rows, device=self.device)
        return self.head(self.norm(x[rows]))

    def destinations(self) -> Mapping[str, Destination]:
        """Every checkpoint tensor (Hugging Face names) and where it goes."""
        config = self.config
        hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
        table: dict[str, Destination] = {}

        def add(name: str, target: RowLoader | None, start: int, *shape: int) -> None:
            if target is not None:
                table[name] = Destination(target, start, shape)

        add("model.embed_tokens.weight", self.embedding, 0, config.vocab_size, hidden)
        if not config.is_tied:
            add("lm_head.weight", self.head, 0, config.vocab_size, hidden)
        add("model.norm.weight", self.norm.scale, 0, hidden)
        for index, block in enumerate(self.blocks):
            prefix = f"model.layers.{index}."
            add(prefix + "input_layernorm.weight", block.attention_norm.scale, 0, hidden)
            add(prefix + "post_attention_layernorm.weight", block.mlp_norm.scale, 0, hidden)
            attention, mlp = block.attention, block.mlp
            start = 0
            sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
            for letter, heads in zip("qkv", sizes, strict=True):
                name = f"{prefix}self_attn.{letter}_proj."
                add(name + "weight", attention.qkv, start, heads * dim, hidden)
                add(name + "bias", attention.qkv.bias, start, heads * dim)
                start += heads * dim
            name = prefix + "self_attn.o_proj."
            add(name + "weight", attention.output, 0, hidden, config.num_heads * dim)
            add(name + "bias", attention.output.bias, 0, hidden)
            if attention.query_norm is not None and attention.key_norm is not None:
                add(prefix + "self_attn.q_norm.weight", attention.query_norm.scale, 0, dim)
                add(prefix + "self_attn.k_norm.weight", attention.key_norm.scale, 0, dim)
            for start, letter in ((0, "gate"), (ffn, "up")):
                name = f"{prefix}mlp.{letter}_proj."
                add(name + "weight", mlp.gate_up, start, ffn, hidden)
                add(name + "bias", mlp.gate_up.bias, start, ffn)
            add(prefix + "mlp.down_proj.weight", mlp.down, 0, hidden, ffn)
            add(prefix + "mlp.down_proj.bias", mlp.down.bias, 0, hidden)
        return table
