"""One form of a network as it is served, a layer at a time: the real matrices, the real products.

A layer is a network of its own whose embedding holds the hidden states, so whatever computes a
model computes this, bit for bit. Knows no files and no reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from chatserve.kernels.library import BLOCK_SIZE, Kernels
from chatserve.models.batch import Batch, Segment
from chatserve.models.config import ModelConfig
from chatserve.models.destinations import Destination
from chatserve.models.device import DevicePolicy
from chatserve.models.kernel_limits import HEAD_PACKING
from chatserve.models.kernel_matrix import KernelMatrix, Team
from chatserve.models.linear import Linear, build_matrix
from chatserve.models.llama import Llama, RMSNorm, Step
from chatserve.models.llama_kernels import KernelKVPool, KernelLlama, thread_counts
from chatserve.models.packing import Packing

EMBEDDING = "model.embed_tokens.weight"


class ServedForm(Protocol):
    """Filled with a layer's rows, runs it; then the same with the head."""

    def embed(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding (U, hidden) as they serve, at places (T,): (T, hidden) float32."""

    def begin_layer(self, index: int) -> None:
        """What is loaded from now on belongs to layer `index`."""

    def load(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Rows of a tensor by its name in the layer."""

    def run_layer(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (T, hidden) float32 after the layer."""

    def begin_head(self, num_rows: int) -> None:
        """The layers are done; `num_rows`: at most, of one call of `logits`."""

    def load_norm(self, rows: torch.Tensor) -> None: ...

    def load_head(self, start: int, rows: torch.Tensor) -> None: ...

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(R, V) float32 of hidden states (R, hidden)."""


def build_form(config: ModelConfig, policy: DevicePolicy, lengths: Sequence[int]) -> ServedForm:
    """The form that `policy` serves; `lengths`: of the texts, which lie side by side."""
    if policy.kernels is not None and policy.packing is not None:
        return KernelForm(config, policy, policy.kernels, policy.packing, lengths)
    return TorchForm(config, policy, lengths)


class KernelForm:
    """On the CPU kernels."""

    def __init__(
        self, config: ModelConfig, policy: DevicePolicy, kernels: Kernels, packing: Packing,
        lengths: Sequence[int],
    ) -> None:  # fmt: skip
        self._config = config
        self._policy = policy
        self._kernels = kernels
        self._packing = packing
        self._lengths = lengths
        self._model: KernelLlama | None = None
        self._pool: KernelKVPool | None = None
        self._places: Mapping[str, Destination] = {}
        self._prefix = "model.layers.0."

    def embed(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if not self._config.is_tied:
            dtype = torch.float32 if self._policy.dtype == torch.float32 else torch.bfloat16
            return rows.to(dtype).float()[places]
        team = Team(self._kernels, 1)
        table = KernelMatrix(self._kernels, team, rows.shape[0], rows.shape[1], HEAD_PACKING)
        table.load_rows(0, rows)
        return torch.stack([table.row(index) for index in range(len(rows))])[places]

    def begin_layer(self, index: int) -> None:
        window = self._config.sliding_windows[index]
        if self._model is None or self._model.config.sliding_windows != (window,):
            longest = max(self._lengths)
            self._build(
                replace(
                    self._config, num_layers=1, sliding_windows=(window,),
                    vocab_size=sum(self._lengths), is_tied=False, context_length=longest,
                ),
                longest,
            )  # fmt: skip

    def load(self, name: str, start: int, rows: torch.Tensor) -> None:
        place = self._places[self._prefix + name]
        place.target.load_rows(place.start + start, rows)

    def run_layer(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._run(part) for part in torch.split(x, list(self._lengths))])

    def begin_head(self, num_rows: int) -> None:
        # the kernels have no network without a layer: this one adds nothing
        config = replace(
            self._config, num_layers=1, sliding_windows=(None,), is_tied=False,
            num_heads=1, num_kv_heads=1, head_dim=32, intermediate_size=32,
            context_length=num_rows, has_qkv_bias=False, has_output_bias=False,
            has_mlp_bias=False, has_qk_norm=False,
        )  # fmt: skip
        self._build(config, num_rows)
        for name, place in self._places.items():
            if name.startswith(self._prefix):
                place.target.load_rows(place.start, torch.zeros(place.shape))

    def load_norm(self, rows: torch.Tensor) -> None:
        self._places["model.norm.weight"].target.load_rows(0, rows)

    def load_head(self, start: int, rows: torch.Tensor) -> None:
        self._places["lm_head.weight"].target.load_rows(start, rows)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x, range(len(x)))

    def _build(self, config: ModelConfig, max_rows: int) -> None:
        self._model = self._pool = None  # the one before goes first
        self._places = {}
        # hidden states are its embedding, and stay whole
        policy = replace(self._policy, dtype=torch.float32)
        self._model = KernelLlama(
            config, policy, self._kernels, self._packing, max_rows=max_rows,
            thread_counts=thread_counts()[:1],
        )  # fmt: skip
        self._pool = self._model.build_kv_pool(-(-max_rows // BLOCK_SIZE), BLOCK_SIZE)
        self._places = self._model.destinations()

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        self._forward(x, ())
        assert self._model is not None
        return self._model.hidden_rows(len(x))

    def _forward(self, x: torch.Tensor, output_rows: Sequence[int]) -> torch.Tensor:
        assert self._model is not None and self._pool is not None
        self._places[EMBEDDING].target.load_rows(0, x)
        rows = range(len(x))
        segment = Segment(0, len(x), 0, range(self._pool.num_blocks))
        return self._model.forward(Batch(rows, rows, [segment], output_rows), self._pool)


class TorchForm:
    """On PyTorch's operators, on any device."""

    def __init__(self, config: ModelConfig, policy: DevicePolicy, lengths: Sequence[int]) -> None:
        self._config = config
        self._policy = policy
        self._lengths = lengths
        self._model: Llama | None = None
        self._places: Mapping[str, Destination] = {}
        self._prefix = "model.layers.0."

    def embed(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        size = tuple(rows.shape)
        table = (
            build_matrix(*size, bias=False, policy=self._policy)
            if self._config.is_tied
            else Linear(*size, bias=False, policy=self._policy)
        )
        table.load_rows(0, rows)
        return _back(table.embed(places.to(self._policy.device), self._policy.dtype))

    def begin_layer(self, index: int) -> None:
        self._model = None  # the one before goes first
        self._places = {}
        config = replace(
            self._config, num_layers=1, vocab_size=1, is_tied=True,
            sliding_windows=(self._config.sliding_windows[index],),
        )  # fmt: skip
        self._model = Llama(config, self._policy)
        self._places = self._model.destinations()

    def load(self, name: str, start: int, rows: torch.Tensor) -> None:
        place = self._places[self._prefix + name]
        place.target.load_rows(place.start + start, rows)

    def run_layer(self, x: torch.Tensor) -> torch.Tensor:
        model = self._model
        assert model is not None
        longest = max(self._lengths)
        pool = model.build_kv_pool(-(-longest // BLOCK_SIZE), BLOCK_SIZE)

        def run(part: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(len(part), device=self._policy.device)
            segment = Segment(0, len(part), 0, range(pool.num_blocks))
            angles = model.rotary.at(positions, longest)
            step = Step(*angles, pool, pool.place([segment]))
            return _back(model.blocks[0](part.to(self._policy.device, self._policy.dtype), step))

        return torch.cat([run(part) for part in torch.split(x, list(self._lengths))])

    def begin_head(self, num_rows: int) -> None:
        self._model = None
        self._places = {}
        size = (self._config.vocab_size, self._config.hidden_size)
        self._head = build_matrix(*size, bias=False, policy=self._policy)
        self._norm = RMSNorm(size[1], self._config.rms_norm_eps, self._policy)

    def load_norm(self, rows: torch.Tensor) -> None:
        self._norm.scale.load_rows(0, rows)

    def load_head(self, start: int, rows: torch.Tensor) -> None:
        self._head.load_rows(start, rows)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return _back(self._head(self._norm(x.to(self._policy.device, self._policy.dtype))))


def _back(x: torch.Tensor) -> torch.Tensor:
    return x.float().cpu()
