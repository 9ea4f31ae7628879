"""From WEIGHTS and forms to a receipt: opens, checks, measures, and draws. Knows no terminal."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import chatserve
from chatserve.engine.serving import as_the_file
from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.destinations import BlockTargets, NetworkTargets, destinations
from chatserve.models.device import DevicePolicy, check
from chatserve.models.fingerprint import weights_fingerprint
from chatserve.models.form import native_config
from chatserve.models.loader import match_tensors, without_misfits
from chatserve.models.receipt import MeasuredForm, Receipt, Text, read_receipt
from chatserve.models.tokenizer import load_tokenizer
from chatserve.progress import Progress
from chatserve.quality.measure import measure
from chatserve.quality.texts import WINDOW, read_text

REFERENCE = "float32 arithmetic on the weights as the files hold them"


@dataclass(frozen=True)
class Question:
    """What is to be measured. `dtype`: as the flag says, of forms that have one."""

    path: Path
    policies: Sequence[DevicePolicy]
    dtype: str
    text: Path | None
    num_tokens: int


@dataclass(frozen=True)
class Assessment:
    """The receipt with the forms that were known before; `measured`: names of those asked for now.

    `num_left`: tokens of the text that were not read.
    """

    receipt: Receipt
    measured: tuple[str, ...]
    num_left: int


def assess(question: Question, progress: Progress | None = None) -> Assessment:
    """Measure each form; stores nothing.

    Raises `UsageError` for the text, `ModelLoadError` for weights that are damaged or not of the
    Llama family, `DoesNotFit`.
    """
    checkpoint = open_checkpoint(question.path)
    with closing(checkpoint.weights):
        config = _checked_config(checkpoint)
        tokenizer = load_tokenizer(question.path, checkpoint.metadata)
        text = read_text(
            tokenizer, question.text, num_tokens=question.num_tokens,
            window=min(WINDOW, config.context_length), vocab_size=config.vocab_size,
        )  # fmt: skip
        policies = _distinct(
            [_served(config, checkpoint, policy, question.dtype) for policy in question.policies]
        )
        found = measure(checkpoint, config, policies, text, progress=progress)
        fingerprint = weights_fingerprint(checkpoint)
    receipt = Receipt(
        fingerprint=fingerprint,
        version=chatserve.__version__,
        text=Text(text.name, text.sha256, text.num_positions, WINDOW),
        reference=REFERENCE,
        reference_perplexity=found.reference_perplexity,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        measurements=found.measurements,
    )
    names = tuple(each.form.name for each in found.measurements)
    return Assessment(
        receipt.joined(read_receipt(question.path, fingerprint)), names, text.num_left
    )


def _checked_config(checkpoint: Checkpoint) -> ModelConfig:
    if not checkpoint.has_head:
        raise ModelLoadError(
            f"{checkpoint.path}: has no head, so there are no predictions to compare; quality "
            "measures models that generate"
        )
    if not is_native(checkpoint.config):
        kind = (checkpoint.config.get("architectures") or ["it"])[0]
        raise ModelLoadError(
            f"{checkpoint.path}: quality is measured layer by layer, which needs a network of the "
            f"Llama family; {str(kind)[:60]} runs through transformers"
        )
    config = native_config(checkpoint)
    match_tensors(destinations(config, _targets(config)), checkpoint.weights.tensors(), checkpoint)
    return config


def _served(
    config: ModelConfig, checkpoint: Checkpoint, policy: DevicePolicy, dtype: str
) -> DevicePolicy:
    """The policy with which a worker would serve these weights."""
    return without_misfits(config, check(as_the_file(policy, checkpoint, dtype)))


def _distinct(policies: Sequence[DevicePolicy]) -> list[DevicePolicy]:
    """One of each form: 8 and 4 bits of a file that keeps its own are the same."""
    return list({MeasuredForm.of(policy): policy for policy in policies}.values())


class _Nowhere:
    """Where rows would go, of a network that is only looked at."""

    def load_rows(self, start: int, rows: object) -> None:
        raise AssertionError("nothing is loaded here")


def _targets(config: ModelConfig) -> NetworkTargets:
    here = _Nowhere()

    def if_there(is_there: bool) -> _Nowhere | None:
        return here if is_there else None

    block = BlockTargets(
        here, here, here, here, here, here,
        qkv_bias=if_there(config.has_qkv_bias),
        output_bias=if_there(config.has_output_bias),
        gate_up_bias=if_there(config.has_mlp_bias),
        down_bias=if_there(config.has_mlp_bias),
        query_norm=if_there(config.has_qk_norm),
        key_norm=if_there(config.has_qk_norm),
    )  # fmt: skip
    return NetworkTargets(here, here, here, [block] * config.num_layers)
