"""The reward model: TRL's RewardTrainer, -log sigmoid(r_chosen - r_rejected), LoRA and a new head.

Texts are those of fine-tuning, without an end-of-sequence token behind them, as the recipe of 2023
had it (TRL of today would append one); a score is of the text's last token. The head is saved in
the adapter's own file, so that the adapter alone makes a base a reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import RewardConfig, RewardTrainer

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
from chatserve.train.prepared_rows import read_rows
from chatserve.train.recipe import RewardRecipe
from chatserve.train.run_folder import RunFolder
from chatserve.train.run_options import RunOptions
from chatserve.train.texts import training_text

TRAIN, HELD_OUT = "reward", "evaluation"
_COLUMNS = ("chosen_ids", "rejected_ids")


class _CountingTrainer(RewardTrainer):  # type: ignore[misc]  # TRL is untyped
    """RewardTrainer whose accuracy counts every held-out pair once, whatever batch it is in."""

    def evaluate(self, *arguments: Any, **others: Any) -> dict[str, float]:
        """Accuracy, loss and margin over all held-out pairs; a tie is no success."""
        model, accelerator = self.model, self.accelerator
        was_training = model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        size = self.args.per_device_eval_batch_size
        own = range(accelerator.process_index, len(self.eval_dataset), accelerator.num_processes)
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(own), size):
                batch = self.data_collator(
                    [self.eval_dataset[index] for index in own[start : start + size]]
                )
                inputs = {name: each.to(accelerator.device) for name, each in batch.items()}
                scores = model(**inputs, use_cache=False).logits.squeeze(-1).double().cpu()
                margins = torch.sub(*scores.chunk(2))
                parts = ((margins > 0).double(), -logsigmoid(margins), margins)
                sums[:3] += torch.stack([part.sum() for part in parts])
                sums[3] += len(margins)
        # Metal knows no float64
        sums = accelerator.reduce(sums.float().to(accelerator.device)).cpu()
        names = ("eval_accuracy", "eval_loss", "eval_margin")
        figures = dict(zip(names, (sums[:3] / sums[3]).tolist(), strict=True))
        self.log(figures)
        model.train(was_training)
        return figures


class _Trainer(DurableTrainer, _CountingTrainer):
    """The same, and its checkpoints are whole."""


def train_reward(
    weights: Path,
    data: Path,
    run: RunFolder,
    recipe: RewardRecipe,
    options: RunOptions,
    report: Report,
) -> Outcome:
    """Train a reward adapter of `weights` on the pairs of `data`, into `RUN/adapter`.

    The outcome's `eval_accuracy` is of the evaluation split. A run that was begun goes on. report:
    told after each step. Raises `UsageError` for settings other than it was begun with,
    `TrainingDiverged`, `CannotWrite` and `ModelLoadError`.
    """
    with no_network():
        base, settings = begin("reward", weights, data, [TRAIN, HELD_OUT], run, recipe, options)
        trainer = _trainer(base, data, run, recipe, options)
        return fit(trainer, base, run, recipe, settings, report)


def _trainer(
    base: TrainingBase, data: Path, run: RunFolder, recipe: RewardRecipe, options: RunOptions
) -> _Trainer:
    length = recipe.max_length
    train = tokens(
        run, "train", _COLUMNS, _pairs(base, data, TRAIN, recipe.num_train_pairs, length)
    )
    held_out = tokens(
        run, "eval", _COLUMNS, _pairs(base, data, HELD_OUT, recipe.num_eval_pairs, length)
    )
    if not len(train):
        raise UsageError(
            f"{data}: its {TRAIN} split has no pair of at most {length} tokens a side; raise "
            "--max-length, or take other data"
        )
    trainer = _Trainer(
        model=base.model,
        args=RewardConfig(
            **arguments(recipe, options, run, base.device),
            num_train_epochs=recipe.num_epochs,
            disable_dropout=False,  # the recipe's dropout is wanted
            eval_strategy="steps" if len(held_out) else "no",
        ),
        train_dataset=train,
        eval_dataset=held_out if len(held_out) else None,
        processing_class=base.processing,
        peft_config=lora(recipe, "SEQ_CLS"),
    )
    trainer.run, trainer.keep_checkpoints = run, options.keep_checkpoints
    return trainer


def _pairs(
    base: TrainingBase, data: Path, split: str, count: int, max_length: int
) -> Callable[[], Iterator[dict[str, Any]]]:
    """At most `count` pairs of `split`, without those that have a side over `max_length` tokens."""

    def rows() -> Iterator[dict[str, Any]]:
        columns = ("question", "chosen", "rejected")
        for index, (question, *answers) in enumerate(read_rows(data, split, columns)):
            if index >= count:
                return
            sides = [
                base.processing.encode_text(training_text(question, answer)) for answer in answers
            ]
            if max(map(len, sides)) <= max_length:
                yield dict(zip(_COLUMNS, sides, strict=True))

    return rows
