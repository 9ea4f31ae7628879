"""The Llama family's network on Triton kernels and CUDA graphs: the weights of the plain network.

The plain one judges it, layer by layer the same mathematics. Here are only the order of launches
and the batch's way to the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from chatserve.errors import ModelLoadError
from chatserve.models.adapter import Adapter
from chatserve.models.batch import Batch
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.kv_pool import TorchKVPool
from chatserve.models.llama import Attention, Llama
from chatserve.models.torch_adapter import TorchAdapter
from chatserve.models.triton.attention_decode import attend_rows, num_splits_for
from chatserve.models.triton.attention_prefill import attend_runs
from chatserve.models.triton.graphs import CudaGraphs, DecodeGraphs, GraphBackend
from chatserve.models.triton.matrices import choose_row_product
from chatserve.models.triton.norm import add_rms_norm, rms_norm
from chatserve.models.triton.rope_store import HeadNorms, rope_store
from chatserve.models.triton.step import MAX_SHORT, Plan, StepBuffer, plan_for
from chatserve.models.triton.swiglu import swiglu

_MAX_HEAD_DIM = 128  # twice that does not fit the shared memory of cards for desktops


def misfit(config: ModelConfig) -> str | None:
    """Why the kernels cannot hold this network; None when they can."""
    if config.head_dim > _MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is over {_MAX_HEAD_DIM}"
    return None


class TritonLlama(Llama):
    """`Llama` with fused kernels; its decode steps are replayed graphs on CUDA."""

    def __init__(
        self, config: ModelConfig, policy: DevicePolicy, graphs: GraphBackend | None = None
    ) -> None:
        super().__init__(config, policy)
        windows = [window for window in config.sliding_windows if window is not None]
        self._shortest_window = min(windows, default=None)
        if graphs is None and policy.device.type == "cuda":
            graphs = CudaGraphs()
        self._backend = graphs
        self._pool: TorchKVPool | None = None
        self._graphs: DecodeGraphs | None = None

    def build_adapter(self, adapter: Adapter) -> TorchAdapter:
        """Raises `ModelLoadError`: captured graphs and fused kernels have no place for it."""
        raise ModelLoadError(
            f"{adapter.path}: the CUDA kernels take no adapters beside the base; merge it while "
            f"loading: --adapter {adapter.path}"
        )

    def forward(self, batch: Batch, pool: TorchKVPool) -> torch.Tensor:
        """Logits (R, V) of the batch's output rows. Valid until the next call."""
        if pool is not self._pool:
            self._adopt(pool)
        plan = plan_for(batch, pool.block_size, self._shortest_window)
        if self._graphs is not None and self._graphs.can_run(plan):
            logits = self._graphs.run(batch)
            if logits is not None:
                return logits
        buffer = StepBuffer(plan, pool.block_size, self.device)
        buffer.write(batch)
        x = self._states(buffer)
        if batch.hidden is not None:
            batch.hidden.copy_(x[torch.tensor(batch.hidden_rows, device=self.device)])
        return self._logits(x, buffer)

    def _adopt(self, pool: TorchKVPool) -> None:
        """Make the pool's tensors, which graphs must find where they were captured."""
        config = self.config
        rows = torch.empty(
            0, config.num_kv_heads, config.head_dim, device=self.device, dtype=self.policy.dtype
        )
        for layer in range(config.num_layers):
            pool.ensure(layer, rows, rows)
        is_first = self._pool is None
        self._pool = pool
        if self._backend is not None:
            width = min(-(-config.context_length // pool.block_size), pool.num_blocks)
            self._graphs = DecodeGraphs(
                self._run,
                self._backend,
                block_size=pool.block_size,
                table_width=width,
                device=self.device,
            )
        if is_first and self.device.type == "cuda":
            self.warm_up()

    def warm_up(self) -> None:
        """Measure, compile and capture what the first requests would otherwise wait for."""
        assert self._pool is not None
        choose_row_product(self.blocks)
        num_rows = 2 * MAX_SHORT
        # a tile that ends before the first key: it reads nothing, and its rows are zeros
        tiles = [(0, num_rows, -num_rows, 0)]
        plan = Plan(num_rows, 1, 1, tiles=tiles, output_rows=[0])
        prefill = StepBuffer(plan, self._pool.block_size, self.device)
        prefill.write(Batch((), (), (), ()))
        self._run(prefill)
        if self._graphs is not None:
            self._graphs.capture_all()

    def _run(self, step: StepBuffer) -> torch.Tensor:
        return self._logits(self._states(step), step)

    def _logits(self, x: torch.Tensor, step: StepBuffer) -> torch.Tensor:
        if step.plan.output_rows is not None:
            x = x[step.output_rows]
        if not len(x):
            return x.new_empty(0, self.vocab_size)
        return self.head(x)

    def _states(self, step: StepBuffer) -> torch.Tensor:
        """The final normalised hidden states of all rows."""
        eps = self.config.rms_norm_eps
        residual = self.embedding.embed(step.token_ids, self.policy.dtype)
        x = rms_norm(residual, self.blocks[0].attention_norm.scale.weight, eps)
        following = [block.attention_norm for block in self.blocks[1:]] + [self.norm]
        for layer, (block, next_norm) in enumerate(zip(self.blocks, following, strict=True)):
            mixed = self._attend(block.attention, layer, x, step)
            x = add_rms_norm(
                block.attention.output(mixed), residual, block.mlp_norm.scale.weight, eps
            )
            x = block.mlp.down(swiglu(block.mlp.gate_up(x)))
            x = add_rms_norm(x, residual, next_norm.scale.weight, eps)
        return x

    def _attend(
        self, attention: Attention, layer: int, x: torch.Tensor, step: StepBuffer
    ) -> torch.Tensor:
        """Attention's mixed heads (N, H * D) of normalised rows x, their keys and values stored."""
        assert self._pool is not None
        config, plan = self.config, step.plan
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = attention.qkv(x).view(plan.num_rows, heads + 2 * kv_heads, config.head_dim)
        tensors = self._pool.layer(layer)
        tables = self.rotary.tables(config.context_length)
        norms = None
        if attention.query_norm is not None and attention.key_norm is not None:
            norms = HeadNorms(
                attention.query_norm.scale.weight,
                attention.key_norm.scale.weight,
                config.rms_norm_eps,
            )
        rope_store(qkv, step.positions, step.slots, tables, tensors, heads, norms)
        window = config.sliding_windows[layer]
        queries, short = qkv[:, :heads], slice(0, plan.num_short)
        mixed = attend_rows(
            queries[short],
            tensors,
            step.tables,
            step.table_rows[short],
            step.lengths[short],
            num_splits=num_splits_for(
                max(plan.num_short, 1), kv_heads, plan.table_width * self._pool.block_size
            ),
            window=window,
        )
        if plan.is_short:
            return mixed
        out = mixed.new_empty(plan.num_rows, mixed.shape[1])
        out[short] = mixed
        attend_runs(queries, tensors, step.tables, step.tiles, out, window=window)
        for rows in plan.whole:
            out[rows] = _flash(qkv[rows], heads, kv_heads)
        return out


def _flash(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> torch.Tensor:
    """Causal attention of a run without a past by PyTorch's fused kernel; (T, H * D)."""
    queries, keys, values = qkv.transpose(0, 1).split([num_heads, num_kv_heads, num_kv_heads])
    mixed = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], is_causal=True,
        enable_gqa=num_heads != num_kv_heads,
    )  # fmt: skip
    return mixed[0].transpose(0, 1).flatten(1)
