"""The Llama family's network, readable in one sitting. No files, no cache policy, no family names.

LLaMA, Vicuna, StackLLaMA, Llama 2/3, Mistral, Qwen2, Qwen3, SmolLM2, TinyLlama: one block with
optional biases, q/k norms and sliding windows. Source: modeling_llama.py, modeling_qwen2.py,
modeling_qwen3.py and modeling_mistral.py of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from chatserve.models.adapter import Adapter
from chatserve.models.adapter_places import MATRICES, num_matrices
from chatserve.models.attention import attend_batch
from chatserve.models.batch import Batch
from chatserve.models.config import ModelConfig
from chatserve.models.destinations import (
    BlockTargets,
    Destination,
    NetworkTargets,
    destinations,
)
from chatserve.models.device import DevicePolicy
from chatserve.models.kv_pool import Placement, TorchKVPool
from chatserve.models.linear import Linear, Matrix, Parameter, build_matrix
from chatserve.models.rope import RotaryTable, rotate
from chatserve.models.torch_adapter import AdaptedRows, TorchAdapter


@dataclass(frozen=True)
class Step:
    """What every layer needs to know of a batch: its angles (N, ·), its place in the pool, and
    which rows have an adapter."""

    cos: torch.Tensor
    sin: torch.Tensor
    pool: TorchKVPool
    placement: Placement
    adapted: AdaptedRows | None = None

    def product(self, matrix: Matrix, x: torch.Tensor, index: int) -> torch.Tensor:
        """x times `matrix`, which is the `index`-th of those that adapters change."""
        y = matrix(x)
        if self.adapted is not None:
            self.adapted.change(y, x, index)
        return y


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
        first = len(MATRICES) * self._layer
        heads = step.product(self.qkv, x, first)
        heads = heads.view(x.shape[0], -1, self._head_dim)  # (N, H + 2K, D)
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
        return step.product(self.output, mixed, first + 1)


class MLP:
    """down(silu(gate x) * up x) with gate and up fused."""

    def __init__(self, config: ModelConfig, layer: int, policy: DevicePolicy) -> None:
        hidden, bias = config.hidden_size, config.has_mlp_bias
        self._layer = layer
        self._size = config.intermediate_size
        self.gate_up = build_matrix(2 * self._size, hidden, bias=bias, policy=policy)
        self.down = build_matrix(hidden, self._size, bias=bias, policy=policy)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        first = len(MATRICES) * self._layer
        both = step.product(self.gate_up, x, first + 2)  # (N, 2F)
        inner = F.silu(both[:, : self._size]) * both[:, self._size :]
        return step.product(self.down, inner, first + 3)


class Block:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, policy: DevicePolicy) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, policy)
        self.attention = Attention(config, layer, policy)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, policy)
        self.mlp = MLP(config, layer, policy)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), step)
        return x + self.mlp(self.mlp_norm(x), step)

    def targets(self) -> BlockTargets:
        attention, mlp = self.attention, self.mlp
        query_norm, key_norm = attention.query_norm, attention.key_norm
        return BlockTargets(
            attention_norm=self.attention_norm.scale, qkv=attention.qkv, output=attention.output,
            mlp_norm=self.mlp_norm.scale, gate_up=mlp.gate_up, down=mlp.down,
            qkv_bias=attention.qkv.bias, output_bias=attention.output.bias,
            gate_up_bias=mlp.gate_up.bias, down_bias=mlp.down.bias,
            query_norm=query_norm.scale if query_norm else None,
            key_norm=key_norm.scale if key_norm else None,
        )  # fmt: skip


class Llama:
    """Token ids in, logits out, over a flat batch of sequences."""

    def __init__(
        self,
        config: ModelConfig,
        policy: DevicePolicy,
        *,
        head_policy: DevicePolicy | None = None,
        build_block: Callable[[ModelConfig, int, DevicePolicy], Block] = Block,
    ) -> None:
        """`head_policy`: of the head and the final norm, where they lie on another device."""
        head_policy = head_policy or policy
        self.config = config
        self.policy = policy
        self.device = policy.device
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        size = (self.vocab_size, config.hidden_size)
        self.head = build_matrix(*size, bias=False, policy=head_policy)
        # an untied embedding is only ever looked up, row by row: it stays in the model's dtype
        self.embedding = self.head if config.is_tied else Linear(*size, bias=False, policy=policy)
        self.blocks = [build_block(config, layer, policy) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, head_policy)
        self.rotary = RotaryTable(config.rope, config.head_dim, policy.device, policy.dtype)

    def build_kv_pool(self, num_blocks: int, block_size: int) -> TorchKVPool:
        return TorchKVPool(num_blocks, block_size, self.device)

    def build_adapter(self, adapter: Adapter) -> TorchAdapter:
        """`adapter`, which fits `config`, for segments of this network's batches."""
        return TorchAdapter(adapter, self.config, self.policy)

    def forward(self, batch: Batch, pool: TorchKVPool) -> torch.Tensor:
        """As `Model.forward`; the logits are in the dtype."""
        ids = torch.tensor(batch.token_ids, device=self.device)
        positions = torch.tensor(batch.positions, device=self.device)
        num_positions = max(segment.num_total for segment in batch.segments)
        cos, sin = self.rotary.at(positions, num_positions)
        adapted = AdaptedRows.of(batch, self.device)
        step = Step(cos, sin, pool, pool.place(batch.segments), adapted)
        x = self.embedding.embed(ids, self.policy.dtype)
        for block in self.blocks:
            x = block(x, step)
        if batch.hidden is not None:
            rows = torch.tensor(batch.hidden_rows, device=self.device)
            batch.hidden.copy_(self.norm(x[rows]))
        if not batch.output_rows:
            return x.new_empty(0, self.vocab_size)
        rows = torch.tensor(batch.output_rows, device=self.device)
        x = self.norm(x[rows])
        logits = self.head(x)
        if adapted is not None:
            adapted.select(batch.output_rows).change(logits, x, num_matrices(self.config) - 1)
        return logits

    def destinations(self) -> Mapping[str, Destination]:
        """Every checkpoint tensor (Hugging Face names) and where it goes."""
        blocks = [block.targets() for block in self.blocks]
        network = NetworkTargets(self.embedding, self.head, self.norm.scale, blocks)
        return destinations(self.config, network)
