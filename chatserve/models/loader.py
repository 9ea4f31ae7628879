"""Checkpoint to network: tensors stream into their final dtype on their final device.

Some rows of one checkpoint tensor are resident at a time, so the peak stays near the final size,
whatever the largest tensor is and however much it grows on the way. No network code.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping

import torch

from chatserve.errors import DoesNotFit, ModelLoadError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.destinations import Destination
from chatserve.models.device import DevicePolicy
from chatserve.models.fallback import FallbackModel, load_fallback, read_hf_config, refusals
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import HEAD_PACKING, KernelLlama, misfit, thread_counts
from chatserve.models.memory import available_bytes, in_gb
from chatserve.models.packing import GROUP, Packing
from chatserve.models.weights import TensorInfo
from chatserve.progress import Progress

logger = logging.getLogger(__name__)

_WORKING_BYTES = 300 << 20  # the interpreter, one tensor's slices, the first KV buffers
_SLICE_VALUES = 1 << 20  # read at a time; measured: larger ones leave larger holes in the heap
_IGNORED = re.compile(r".*(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")


def load_model(
    checkpoint: Checkpoint,
    policy: DevicePolicy,
    *,
    progress: Progress | None = None,
    max_rows: int = 512,
) -> Llama | KernelLlama | FallbackModel:
    """Load a checkpoint for `policy`; a step has at most `max_rows` tokens.

    Raises `DoesNotFit` before anything is allocated, `ModelLoadError` naming the tensor that is
    missing, unknown or of the wrong shape.
    """
    report = progress or (lambda done, total: None)
    if not is_native(checkpoint.config):
        return _load_fallback(checkpoint, policy, report)
    config = _native_config(checkpoint)
    policy = _without_misfits(config, policy)
    packed = None if policy.packing else _native_bytes(config, policy, Packing())
    needed = _native_bytes(config, policy, policy.packing)
    _check_memory(needed, packed, policy, checkpoint)
    model = _build(config, policy, max_rows)
    destinations = model.destinations()
    infos = checkpoint.weights.tensors()
    wanted = _match(destinations, infos, checkpoint)
    meter = _Meter(wanted, report)
    with torch.inference_mode():
        for info in wanted:
            place = destinations[info.name]
            for rows in _slices(info.shape):
                # no name for what is read: it would stay until the next rows are there
                place.target.load_rows(
                    place.start + rows.start, checkpoint.weights.read(info.name, rows)
                )
                meter.add(info.num_bytes * len(rows) // info.shape[0])
    return model


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether the files hold the matrices in about 8 bits a weight or fewer, as most GGUF do."""
    infos = [info for info in checkpoint.weights.tensors().values() if len(info.shape) == 2]
    num_weights = sum(math.prod(info.shape) for info in infos)
    return sum(info.num_bytes for info in infos) < 1.25 * num_weights


def fits_kernels(checkpoint: Checkpoint) -> bool:
    """Whether the CPU kernels can hold the network of a checkpoint."""
    return is_native(checkpoint.config) and misfit(_native_config(checkpoint)) is None


def _without_misfits(config: ModelConfig, policy: DevicePolicy) -> DevicePolicy:
    """The policy without the CPU kernels, where they cannot hold this network.

    Raises `ModelLoadError` where nothing else takes such weights.
    """
    sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    if policy.packing and policy.packing.bits == 4 and any(size % GROUP for size in sizes):
        raise ModelLoadError(
            f"{policy.packing} weights come in groups of {GROUP}, which this network's sizes "
            f"{sizes} are no multiples of; use --load-8bit"
        )
    reason = misfit(config) if policy.kernels else None
    if reason is None:
        return policy
    if policy.packing != Packing():
        raise ModelLoadError(
            f"{policy.packing} weights need the CPU kernels, which cannot hold this network: "
            f"{reason}; use --load-8bit alone"
        )
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


def context_length(config: Mapping[str, object]) -> int:
    """Tokens that the model of a `config.json` holds, native or not."""
    if is_native(config):
        return ModelConfig.from_hf(config).context_length
    hf_config = read_hf_config(config)
    with refusals("config.json, context length"):
        hf_config = hf_config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            value = getattr(hf_config, name, None)
            if type(value) is int and 0 < value <= 1 << 31:
                return value
    raise ModelLoadError("config.json does not say how long a context the model holds")


def kv_bytes_per_token(config: Mapping[str, object], bytes_per_value: int) -> int:
    """Keys and values of one token in all layers, native or not."""
    if is_native(config):
        return ModelConfig.from_hf(config).kv_bytes_per_token(bytes_per_value)
    hf_config = read_hf_config(config)
    with refusals("config.json, size of keys and values"):
        hf_config = hf_config.get_text_config()
        heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
        dim = getattr(hf_config, "head_dim", None)
        dim = dim or hf_config.hidden_size // hf_config.num_attention_heads
        num_bytes = int(2 * hf_config.num_hidden_layers * heads * dim * bytes_per_value)
    if not 0 < num_bytes < 1 << 62:
        raise ModelLoadError(
            "config.json gives no possible size of keys and values; the file is damaged"
        )
    return num_bytes


def _native_config(checkpoint: Checkpoint) -> ModelConfig:
    """The config, tied when the checkpoint has no head of its own."""
    has_head = "lm_head.weight" in checkpoint.weights.tensors()
    content = dict(checkpoint.config)
    content["tie_word_embeddings"] = content.get("tie_word_embeddings", False) or not has_head
    return ModelConfig.from_hf(content)


def _native_bytes(config: ModelConfig, policy: DevicePolicy, packing: Packing | None) -> int:
    size = policy.dtype.itemsize
    if packing is None:
        return config.num_parameters * size
    embedding = config.vocab_size * config.hidden_size
    half = 0 if config.is_tied else embedding
    head_packing = HEAD_PACKING if policy.kernels else packing
    body = config.num_parameters - half - embedding
    packed = body * packing.bytes_per_weight + embedding * head_packing.bytes_per_weight
    return int(packed) + half * size


def _check_memory(
    needed: int, packed: int | None, policy: DevicePolicy, checkpoint: Checkpoint
) -> None:
    """Raises `DoesNotFit`. `packed`: bytes with --load-8bit, None where it would not help."""
    available = available_bytes(policy.device)
    if needed + _WORKING_BYTES <= available:
        return
    way_out = "use a smaller model or free some memory"
    if packed is not None and packed + _WORKING_BYTES <= available:
        way_out = f"use --load-8bit ({in_gb(packed)})"
    raise DoesNotFit(
        f"{checkpoint.path} needs {in_gb(needed)} of weights in {_form(policy)} and "
        f"{in_gb(_WORKING_BYTES)} to work in, {policy.device.type} has {in_gb(available)} free; "
        f"{way_out}"
    )


def _form(policy: DevicePolicy) -> str:
    return str(policy.packing) if policy.packing else policy.dtype_name


def _match(
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


def _slices(shape: tuple[int, ...]) -> Iterator[range]:
    """All rows of a tensor, some at a time."""
    step = max(1, _SLICE_VALUES // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield range(start, min(start + step, shape[0]))


def _load_fallback(checkpoint: Checkpoint, policy: DevicePolicy, report: Progress) -> FallbackModel:
    read_hf_config(checkpoint.config)
    infos = list(checkpoint.weights.tensors().values())
    needed = sum(math.prod(info.shape) for info in infos) * policy.dtype.itemsize
    _check_memory(needed, None, policy, checkpoint)
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
