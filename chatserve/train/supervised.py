"""Supervised fine-tuning: TRL's SFTTrainer on packed texts, LoRA on a frozen base.

Texts `Question: {q}\\n\\nAnswer: {a}`, an end-of-sequence token behind each, stand one after the
other and are cut every `max_length` tokens ("wrapped" packing): so the end is learnt like any other
token. Where the recipe of 2023 dropped the last, shorter piece, TRL keeps it, padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trl import SFTConfig, SFTTrainer

from chatserve.errors import UsageError
from chatserve.train.base import TrainingBase
from chatserve.train.durable import (
    DurableTrainer,
    Outcome,
    Report,
    arguments,
    begin,
    fit,
    lora,
    tokens,
)
from chatserve.train.offline import no_network
from chatserve.train.prepared_rows import count_rows, read_rows
from chatserve.train.recipe import SftRecipe
from chatserve.train.run_folder import RunFolder
from chatserve.train.run_options import RunOptions
from chatserve.train.texts import training_text

SPLIT = "finetune"


class _Trainer(DurableTrainer, SFTTrainer):  # type: ignore[misc]  # TRL is untyped
    """SFTTrainer whose checkpoints are whole."""


def train_sft(
    weights: Path,
    data: Path,
    run: RunFolder,
    recipe: SftRecipe,
    options: RunOptions,
    report: Report,
) -> Outcome:
    """Train an adapter of `weights` on the finetune split of `data`, into `RUN/adapter`.

    A run that was begun goes on. report: told after each step. Raises `UsageError` for settings
    other than it was begun with, `TrainingDiverged`, `CannotWrite` and `ModelLoadError`.
    """
    num_rows = count_rows(data, SPLIT)
    if not num_rows:
        raise UsageError(f"{data}: its {SPLIT} split is empty; there is nothing to train on")
    num_eval = min(recipe.num_eval_rows, num_rows // 10)
    with no_network():
        base, settings = begin("sft", weights, data, [SPLIT], run, recipe, options)
        trainer = _trainer(base, data, run, recipe, options, num_eval)
        return fit(trainer, base, run, recipe, settings, report)


def _trainer(
    base: TrainingBase,
    data: Path,
    run: RunFolder,
    recipe: SftRecipe,
    options: RunOptions,
    num_eval: int,
) -> _Trainer:
    train = tokens(run, "train", ("input_ids",), _rows(base, data, num_eval, None))
    held_out = tokens(run, "eval", ("input_ids",), _rows(base, data, 0, num_eval))
    trainer = _Trainer(
        model=base.model,
        args=SFTConfig(
            **arguments(recipe, options, run, base.device),
            packing=True,
            packing_strategy="wrapped",
            shuffle_dataset=True,  # before packing: neighbours in a file are of one time
            eval_strategy="steps" if num_eval else "no",
        ),
        train_dataset=train,
        eval_dataset=held_out if num_eval else None,
        processing_class=base.processing,
        peft_config=lora(recipe, "CAUSAL_LM"),
    )
    trainer.run, trainer.keep_checkpoints = run, options.keep_checkpoints
    return trainer


def _rows(
    base: TrainingBase, data: Path, start: int, stop: int | None
) -> Callable[[], Iterator[dict[str, Any]]]:
    def rows() -> Iterator[dict[str, Any]]:
        for index, (question, answer) in enumerate(read_rows(data, SPLIT, ("question", "answer"))):
            if stop is not None and index >= stop:
                return
            if index >= start:
                text = training_text(question, answer)
                yield {"input_ids": base.processing.encode_text(text, ends=True)}

    return rows
