"""Which GPUs a network is spread over, as `--num-gpus`, `--gpus`, `--max-gpu-memory` and
`--cpu-offloading` say: FastChat's flags, for every form of weights.

Asks devices what they have free; what goes where is worked out in `device_map`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from chatserve import environment
from chatserve.errors import DoesNotFit, UsageError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import is_native
from chatserve.models.device import DevicePolicy
from chatserve.models.device_map import BLOCKS_ON_THE_WAY, GPU, DeviceMap
from chatserve.models.memory import available_bytes, available_host_bytes, in_gb, parse_size
from chatserve.models.memory_plan import MIN_CONTEXT, MemoryPlan, part_bytes, plan_memory
from chatserve.models.placed_llama import PlacedLlama
from chatserve.models.spread import Room, spread

_USUAL_CONTEXT = 4096  # tokens, whose keys and values a map has room for where nobody asked
_GPU_NAME = re.compile(r"\d{1,3}|(GPU|MIG)-[0-9A-Za-z-]{4,80}")


@dataclass(frozen=True)
class GPUOptions:
    """What the flags say; `num_gpus` is None without `--num-gpus`."""

    num_gpus: int | None = None
    gpus: str | None = None
    max_gpu_memory: str | None = None
    cpu_offloading: bool = False

    @property
    def flag(self) -> str | None:
        """The first that asks for a GPU at all; `--num-gpus 1` is what everybody has anyway."""
        if self.gpus is not None:
            return f"--gpus {self.gpus}"
        if self.num_gpus not in (None, 1):
            return f"--num-gpus {self.num_gpus}"
        if self.max_gpu_memory is not None:
            return f"--max-gpu-memory {self.max_gpu_memory}"
        return "--cpu-offloading" if self.cpu_offloading else None

    @property
    def names(self) -> list[str]:
        """Of `--gpus`."""
        return [name.strip() for name in (self.gpus or "").split(",") if name.strip()]

    @property
    def limit_bytes(self) -> int | None:
        """For the weights on each GPU."""
        return None if self.max_gpu_memory is None else parse_size(self.max_gpu_memory)


def show_gpus(options: GPUOptions) -> None:
    """Check the flags, and hide the GPUs that `--gpus` does not name from this process.

    Before PyTorch has seen any. Raises `UsageError` for values that no machine has.
    """
    if options.max_gpu_memory is not None and options.limit_bytes is None:
        raise UsageError(
            f"--max-gpu-memory {options.max_gpu_memory!r} is no size of memory; write it as 13GiB"
        )
    if options.gpus is None:
        return
    names = options.names
    if not names or not all(_GPU_NAME.fullmatch(name) for name in names):
        raise UsageError(f"--gpus {options.gpus!r} is no list of GPUs; write it as 0,2")
    if len(set(names)) != len(names):
        raise UsageError(f"--gpus {options.gpus} names a GPU twice")
    if options.num_gpus is not None and options.num_gpus > len(names):
        raise UsageError(
            f"--num-gpus {options.num_gpus} is more than the {len(names)} that --gpus "
            f"{options.gpus} names"
        )
    environment.show_gpus(",".join(names))


def choose_device_map(
    checkpoint: Checkpoint,
    policy: DevicePolicy,
    options: GPUOptions,
    *,
    folder: Path,
    context: int | None = None,
    max_rows: int = 512,
) -> DeviceMap | None:
    """Where the network's parts go; None where one device has all of them, as it usually is.

    `folder`: for what fits into no memory. Raises `UsageError` when the GPUs that the flags ask for
    are not here, `DoesNotFit` when they are too small.
    """
    if options.flag is None:
        return None
    free = _free_gpus(policy, options)
    if len(free) == 1 and options.max_gpu_memory is None and not options.cpu_offloading:
        return None
    if not is_native(checkpoint.config):
        raise UsageError(
            f"{options.flag}: only the Llama family's networks are spread over devices, this one "
            "runs through transformers; leave the flag out"
        )
    policy = torch_policy(policy)
    plan = plan_memory(checkpoint, policy, max_rows=max_rows)
    room = Room(tuple(free.items()), options.limit_bytes)
    if options.cpu_offloading:
        room = dataclasses.replace(
            room, host_bytes=available_host_bytes(), disk_bytes=_free_disk_bytes(folder)
        )
    wanted = min(plan.context, context or _USUAL_CONTEXT)
    for num_tokens in (wanted, min(wanted, MIN_CONTEXT)):
        device_map = spread(checkpoint, policy, plan, room, num_tokens)
        if device_map is not None:
            return None if device_map.is_single else device_map
    raise DoesNotFit(_too_small(checkpoint, plan, room.for_weights(plan), options))


def torch_policy(policy: DevicePolicy) -> DevicePolicy:
    """The policy of a network whose parts lie apart: PyTorch's operators, our own products.

    Graphs of whole steps, and the kernels of the CPU, want a network in one piece.
    """
    return dataclasses.replace(policy, network="torch", kernels=None)


def free_for_tokens(model: PlacedLlama, plan: MemoryPlan) -> int:
    """What one device would need free to hold as many tokens as the fullest of these can."""
    parts = model.device_map.blocks
    num_blocks, block_bytes = len(parts), part_bytes(model.config, model.policy).block
    rooms: list[int] = []
    for name, count in model.device_map.blocks_by_device.items():
        num_carried = sum(part.is_offloaded and part.device == name for part in parts)
        room = available_bytes(torch.device(name)) - plan.working_bytes
        room -= min(num_carried, BLOCKS_ON_THE_WAY) * block_bytes
        rooms.append(max(0, room) * num_blocks // count)
    return plan.working_bytes + min(rooms)


def _free_gpus(policy: DevicePolicy, options: GPUOptions) -> Mapping[str, int]:
    """Free bytes of the GPUs that the flags ask for, by PyTorch's names."""
    if policy.kind != "cuda":
        way_out = "leave the flag out" if policy.kind == "cpu" else "Metal shares main memory"
        raise UsageError(f"{options.flag}: no CUDA device; {way_out}")
    here = present_gpus()
    wanted = options.num_gpus or len(options.names) or 1
    if len(options.names) > len(here) or wanted > len(here):
        raise UsageError(
            f"{options.flag}: {len(here)} CUDA devices are visible; name GPUs that are here, by "
            "the numbers that `nvidia-smi` shows"
        )
    return {name: available_bytes(torch.device(name)) for name in here[:wanted]}


def present_gpus() -> list[str]:
    """PyTorch's names of the GPUs that this process sees."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def _free_disk_bytes(folder: Path) -> int:
    if not hasattr(os, "posix_fallocate"):  # see `offload`
        return 0
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _too_small(
    checkpoint: Checkpoint, plan: MemoryPlan, gpus: Sequence[GPU], options: GPUOptions
) -> str:
    rooms = " + ".join(in_gb(gpu.limit_bytes) for gpu in gpus)
    ways = ["--load-8bit"] if plan.form in ("float32", "float16", "bfloat16") else []
    ways += [] if options.cpu_offloading else ["--cpu-offloading"]
    ways += [] if options.max_gpu_memory is None else ["a larger --max-gpu-memory"]
    return (
        f"{checkpoint.path} needs {in_gb(plan.weights_bytes)} of weights in {plan.form}, the GPUs "
        f"have {rooms} for them; use {', '.join([*ways, 'more GPUs'])} or a smaller model"
    )
