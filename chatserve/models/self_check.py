"""Whether weights are what they say: they read a known text, before anybody is answered.

Faults of a conversion that a user meets as "it talks garbage" are named with the command that puts
them right. Random weights and models of other languages are served. Knows no engine.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from chatserve.errors import ModelLoadError
from chatserve.models import reading
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import is_native
from chatserve.models.conversion_faults import (
    Fault,
    other_faults,
    suspected_rows,
    suspected_scaling,
)
from chatserve.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# By nats a token; a wrong order of rows costs SmolLM2 0.7 to 1.1, a right one that is "put right"
# as much again.
_MIN_GAIN = 0.2


class Diagnosis(NamedTuple):
    """A fault, and what the text costs with and without it, in nats a token."""

    fault: Fault
    loss: float
    mended_loss: float


def check_reading(checkpoint: Checkpoint, tokenizer: Tokenizer, loss: float) -> None:
    """Refuse weights that a known fault explains; warn of others that read nothing.

    loss: of the loaded network, by `reading.COUNTING`. Raises `ModelLoadError`.
    """
    vocab_size = tokenizer.vocab_size
    is_readable = loss < reading.readable_loss(vocab_size)
    diagnosis = diagnose(checkpoint, tokenizer, is_readable=is_readable)
    if diagnosis is not None:
        raise ModelLoadError(f"{checkpoint.path}: {explain(diagnosis)}; {way_out(checkpoint)}")
    if not is_readable:
        closer = f"; look closer: chatserve repair {checkpoint.path}"
        logger.warning(
            "%s reads plain English hardly better than chance (%.1f nats a token): random or "
            "damaged weights, or another model's config.json or tokenizer%s",
            checkpoint.path, loss, closer if checkpoint.path.is_dir() else "",
        )  # fmt: skip


def diagnose(
    checkpoint: Checkpoint, tokenizer: Tokenizer, *, is_readable: bool
) -> Diagnosis | None:
    """The fault of these weights, if there is one and undoing it makes them read.

    Takes a moment where nothing is suspected, else reads all the weights once for each suspicion.
    """
    if not is_native(checkpoint.config):
        return None
    rows = suspected_rows(checkpoint)
    scaling = suspected_scaling(checkpoint)
    suspects: list[Fault] = [each for each in (scaling, rows) if each]
    if not is_readable:
        suspects += other_faults(checkpoint)
    if not suspects:
        return None
    ids = reading.token_ids(tokenizer, reading.PROSE, reading.MAX_TOKENS)
    loss = reading.loss_from_disk(checkpoint, ids)
    for fault in suspects:
        mended_loss = reading.loss_from_disk(fault.mended(checkpoint), ids)
        is_gain = mended_loss < loss - _MIN_GAIN
        if is_gain and mended_loss < reading.readable_loss(tokenizer.vocab_size):
            return Diagnosis(fault, loss, mended_loss)
    return None


def explain(diagnosis: Diagnosis) -> str:
    return (
        f"{diagnosis.fault.what} (plain English costs {diagnosis.loss:.1f} nats a token, "
        f"{diagnosis.mended_loss:.1f} with that undone)"
    )


def way_out(checkpoint: Checkpoint) -> str:
    """The command that puts it right; a `.gguf` file has to be made again."""
    if not checkpoint.path.is_dir():
        return "make the .gguf file again from a folder that is right, or take another one"
    return f"put it right: chatserve repair {checkpoint.path} TARGET"
