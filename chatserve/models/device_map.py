"""Which part of a network lies on which device: GPUs first, then main memory, then the disk.

Sums over bytes; knows no PyTorch, so that a plan can show where a worker would put what. For the
networks of transformers accelerate does the same from their modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

CPU, DISK = "cpu", "disk"
BLOCKS_ON_THE_WAY = 2
"""Of those that lie elsewhere: one computes, the next is copied."""


@dataclass(frozen=True)
class PartBytes:
    """Weights of a network's parts; every block has as many. `head`: with the final norm."""

    embedding: int
    block: int
    head: int


@dataclass(frozen=True)
class GPU:
    """`room_bytes`: for weights, keys and values; `limit_bytes`: of them for weights."""

    name: str
    room_bytes: int
    limit_bytes: int


@dataclass(frozen=True)
class Part:
    """`home` is where weights lie: a device, or the disk; `device` is where they are multiplied."""

    home: str
    device: str

    @property
    def is_offloaded(self) -> bool:
        return self.home != self.device


@dataclass(frozen=True)
class DeviceMap:
    """A home for each part. A tied head is the embedding, so both have the same."""

    embedding: Part
    blocks: tuple[Part, ...]
    head: Part

    @property
    def blocks_by_device(self) -> Mapping[str, int]:
        """How many blocks each device computes, and holds the keys and values of."""
        return Counter(part.device for part in self.blocks)

    @property
    def is_single(self) -> bool:
        """Whether all of it is where it computes, on one device."""
        parts = (self.embedding, *self.blocks, self.head)
        return len({place for part in parts for place in (part.home, part.device)}) == 1

    def bytes_by_home(self, parts: PartBytes, *, is_tied: bool) -> dict[str, int]:
        num_bytes: Counter[str] = Counter()
        num_bytes[self.embedding.home] += parts.embedding + (parts.head if is_tied else 0)
        for block in self.blocks:
            num_bytes[block.home] += parts.block
        if not is_tied:
            num_bytes[self.head.home] += parts.head
        return dict(num_bytes)

    def describe(self) -> str:
        """For people: "cuda:0 layers 0-19, cuda:1 layers 20-31, cpu layers 32-39"."""
        runs = groupby(enumerate(self.blocks), key=lambda item: item[1].home)
        texts = []
        for home, run in runs:
            layers = [layer for layer, _ in run]
            texts.append(f"{home} layers {layers[0]}-{layers[-1]}")
        return ", ".join(texts)


def map_devices(
    parts: PartBytes,
    num_layers: int,
    kv_bytes_per_block: int,
    gpus: Sequence[GPU],
    *,
    is_tied: bool,
    host_bytes: int = 0,
    disk_bytes: int = 0,
) -> DeviceMap | None:
    """Spread a network evenly over `gpus`; None where it does not fit.

    What they cannot hold lies in `host_bytes` of main memory and `disk_bytes` of disk, and is
    copied to the last of them when its turn comes. Keys and values lie where their block computes.
    """
    total = parts.embedding + parts.head + num_layers * parts.block
    highest = max(gpu.limit_bytes for gpu in gpus)
    step = -(-parts.block // 8)
    for most in range(-(-total // len(gpus)), highest + step, step):
        even = [GPU(gpu.name, gpu.room_bytes, min(gpu.limit_bytes, most)) for gpu in gpus]
        if counts := _fill(parts, num_layers, kv_bytes_per_block, even, is_tied, 0):
            return _resident(gpus, counts, is_tied)
    for num_resident in reversed(range(num_layers)):
        counts = _fill(
            parts, num_resident, kv_bytes_per_block, gpus, is_tied, num_layers - num_resident
        )
        if counts is None:
            continue
        num_in_memory = (host_bytes - (0 if is_tied else parts.embedding)) // parts.block
        num_on_disk = max(0, num_layers - num_resident - num_in_memory)
        if num_in_memory < 0 or num_on_disk * parts.block > disk_bytes:
            return None
        return _offloaded(gpus, counts, num_layers, num_on_disk, is_tied)
    return None


def _fill(
    parts: PartBytes,
    num_blocks: int,
    kv_bytes: int,
    gpus: Sequence[GPU],
    is_tied: bool,
    num_offloaded: int,
) -> list[int] | None:
    """How many blocks each GPU takes, in order; None unless all of them find room."""
    counts: list[int] = []
    last = len(gpus) - 1
    for index, gpu in enumerate(gpus):
        limit, room = gpu.limit_bytes, gpu.room_bytes
        if index == 0 and (is_tied or not num_offloaded):
            limit, room = limit - parts.embedding, room - parts.embedding
        if index == (0 if is_tied else last):
            limit, room = limit - parts.head, room - parts.head
        if index == last and num_offloaded:
            on_the_way = min(num_offloaded, BLOCKS_ON_THE_WAY) * parts.block
            limit, room = limit - on_the_way, room - on_the_way - num_offloaded * kv_bytes
        if min(limit, room) < 0:
            return None
        most = min(limit // parts.block, room // (parts.block + kv_bytes))
        counts.append(min(most, num_blocks - sum(counts)))
    return counts if sum(counts) == num_blocks else None


def _resident(gpus: Sequence[GPU], counts: Sequence[int], is_tied: bool) -> DeviceMap:
    parts = [Part(gpu.name, gpu.name) for gpu in gpus]
    blocks = tuple(part for part, count in zip(parts, counts, strict=True) for _ in range(count))
    return DeviceMap(parts[0], blocks, parts[0] if is_tied else parts[-1])


def _offloaded(
    gpus: Sequence[GPU], counts: Sequence[int], num_layers: int, num_on_disk: int, is_tied: bool
) -> DeviceMap:
    """An embedding that is only looked up stays in main memory: a token reads one row of it."""
    resident = _resident(gpus, counts, is_tied)
    last = gpus[-1].name
    num_in_memory = num_layers - len(resident.blocks) - num_on_disk
    blocks = (
        *resident.blocks,
        *[Part(CPU, last)] * num_in_memory,
        *[Part(DISK, last)] * num_on_disk,
    )
    embedding = resident.embedding if is_tied else Part(CPU, CPU)
    return DeviceMap(embedding, blocks, resident.head)
