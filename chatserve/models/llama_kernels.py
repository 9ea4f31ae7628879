"""The Llama family's network on the CPU kernels: packed weights, a whole step in one call.

The same mathematics as `llama`, which judges it; here are only sizes, addresses and ownership. A
row's logits are bit-identical whatever else is in the batch, and however its prompt was cut into
chunks.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from chatserve.errors import DoesNotFit
from chatserve.kernels import library
from chatserve.kernels.library import Kernels
from chatserve.models.adapter import Adapter
from chatserve.models.batch import Batch, NetworkAdapter, Segment
from chatserve.models.config import ModelConfig
from chatserve.models.destinations import (
    BlockTargets,
    Destination,
    NetworkTargets,
    RowLoader,
    destinations,
)
from chatserve.models.device import DevicePolicy
from chatserve.models.kernel_adapter import KernelAdapter
from chatserve.models.kernel_limits import HEAD_PACKING, padded
from chatserve.models.kernel_matrix import (
    DTYPES,
    GateUpRows,
    KernelMatrix,
    Table,
    Team,
    Vector,
    check,
    interleaved,
)
from chatserve.models.packing import Packing
from chatserve.models.rope import angles

logger = logging.getLogger(__name__)

PREFETCHES = (0, 2048, 8192)
"""Bytes ahead that are tried for one row, which only waits for the weights."""
_PREFETCH_OF_MORE = 8192  # rows, whose sums take longer; where fetching ahead helps at all
_COMMITTED_BYTES = 512 << 20  # of the pool, at most, before anybody has asked for anything
_KEPT_ROWS = 64  # of logits; more are rare, and given back
_TUNING_S = 0.1  # for one setting, where a step is no longer


class Tuning(NamedTuple):
    """What the fastest step depends on beside the weights."""

    num_threads: int
    prefetch: int

    def __str__(self) -> str:
        return f"{self.num_threads} threads, {self.prefetch} bytes ahead"


def num_warm_tokens(context_length: int) -> int:
    """How many tokens the pool remembers before old prompts make place for new ones.

    More are held while sequences run that need them.
    """
    return min(2 * context_length, max(context_length, 16384))


def thread_counts() -> tuple[int, ...]:
    """Numbers of threads worth trying, most first: all cores, and half of many.

    Second hardware threads of a core only get in the way; slow cores beside fast ones may.
    """
    try:
        import psutil

        cores = psutil.cpu_count(logical=False)
    except ImportError:  # engine and models run without it, as on a bare GPU machine
        cores = None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = max(1, min(cores or usable or 1, usable or 1, library.MAX_THREADS))
    return (most, most // 2) if most >= 4 else (most,)


class KernelKVPool:
    """Keys and values of all layers in half precision, in the kernels' own layout."""

    def __init__(self, kernels: Kernels, shape: library.Shape, num_blocks: int) -> None:
        self._functions = kernels.functions
        self.num_blocks = num_blocks
        self.block_size = library.BLOCK_SIZE
        handle = self._functions.cs_pool_create(ctypes.byref(shape), num_blocks)
        if not handle:
            raise DoesNotFit(f"no memory for {num_blocks:,} blocks of KV cache")
        self.handle: int = handle
        library.destroy_with(self, self._functions.cs_pool_destroy, handle)

    @property
    def num_bytes(self) -> int:
        return int(self._functions.cs_pool_bytes(self.handle))

    def warm(self, num_blocks: int) -> None:
        """Commit the first blocks' memory in a thread, so that no prompt waits for it."""
        num_blocks = min(num_blocks, _COMMITTED_BYTES // (self.num_bytes // self.num_blocks))

        def commit() -> None:  # refers to self: the pool must not go before it ends
            check(self._functions.cs_pool_warm(self.handle, num_blocks))

        threading.Thread(target=commit, name="commit", daemon=True).start()

    def copy_block(self, source: int, target: int) -> None:
        check(self._functions.cs_pool_copy_block(self.handle, source, target))


class _Block:
    """One block's matrices and vectors, which the kernels only point to."""

    def __init__(
        self, config: ModelConfig, build: Callable[[int, int], KernelMatrix], window: int | None
    ) -> None:
        hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads_out = config.num_heads * dim
        qkv_rows = heads_out + 2 * config.num_kv_heads * dim
        self.window = window or 0
        self.qkv = build(qkv_rows, hidden)
        self.output = build(hidden, heads_out)
        self.gate_up = build(2 * ffn, hidden)
        self.down = build(hidden, ffn)
        self.attention_norm, self.mlp_norm = Vector(hidden), Vector(hidden)
        has_mlp = config.has_mlp_bias
        self.vectors: dict[str, Vector | None] = {
            "qkv_bias": Vector(qkv_rows) if config.has_qkv_bias else None,
            "output_bias": Vector(hidden) if config.has_output_bias else None,
            "gate_up_bias": Vector(2 * ffn, interleaved(ffn)) if has_mlp else None,
            "down_bias": Vector(hidden) if has_mlp else None,
            "query_norm": Vector(dim) if config.has_qk_norm else None,
            "key_norm": Vector(dim) if config.has_qk_norm else None,
        }

    def targets(self) -> BlockTargets:
        return BlockTargets(
            self.attention_norm, self.qkv, self.output, self.mlp_norm, GateUpRows(self.gate_up),
            self.down, **self.vectors,
        )  # fmt: skip

    def layer(self) -> library.Layer:
        return library.Layer(
            qkv=self.qkv.handle, output=self.output.handle, gate_up=self.gate_up.handle,
            down=self.down.handle, attention_norm=self.attention_norm.address,
            mlp_norm=self.mlp_norm.address, window=self.window,
            **{name: vector.address for name, vector in self.vectors.items() if vector},
        )  # fmt: skip


class KernelLlama:
    """Token ids in, logits out, over a flat batch of sequences; see `Llama`."""

    def __init__(
        self,
        config: ModelConfig,
        policy: DevicePolicy,
        kernels: Kernels,
        packing: Packing,
        *,
        max_rows: int,
        thread_counts: Sequence[int],
    ) -> None:
        """`max_rows`: tokens of one step; `thread_counts`: numbers of threads to try, most first.

        Raises `DoesNotFit` when there is no memory.
        """
        self.config = config
        self.policy = policy
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.packing = packing
        self.num_threads = thread_counts[0]
        self._thread_counts = thread_counts
        self.max_rows = max_rows
        self._kernels = kernels
        self._functions = kernels.functions
        self.team = Team(kernels, self.num_threads)
        hidden = config.hidden_size

        def build(rows: int, columns: int) -> KernelMatrix:
            return KernelMatrix(kernels, self.team, rows, columns, packing)

        # The last matrix decides between near equals: a finer scale there takes mean KL from 0.0069
        # to 0.0059, and 4 bits would be too few.
        head_packing = replace(HEAD_PACKING, activation_bits=packing.activation_bits)
        self._head = KernelMatrix(kernels, self.team, config.vocab_size, hidden, head_packing)
        self._table: Table | None = None
        if not config.is_tied:
            self._table = Table(config.vocab_size, hidden, policy.dtype)
        self._blocks = [_Block(config, build, window) for window in config.sliding_windows]
        self._norm = Vector(hidden)
        self._stride = padded(config.vocab_size)
        self._logits: list[torch.Tensor] = []  # by number of rows
        self._network = 0
        self._num_positions = 1

    @property
    def num_bytes(self) -> int:
        """Packed matrices, scales included."""
        matrices = [self._head]
        for block in self._blocks:
            matrices += [block.qkv, block.output, block.gate_up, block.down]
        return sum(matrix.num_bytes for matrix in matrices)

    def destinations(self) -> Mapping[str, Destination]:
        """Every checkpoint tensor (Hugging Face names) and where it goes."""
        embedding: RowLoader = self._head if self._table is None else self._table
        blocks = [block.targets() for block in self._blocks]
        return destinations(self.config, NetworkTargets(embedding, self._head, self._norm, blocks))

    def build_kv_pool(self, num_blocks: int, block_size: int) -> KernelKVPool:
        """Also finds the number of threads that computes a step fastest.

        Raises `DoesNotFit` when there is no memory.
        """
        assert block_size == library.BLOCK_SIZE
        self._build_network(min(self.config.context_length, num_blocks * block_size))
        pool = KernelKVPool(self._kernels, self._shape(), num_blocks)
        seconds = self._tune(pool)
        logger.info(
            "%s kernels: %s", self._kernels.level,
            "; ".join(f"{tuning}: {1000 * time:.1f} ms" for tuning, time in seconds.items()),
        )  # fmt: skip
        pool.warm(num_warm_tokens(self.config.context_length) // block_size)
        return pool

    def build_adapter(self, adapter: Adapter) -> KernelAdapter:
        """`adapter`, which fits `config`, for segments of this network's batches.

        May run beside a step. Raises `ModelLoadError`, and `DoesNotFit` when there is no memory.
        """
        return KernelAdapter(adapter, self.config, self._kernels, self._shape())

    def forward(self, batch: Batch, pool: KernelKVPool) -> torch.Tensor:
        """Logits (R, V) float32 of the batch's output rows, good until the next call.

        Stores keys and values.
        """
        segments = batch.segments
        assert all(len(s.block_ids) * library.BLOCK_SIZE >= s.num_total for s in segments)
        # One array for all: after a step that has read every weight nothing is left in the cache,
        # and each further call would take longer than what it does.
        parts: list[Sequence[int]] = [
            batch.token_ids, batch.positions, batch.output_rows,
            [segment.start for segment in segments], [segment.num_tokens for segment in segments],
            *[segment.block_ids for segment in segments],
        ]  # fmt: skip
        numbers = array("i", chain.from_iterable(parts))
        address, _ = numbers.buffer_info()
        ends = accumulate(map(len, parts), initial=0)
        tokens, positions, outputs, starts, counts, *tables = (address + 4 * end for end in ends)
        pointers = array("Q", tables[:-1])
        if any(segment.adapter is not None for segment in segments):
            pointers.extend(_handle(segment.adapter) for segment in segments)
        table = pointers.buffer_info()[0]
        adapters = table + 8 * len(segments) if len(pointers) > len(segments) else None
        logits = self._room_for(len(batch.output_rows))
        step = library.Step(
            len(batch.token_ids), len(segments), len(batch.output_rows),
            tokens, positions, starts, counts, table, adapters, outputs,
            logits.data_ptr(), self._stride,
        )  # fmt: skip
        if batch.ahead is not None:
            samplings = array("Q", batch.ahead.samplings)
            picked = array("i", batch.output_rows)
            step.sampler = batch.ahead.sampler.handle
            step.samplings, step.picked = samplings.buffer_info()[0], picked.buffer_info()[0]
            batch.ahead.token_ids = picked
        check(self._functions.cs_network_forward(self._network, pool.handle, ctypes.byref(step)))
        if batch.hidden is not None:
            rows = self.hidden_rows(batch.hidden_rows[-1] + 1)[list(batch.hidden_rows)]
            norm = self._norm.values[: self.hidden_size]
            batch.hidden.copy_(
                F.rms_norm(rows, (self.hidden_size,), norm, self.config.rms_norm_eps)
            )
        return logits

    def hidden_rows(self, num_rows: int) -> torch.Tensor:
        """(num_rows, hidden) float32: the last step's rows as its last layer has left them."""
        rows = torch.empty(num_rows, self.config.hidden_size)
        check(self._functions.cs_network_rows(self._network, num_rows, rows.data_ptr()))
        return rows

    def _room_for(self, num_outputs: int) -> torch.Tensor:
        """(num_outputs, V) of one buffer, kept: fresh pages for 3 MB cost as much as sampling."""
        if num_outputs > _KEPT_ROWS:
            return torch.empty(num_outputs, self._stride)[:, : self.vocab_size]
        if not self._logits:
            kept = torch.empty(_KEPT_ROWS, self._stride)
            self._logits = [kept[:count, : self.vocab_size] for count in range(_KEPT_ROWS + 1)]
        return self._logits[num_outputs]

    def set_num_threads(self, num_threads: int) -> None:
        """Between steps only."""
        check(self._functions.cs_network_set_threads(self._network, num_threads))
        self.num_threads = num_threads

    def set_prefetch(self, num_bytes: int) -> None:
        """How far ahead weights are fetched for a step's only row; 0 leaves it to the processor,
        for more rows too. Changes no result."""
        more = _PREFETCH_OF_MORE if num_bytes else 0
        check(self._functions.cs_network_set_prefetch(self._network, num_bytes, more))

    def _tune(self, pool: KernelKVPool) -> Mapping[Tuning, float]:
        """Measure a one-token step with each number of threads and each prefetch, keep the fastest.

        Whether fetching ahead helps differs by maker: half as fast on one, a third faster on
        another. Uses the first block of `pool`. Returns the seconds of each setting.
        """
        seconds: dict[Tuning, float] = {}
        for num_threads in self._thread_counts:
            self.set_num_threads(num_threads)
            times = self._time_prefetches(pool)
            seconds |= {Tuning(num_threads, num_bytes): time for num_bytes, time in times.items()}
        best = min(seconds, key=seconds.__getitem__)
        self.set_num_threads(best.num_threads)
        self.set_prefetch(best.prefetch)
        return seconds

    def _time_prefetches(self, pool: KernelKVPool) -> dict[int, float]:
        """The shortest step of each, in turns, for a machine's speed changes with the moment."""
        batch = Batch([0], [0], [Segment(0, 1, 0, [0])], [0])

        def timed(num_bytes: int) -> float:
            self.set_prefetch(num_bytes)
            start = time.perf_counter()
            self.forward(batch, pool)
            return time.perf_counter() - start

        first = max(timed(num_bytes) for num_bytes in PREFETCHES)
        rounds = max(1, min(8, int(_TUNING_S / first)))
        times = [[timed(num_bytes) for num_bytes in PREFETCHES] for _ in range(rounds)]
        return dict(zip(PREFETCHES, map(min, zip(*times, strict=True)), strict=True))

    def profile(self, run: Callable[[], None]) -> Mapping[str, int]:
        """Nanoseconds that the first thread spends on each part of the steps in `run`."""
        parts = np.zeros(len(library.PARTS), np.uint64)
        check(self._functions.cs_network_set_profile(self._network, parts.ctypes.data))
        try:
            run()
        finally:
            check(self._functions.cs_network_set_profile(self._network, None))
        return dict(zip(library.PARTS, parts.tolist(), strict=True))

    def _shape(self) -> library.Shape:
        config = self.config
        return library.Shape(
            hidden=config.hidden_size, num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            ffn=config.intermediate_size, num_layers=config.num_layers, vocab=config.vocab_size,
            max_rows=self.max_rows, max_positions=self._num_positions, eps=config.rms_norm_eps,
        )  # fmt: skip

    def _build_network(self, num_positions: int) -> None:
        self._num_positions = num_positions
        handle = self._functions.cs_network_create(
            ctypes.byref(self._shape()), self._kernels.level_name, self.team.handle
        )
        if not handle:
            raise DoesNotFit(f"no memory for the buffers of {self.max_rows:,} tokens a step")
        self._network = handle
        library.destroy_with(self, self._functions.cs_network_destroy, handle)
        self._cos, self._sin = angles(self.config.rope, self.config.head_dim, num_positions)
        ends = library.Ends(
            head=self._head.handle, norm=self._norm.address, cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
        )  # fmt: skip
        if self._table is not None:
            ends.embedding = self._table.values.data_ptr()
            ends.embedding_dtype = DTYPES[self._table.values.dtype]
        check(self._functions.cs_network_set_ends(handle, ctypes.byref(ends)))
        for index, block in enumerate(self._blocks):
            layer = block.layer()
            check(self._functions.cs_network_set_layer(handle, index, ctypes.byref(layer)))


def _handle(adapter: NetworkAdapter | None) -> int:
    if adapter is None:
        return 0
    assert isinstance(adapter, KernelAdapter)
    return adapter.handle
