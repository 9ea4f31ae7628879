"""Whether a network fits into the memory that is free: the refusal, and what would help.

Goes by headers and needs no PyTorch, so that a worker can ask before that is loaded. Allocates
nothing; the figures are `memory_plan`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from chatserve.errors import DoesNotFit, ModelLoadError, UsageError
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import is_native
from chatserve.models.form import Form, PlainForm, form_on_cpu, packed
from chatserve.models.memory import available_host_bytes, in_gb
from chatserve.models.memory_plan import plan_memory
from chatserve.models.packing import Packing, four_bits


def check_fit(
    checkpoint: Checkpoint, form: Form, available: int, max_rows: int, *, on_triton: bool = False
) -> None:
    """Raises `DoesNotFit` when not even a short context fits beside the weights in `available`
    bytes."""
    plan = plan_memory(checkpoint, form, max_rows=max_rows)
    if plan.least_bytes <= available:
        return
    way_out = "use a smaller model or free some memory"
    for flag, smaller_form in _smaller_forms(checkpoint, form, on_triton):
        smaller = plan_memory(checkpoint, smaller_form, max_rows=max_rows)
        if smaller.least_bytes <= available:
            way_out = f"use {flag} ({in_gb(smaller.weights_bytes)})"
            break
    raise DoesNotFit(
        f"{checkpoint.path} needs {in_gb(plan.weights_bytes)} of weights in {plan.form} and "
        f"{in_gb(plan.least_bytes - plan.weights_bytes)} to work in, {form.kind} has "
        f"{in_gb(available)} free; {way_out}"
    )


def check_fit_on_cpu(path: Path, dtype: str, packing: Packing | None, max_rows: int) -> None:
    """The same of a file or folder for a worker on the CPU, before it has taken any memory.

    `dtype`: as in `--dtype`. What else is wrong with the files is said when they are loaded.
    Raises `DoesNotFit`.
    """
    try:
        checkpoint = open_checkpoint(path, headers_only=True)
    except ModelLoadError:
        return
    with closing(checkpoint.weights):
        if not is_native(checkpoint.config):
            return  # its sizes are transformers' to tell
        try:
            # of two halves and float32, the least: which of them it is PyTorch knows
            chosen = None if dtype == "auto" else dtype
            form = form_on_cpu(checkpoint, chosen, packing, usual="bfloat16")
            check_fit(checkpoint, form, available_host_bytes(), max_rows)
        except (ModelLoadError, UsageError):
            return


def _smaller_forms(
    checkpoint: Checkpoint, form: Form, on_triton: bool
) -> Iterator[tuple[str, PlainForm]]:
    """The flags that would compress the weights further, largest form first."""
    bits = form.packing.bits if form.packing else 16
    if not is_native(checkpoint.config):
        return
    if bits > 8:
        yield "--load-8bit", packed(checkpoint, form, Packing())
    four = packed(checkpoint, form, four_bits(form.kind))
    if bits > 4 and (four.on_kernels or on_triton):
        yield "--load-4bit", four
