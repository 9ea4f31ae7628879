"""Tiny random networks on the kernels, and the plain PyTorch network that judges them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chatserve.kernels import library
from chatserve.kernels.library import Kernels
from chatserve.models.adapter import Adapter, LoraPair
from chatserve.models.adapter_places import adapter_places
from chatserve.models.batch import Batch, NetworkAdapter, Segment
from chatserve.models.config import ModelConfig, RopeConfig
from chatserve.models.device import choose_policy
from chatserve.models.kernel_limits import HEAD_PACKING
from chatserve.models.kernel_matrix import KernelMatrix, Team
from chatserve.models.kv_pool import Placement, TorchKVPool
from chatserve.models.linear import Matrix
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelKVPool, KernelLlama
from chatserve.models.packing import Packing

BLOCK_SIZE = library.BLOCK_SIZE
FLOAT32 = choose_policy("cpu", "float32", load_8bit=False)
State = Mapping[str, torch.Tensor]


def config(**changes: Any) -> ModelConfig:
    """2 layers, 4 heads on 2 key/value heads; a vocabulary that fills no panel."""
    values: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "context_length": 512, "rope": RopeConfig(), "is_tied": False, "has_qkv_bias": False,
        "has_output_bias": False, "has_mlp_bias": False, "has_qk_norm": False,
    }  # fmt: skip
    values.update(changes)
    values.setdefault("sliding_windows", (None,) * values["num_layers"])
    return ModelConfig(**values)


def random_state(network: KernelLlama, seed: int = 0) -> dict[str, torch.Tensor]:
    """A checkpoint in which every part matters: attention is not uniform, nothing vanishes."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            return 1 + 0.2 * values if "norm" in name else 0.5 * values
        return values * 1.5 / shape[1] ** 0.5

    return {name: tensor(name, place.shape) for name, place in network.destinations().items()}


def load(network: KernelLlama | Llama, state: State) -> None:
    for name, place in network.destinations().items():
        place.target.load_rows(place.start, state[name])


def build(
    kernels: Kernels, packing: Packing, config: ModelConfig, *, num_threads: int = 2,
    max_rows: int = 128,
) -> KernelLlama:  # fmt: skip
    """A network whose content is not set yet."""
    return KernelLlama(
        config, FLOAT32, kernels, packing, max_rows=max_rows, thread_counts=(num_threads,)
    )


def random_network(
    kernels: Kernels, packing: Packing, config: ModelConfig, **sizes: int
) -> KernelLlama:
    network = build(kernels, packing, config, **sizes)
    load(network, random_state(network))
    return network


def random_adapter(
    config: ModelConfig,
    seed: int,
    *,
    rank: int = 4,
    targets: tuple[str, ...] = ("",),
    size: float = 0.5,
) -> Adapter:
    """Changes every matrix whose module ends in one of `targets`, by about `size` of itself."""
    draw = torch.Generator().manual_seed(seed)
    pairs = {}
    for module, place in adapter_places(config).items():
        if module.endswith(targets):
            a = torch.randn(rank, place.columns, generator=draw) / place.columns**0.5
            b = torch.randn(place.rows, rank, generator=draw) * size / rank**0.5
            pairs[f"{module}.weight"] = LoraPair(a, b, scale=1.5)
    return Adapter(f"adapter-{seed}", Path("adapter"), f"ad_{seed}", pairs)


def as_packed(kernels: Kernels, packing: Packing, state: State) -> State:
    """The checkpoint with every matrix replaced by what its packed form stands for.

    An embedding beside a head is no matrix: its rows are only looked up.
    """

    def unpacked(name: str, values: torch.Tensor) -> torch.Tensor:
        is_head = name in ("model.embed_tokens.weight", "lm_head.weight")
        form = HEAD_PACKING if is_head else packing
        matrix = KernelMatrix(kernels, Team(kernels, 1), *values.shape, form)
        matrix.load_rows(0, values)
        return torch.stack([matrix.row(index) for index in range(len(values))])

    def is_packed(name: str) -> bool:
        is_table = name == "model.embed_tokens.weight" and "lm_head.weight" in state
        return state[name].dim() == 2 and not is_table

    return {name: unpacked(name, x) if is_packed(name) else x for name, x in state.items()}


