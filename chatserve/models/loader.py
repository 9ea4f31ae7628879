"""Checkpoint to network: tensors stream into their final dtype on their final device.

Some rows of one checkpoint tensor are resident at a time, so the peak stays near the final size,
whatever the largest tensor is and however much it grows on the way. No network code.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.destinations import Destination
from chatserve.models.device import DevicePolicy
from chatserve.models.device_map import DeviceMap
from chatserve.models.fallback import FallbackModel, load_fallback, read_hf_config
from chatserve.models.fit import check_fit
from chatserve.models.form import kernels_misfit, native_config
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama, thread_counts
from chatserve.models.memory import available_bytes
from chatserve.models.packing import Packing
from chatserve.models.placed_llama import PlacedLlama
from chatserve.models.row_stream import RowStream, pieces
from chatserve.models.weights import TensorInfo
from chatserve.progress import Progress

logger = logging.getLogger(__name__)

_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")


def load_model(
    checkpoint: Checkpoint,
    policy: DevicePolicy,
    *,
    progress: Progress | None = None,
    max_rows: int = 512,
    device_map: DeviceMap | None = None,
    offload_folder: Path | None = None,
) -> Llama | KernelLlama | FallbackModel:
    """Load a checkpoint for `policy`; a step has at most `max_rows` tokens.

    device_map: where the parts go, which has been found to fit; to one device without. Layers on
    the disk lie in `offload_folder`.
    Raises `DoesNotFit` before anything is allocated, `ModelLoadError` naming the tensor that is
    missing, unknown or of the wrong shape.
    """
    report = progress or (lambda done, total: None)
    if not is_native(checkpoint.config):
        return _load_fallback(checkpoint, policy, report, max_rows)
    config = native_config(checkpoint)
    policy = without_misfits(config, policy)
    if device_map is not None:
        assert offload_folder is not None
        model: Llama | KernelLlama = PlacedLlama(config, policy, device_map, offload_folder)
    else:
        _check_memory(checkpoint, policy, max_rows)
        model = _build(config, policy, max_rows)
    destinations = model.destinations()
    infos = checkpoint.weights.tensors()
    wanted = match_tensors(destinations, infos, checkpoint)
    meter = _Meter(wanted, report)
    parts = (piece for info in wanted for piece in pieces(info, destinations[info.name]))
    with torch.inference_mode(), RowStream(checkpoint.weights, thread_counts()[0]) as stream:
        for piece in stream.move(parts):
            meter.add(piece.num_bytes)
    return model


def without_misfits(config: ModelConfig, policy: DevicePolicy) -> DevicePolicy:
    """The policy without the CPU kernels, where they cannot hold this network.

    Raises `ModelLoadError` where nothing else takes such weights.
    """
    reason = kernels_misfit(config, policy)
    if reason is None:
        return policy
    logger.warning("8 bits run on PyTorch's operators, several times slower: %s", reason)
    return dataclasses.replace(policy, kernels=None, reasons=(*policy.reasons, reason))


def _build(config: ModelConfig, policy: DevicePolicy, max_rows: int) -> Llama | KernelLlama:
    if policy.kernels is None or policy.packing is None:
        return build_network(config, policy)
    return KernelLlama(
        config, policy, policy.kernels, policy.packing,
        max_rows=max_rows, thread_counts=thread_counts(),
    )  # fmt: skip


def build_network(config: ModelConfig, policy: DevicePolicy) -> Llama:
    """The network on PyTorch's operators, or on our own for CUDA where they can hold it."""
    if policy.network == "torch":
        return Llama(config, policy)
    from chatserve.models.triton.network import TritonLlama, misfit

    reason = misfit(config)
    if reason is None:
        return TritonLlama(config, policy)
    logger.warning("runs on PyTorch's operators, slower: %s", reason)
    return Llama(config, policy)


def _check_memory(checkpoint: Checkpoint, policy: DevicePolicy, max_rows: int) -> None:
    """Raises `DoesNotFit` when not even a short context fits beside the weights."""
    available = available_bytes(policy.device)
    check_fit(checkpoint, policy, available, max_rows, on_triton=policy.network == "triton")


def match_tensors(
    destinations: Mapping[str, Destination],
    infos: Mapping[str, TensorInfo],
    checkpoint: Checkpoint,
) -> list[TensorInfo]:
    """The tensors to read, in disk order, all names and shapes checked before any is read."""
    missing = [name for name in destinations if name not in infos]
    if missing:
        raise ModelLoadError(
            f"{checkpoint.path} lacks {len(missing)} of {len(destinations)} tensors, first "
            f"{missing[0]}; the download is incomplete or config.json is another model's"
        )
    extra = [
        name for name in infos
        if name not in destinations and name != "lm_head.weight" and not _IGNORED.match(name)
    ]  # fmt: skip
    if extra:
        raise ModelLoadError(
            f"{checkpoint.path} holds {len(extra)} tensors that config.json's architecture does "
            f"not have, first {extra[0]}; config.json is another model's, or this is not a plain "
            "causal language model"
        )
    for name, place in destinations.items():
        if tuple(infos[name].shape) != place.shape:
            raise ModelLoadError(
                f"{checkpoint.path}: {name} has shape {tuple(infos[name].shape)}, config.json "
                f"asks for {place.shape}; the files belong to different models"
            )
    return [info for name, info in infos.items() if name in destinations]


class _Meter:
    """Reports how many bytes of the wanted tensors have been read."""

    def __init__(self, wanted: list[TensorInfo], report: Progress) -> None:
        self._done, self._total = 0, sum(info.num_bytes for info in wanted)
        self._report = report
        self.add(0)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._report(self._done, self._total)


def _load_fallback(
    checkpoint: Checkpoint, policy: DevicePolicy, report: Progress, max_rows: int
) -> FallbackModel:
    read_hf_config(checkpoint.config)
    if policy.packing not in (None, Packing()) and policy.int8 != "bitsandbytes":
        raise UsageError(
            f"{checkpoint.path}: only the Llama family's weights become {policy.packing}, this "
            "model runs through transformers; use --load-8bit alone"
        )
    _check_memory(checkpoint, policy, max_rows)
    infos = list(checkpoint.weights.tensors().values())
    logger.warning(
        "%s is not of the Llama family: it runs through transformers, slower than natively",
        (checkpoint.config.get("architectures") or ["this model"])[0],
    )
    meter = _Meter(infos, report)
    state: dict[str, torch.Tensor] = {}
    for info in infos:
        if not _IGNORED.match(info.name):
            dtype = policy.dtype if info.dtype.is_floating_point else info.dtype
            state[info.name] = checkpoint.weights.read(info.name).to(dtype)
        meter.add(info.num_bytes)
    return load_fallback(checkpoint.config, state, policy)
