"""In which form a worker holds a network: kind of device, dtype, packing, whose products.

Plain data, and the rules that need neither PyTorch nor a device: `device.DevicePolicy` is such a
form with its operators, the memory plan gets along with `PlainForm`.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass, replace
from typing import Protocol

from chatserve.errors import ModelLoadError, UsageError
from chatserve.kernels.library import Kernels, KernelsUnavailable, load_kernels
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.hardware import multiplies_bfloat16
from chatserve.models.kernel_limits import misfit
from chatserve.models.packing import GROUP, Packing
from chatserve.models.weights import ITEM_BYTES, file_packing

logger = logging.getLogger(__name__)


class Form(Protocol):
    """What decides how many bytes a network takes.

    `kind`: of device. `packing` is None without compression; `on_kernels`: the CPU's own hold it.
    """

    @property
    def kind(self) -> str: ...

    @property
    def dtype_name(self) -> str: ...

    @property
    def packing(self) -> Packing | None: ...

    @property
    def on_kernels(self) -> bool: ...


@dataclass(frozen=True)
class PlainForm:
    """A `Form` on a device that need not be here."""

    kind: str
    dtype_name: str
    packing: Packing | None = None
    on_kernels: bool = False

    @staticmethod
    def of(form: Form) -> PlainForm:
        return PlainForm(form.kind, form.dtype_name, form.packing, form.on_kernels)


def item_bytes(form: Form) -> int:
    """Of one value that is not packed."""
    return ITEM_BYTES[form.dtype_name]


def native_config(checkpoint: Checkpoint) -> ModelConfig:
    """The config, tied when the checkpoint has no head of its own.

    Raises `ModelLoadError` naming the file, and the key that is missing or wrong.
    """
    has_head = "lm_head.weight" in checkpoint.weights.tensors()
    content = dict(checkpoint.config)
    content["tie_word_embeddings"] = content.get("tie_word_embeddings", False) or not has_head
    try:
        return ModelConfig.from_hf(content)
    except ModelLoadError as error:
        # of a .gguf file the content stands in its header
        what = error.message.replace(
            "config.json", "its header" if checkpoint.metadata else "config.json"
        )
        raise ModelLoadError(f"{checkpoint.path}: {what}") from error


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether the files hold the matrices in about 8 bits a weight or fewer, as most GGUF do."""
    infos = [info for info in checkpoint.weights.tensors().values() if len(info.shape) == 2]
    num_weights = sum(math.prod(info.shape) for info in infos)
    return sum(info.num_bytes for info in infos) < 1.25 * num_weights


def fits_kernels(checkpoint: Checkpoint) -> bool:
    """Whether the CPU kernels are here and can hold the network of a checkpoint."""
    with contextlib.suppress(KernelsUnavailable):
        if is_native(checkpoint.config) and misfit(native_config(checkpoint)) is None:
            return bool(load_kernels())
    return False


def packed(checkpoint: Checkpoint, form: Form, packing: Packing) -> PlainForm:
    """`form` as it would be with weights compressed so."""
    on_kernels = form.kind == "cpu" and fits_kernels(checkpoint)
    return replace(PlainForm.of(form), packing=packing, on_kernels=on_kernels)


def packing_by_file(checkpoint: Checkpoint, form: Form, *, is_chosen: bool) -> Packing | None:
    """The packing of `form`, or the file's own for weights that come in 8 bits or fewer.

    The CPU kernels are several times faster than half precision, and nothing is rounded a second
    time (docs/design/013). A form that they do not have becomes 8 bits with a scale per row.
    is_chosen: somebody asked for the dtype, which is then left alone.
    """
    own = file_packing(checkpoint.weights.tensors())
    if form.kind != "cpu":
        return form.packing
    if form.packing:
        return own if form.packing.bits == 4 and own is not None and own.bits == 4 else form.packing
    if is_chosen or not is_compressed(checkpoint) or not fits_kernels(checkpoint):
        return None
    return own or Packing()


def kernels_misfit(config: ModelConfig, form: Form) -> str | None:
    """Why the CPU kernels of `form` cannot hold this network; None where it has none, or they can.

    Raises `ModelLoadError` where nothing else takes such weights.
    """
    sizes = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    if form.packing and form.packing.bits == 4 and any(size % GROUP for size in sizes):
        raise ModelLoadError(
            f"{form.packing.bits}-bit weights come in groups of {GROUP}, which this network's "
            f"sizes {sizes} are no multiples of; use --load-8bit"
        )
    reason = misfit(config) if form.on_kernels else None
    if reason and form.packing != Packing():
        raise ModelLoadError(
            f"{_named(form.packing)} weights need the CPU kernels, which cannot hold this network: "
            f"{reason}; use --load-8bit alone"
        )
    return reason


def choose_kernels(packing: Packing) -> tuple[Kernels | None, str]:
    """The CPU's own kernels and why; None where PyTorch's operators have to do.

    Raises `UsageError` where those do not know such weights.
    """
    try:
        kernels = load_kernels()
    except KernelsUnavailable as error:
        if packing != Packing():
            raise UsageError(
                f"{_named(packing)} weights need the CPU kernels, but {error}"
            ) from error
        logger.warning("8 bits run on PyTorch's operators, several times slower: %s", error)
        return None, f"no CPU kernels: {error}"
    return kernels, f"own CPU kernels for {kernels.level}"


def _named(packing: Packing | None) -> str:
    """For people: plain bits, and the group where it was asked for."""
    if packing is None:
        return "half-precision"
    fine = f" (--quant-group {GROUP})" if packing.bits == 8 and packing.is_grouped else ""
    return f"{packing.bits}-bit{fine}"


def form_on_cpu(
    checkpoint: Checkpoint,
    dtype_name: str | None = None,
    packing: Packing | None = None,
    *,
    usual: str | None = None,
) -> PlainForm:
    """How a worker on a CPU holds `checkpoint`; with neither dtype nor packing, as it likes best.

    `usual`: the dtype where none is chosen; None asks PyTorch what this CPU multiplies.
    Raises `UsageError` or `ModelLoadError` where it would refuse.
    """
    if usual is None:
        usual = "bfloat16" if multiplies_bfloat16() else "float32"
    on_kernels = packing is not None and choose_kernels(packing)[0] is not None
    form = PlainForm("cpu", dtype_name or usual, packing, on_kernels)
    own = packing_by_file(checkpoint, form, is_chosen=dtype_name is not None)
    if own and packing is None:
        return packed(checkpoint, form, own)
    form = replace(form, packing=own)
    if is_native(checkpoint.config) and kernels_misfit(native_config(checkpoint), form):
        return replace(form, on_kernels=False)
    return form


def form_on_gpu(checkpoint: Checkpoint, kind: str, packing: Packing | None = None) -> PlainForm:
    """The same on a GPU, which need not be here."""
    if kind == "mps" and packing and packing.bits == 4:
        raise UsageError("there is no product in 4 bits on mps")
    form = PlainForm(kind, "float16" if kind == "mps" else "bfloat16", packing)
    if is_native(checkpoint.config):
        kernels_misfit(native_config(checkpoint), form)
    return form
