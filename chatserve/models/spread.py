"""How a checkpoint's network is spread over GPUs with so much memory: for plans and workers alike.

Knows no PyTorch and asks no device.
"""

from __future__ import annotations

from dataclasses import dataclass

from chatserve.models.checkpoint import Checkpoint
from chatserve.models.device_map import GPU, DeviceMap, map_devices
from chatserve.models.form import Form, native_config
from chatserve.models.memory_plan import MemoryPlan, part_bytes

HOST_SHARE = 0.9
"""Of the free main memory that layers may take; the rest is the system's."""


@dataclass(frozen=True)
class Room:
    """GPUs and their free bytes; `limit_bytes`: of each for weights.

    There is other memory only where layers may be offloaded.
    """

    gpus: tuple[tuple[str, int], ...]
    limit_bytes: int | None = None
    host_bytes: int = 0
    disk_bytes: int = 0

    def for_weights(self, plan: MemoryPlan) -> list[GPU]:
        rooms = [(name, max(0, free - plan.working_bytes)) for name, free in self.gpus]
        return [GPU(name, room, min(room, self.limit_bytes or room)) for name, room in rooms]


def spread(
    checkpoint: Checkpoint, form: Form, plan: MemoryPlan, room: Room, num_tokens: int
) -> DeviceMap | None:
    """Where the parts go, with keys and values of `num_tokens`; None where they do not fit."""
    config = native_config(checkpoint)
    return map_devices(
        part_bytes(config, form),
        config.num_layers,
        num_tokens * plan.kv_bytes_per_token // config.num_layers,
        room.for_weights(plan),
        is_tied=config.is_tied,
        host_bytes=int(room.host_bytes * HOST_SHARE),
        disk_bytes=room.disk_bytes,
    )
