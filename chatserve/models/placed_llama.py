"""The Llama family's network over several devices: `llama`'s own blocks, each where its weights go.

Hidden states move from device to device; keys and values stay with their layer. Knows no policy of
what lies where, which is `device_map`'s, and no files.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch

from chatserve.models.adapter import Adapter
from chatserve.models.adapter_places import MATRICES, num_matrices
from chatserve.models.batch import Batch
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.device_map import DISK, DeviceMap
from chatserve.models.kv_pool import TorchKVPool
from chatserve.models.llama import Block, Llama, Step
from chatserve.models.offload import Carrier, StoredBlock
from chatserve.models.rope import RotaryTable
from chatserve.models.torch_adapter import AdaptedRows, TorchAdapter


class PlacedLlama(Llama):
    """`Llama` whose parts lie where `device_map` says; layers on the disk in files of `folder`."""

    def __init__(
        self, config: ModelConfig, policy: DevicePolicy, device_map: DeviceMap, folder: Path
    ) -> None:
        stored: dict[int, StoredBlock] = {}

        def build(config: ModelConfig, layer: int, policy: DevicePolicy) -> Block:
            part = device_map.blocks[layer]
            block = Block(config, layer, _at(policy, part.device))
            if part.is_offloaded:
                disk = folder if part.home == DISK else None
                stored[layer] = StoredBlock(block, torch.device(part.device), disk)
            return block

        super().__init__(
            config,
            _at(policy, device_map.embedding.device),
            head_policy=_at(policy, device_map.head.device),
            build_block=build,
        )
        self.policy = policy
        self.device_map = device_map
        self._devices = [torch.device(part.device) for part in device_map.blocks]
        self._head_device = torch.device(device_map.head.device)
        self._rotaries = {
            device: RotaryTable(config.rope, config.head_dim, device, policy.dtype)
            for device in set(self._devices)
        }
        self._present = Carrier(stored)

    def build_adapter(self, adapter: Adapter) -> TorchAdapter:
        """As `Llama.build_adapter`; each matrix's change lies where the matrix computes."""
        devices = [device for device in self._devices for _ in MATRICES]
        return TorchAdapter(adapter, self.config, self.policy, [*devices, self._head_device])

    def forward(self, batch: Batch, pool: TorchKVPool) -> torch.Tensor:
        """As `Llama.forward`; the logits are where the head is."""
        ids = torch.tensor(batch.token_ids, device=self.device)
        steps = {device: self._step(batch, pool, device) for device in self._rotaries}
        with _current(self.device):
            x = self.embedding.embed(ids, self.policy.dtype)
        for layer, (block, device) in enumerate(zip(self.blocks, self._devices, strict=True)):
            with _current(device), self._present(layer):
                x = block(x.to(device), steps[device])
        if batch.hidden is not None:
            rows = x[torch.tensor(batch.hidden_rows, device=x.device)].to(self._head_device)
            with _current(self._head_device):
                batch.hidden.copy_(self.norm(rows))
        if not batch.output_rows:
            return x.new_empty(0, self.vocab_size, device=self._head_device)
        x = x[torch.tensor(batch.output_rows, device=x.device)].to(self._head_device)
        adapted = AdaptedRows.of(batch, self._head_device)
        with _current(self._head_device):
            x = self.norm(x)
            logits = self.head(x)
            if adapted is not None:
                adapted.select(batch.output_rows).change(logits, x, num_matrices(self.config) - 1)
            return logits

    def _step(self, batch: Batch, pool: TorchKVPool, device: torch.device) -> Step:
        positions = torch.tensor(batch.positions, device=device)
        num_positions = max(segment.num_total for segment in batch.segments)
        cos, sin = self._rotaries[device].at(positions, num_positions)
        place = pool.place(batch.segments, device)
        return Step(cos, sin, pool, place, AdaptedRows.of(batch, device))


def _at(policy: DevicePolicy, device: str) -> DevicePolicy:
    return replace(policy, device=torch.device(device))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton's kernels start on the current device, whatever their tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