def quantised(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Activations as the kernels see them, in float64: int8 codes, one scale per 32 columns, and
    with 16 bits the codes of what they round away, in steps 254 times finer."""
    groups = x.view(len(x), -1, library.GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    # not 127 / most, which torch computes as 127 * (1 / most)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, torch.zeros_like(most))
    scaled = groups * inverse
    codes, step = scaled.round(), most / 127
    near = codes.double() * step.double()
    if packing.activation_bits == 16:
        near += ((scaled - codes) * 254).round().double() * (step / 254).double()
    return near.view(x.shape)


class _QuantisedInput:
    def __init__(self, matrix: Matrix, packing: Packing) -> None:
        self._matrix = matrix
        self._packing = packing

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._matrix(quantised(x, self._packing).float())


class _HalfPool(TorchKVPool):
    """Keys and values in half precision, as the kernels keep them."""

    def store(
        self, layer: int, placement: Placement, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        super().store(layer, placement, keys.half().float(), values.half().float())


class Reference(Llama):
    """The plain network in float32, rounded where the kernels round."""

    def __init__(self, config: ModelConfig, state: State, packing: Packing) -> None:
        super().__init__(config, FLOAT32)
        load(self, state)
        self.head: Any = _QuantisedInput(self.head, packing)
        for block in self.blocks:
            parts: tuple[tuple[Any, str], ...] = (
                (block.attention, "qkv"), (block.attention, "output"), (block.mlp, "gate_up"),
                (block.mlp, "down"),
            )  # fmt: skip
            for part, name in parts:
                setattr(part, name, _QuantisedInput(getattr(part, name), packing))

    def build_kv_pool(self, num_blocks: int, block_size: int) -> TorchKVPool:
        return _HalfPool(num_blocks, block_size, self.device)


class Prompt:
    """One sequence's tokens, how many of them are in the pool, its block table and adapter."""

    def __init__(
        self,
        token_ids: Iterable[int],
        block_ids: Sequence[int],
        adapter: NetworkAdapter | None = None,
    ) -> None:
        self.token_ids = list(token_ids)
        self.block_ids = block_ids
        self.adapter = adapter
        self.num_past = 0
        assert len(self.token_ids) <= len(block_ids) * BLOCK_SIZE


def step(network: Any, pool: Any, parts: Sequence[tuple[Prompt, int]]) -> list[torch.Tensor]:
    """Feed the next tokens of each sequence in one batch; their logits, by sequence."""
    ids: list[int] = []
    positions: list[int] = []
    segments = []
    for sequence, count in parts:
        past = sequence.num_past
        segments.append(Segment(len(ids), count, past, sequence.block_ids, sequence.adapter))
        ids += sequence.token_ids[past : past + count]
        positions += range(past, past + count)
        sequence.num_past += count
    logits = network.forward(Batch(ids, positions, segments, range(len(ids))), pool)
    return [logits[segment.rows].clone() for segment in segments]


def whole(
    network: Any, pool: Any, token_ids: Iterable[int], block_ids: Sequence[int],
    adapter: NetworkAdapter | None = None,
) -> torch.Tensor:  # fmt: skip
    """Logits (T, V) of a prompt in one piece."""
    sequence = Prompt(token_ids, block_ids, adapter)
    return step(network, pool, [(sequence, len(sequence.token_ids))])[0]


def prompt(length: int, seed: int, *, vocab_size: int = 101) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (length,), generator=draw).tolist()


def pool_of(network: KernelLlama, num_blocks: int) -> KernelKVPool:
    return network.build_kv_pool(num_blocks, BLOCK_SIZE)
