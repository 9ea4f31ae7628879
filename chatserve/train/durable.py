"""What `train sft` and `train reward` share around TRL's trainers: checkpoints, log, data, end.

A checkpoint is written aside by every process and renamed by the first; the log stops a training
whose loss is no number before the next checkpoint could keep it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from chatserve.models.adapter_config import ADAPTER_CONFIG
from chatserve.train.adapter_folder import Kind, check_adapter_base, save_adapter, write_peft
from chatserve.train.base import TrainingBase, identify_base, open_base, training_device
from chatserve.train.prepared_rows import data_fingerprint
from chatserve.train.recipe import RewardRecipe, RlRecipe, SftRecipe
from chatserve.train.run_folder import RunFolder, disk_faults, step_of
from chatserve.train.run_options import RunOptions, run_settings
from chatserve.train.training_log import TrainingLog, check_finite, read_log

logger = logging.getLogger(__name__)

# Clocks, and counts that begin anew where a run goes on: with them no log would be like another.
_UNLOGGED = ("runtime", "per_second", "flos", "num_tokens", "train_loss")
TOKENS = "tokens"
Report = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Outcome:
    """A run that has ended. figures: what it measured last, by its name in the log."""

    adapter: Path
    steps: int
    figures: Mapping[str, float]


def arguments(
    recipe: SftRecipe | RewardRecipe, options: RunOptions, run: RunFolder, device: torch.device
) -> dict[str, Any]:
    """Of transformers' trainers, as recipe and options say it."""
    return {
        "output_dir": str(run.writing),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "optim": "adamw_torch",
        "max_length": recipe.max_length,
        "max_steps": recipe.max_steps or -1,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "bf16": is_on(recipe.bf16, device),
        "gradient_checkpointing": is_on(recipe.gradient_checkpointing, device),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "eval_steps": options.eval_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def begin(
    kind: str,
    weights: Path,
    data: Path,
    splits: Sequence[str],
    run: RunFolder,
    recipe: SftRecipe | RewardRecipe,
    options: RunOptions,
) -> tuple[TrainingBase, dict[str, Any]]:
    """Open the base, and the run with its settings.

    Raises `UsageError` for settings other than it was begun with, before anything is written, and
    `ModelLoadError` for adapters to merge that belong to another base.
    """
    adapters = [Path(each).expanduser() for each in options.adapter]
    for index, folder in enumerate(adapters):
        check_adapter_base(folder, identify_base(weights, adapters=adapters[:index]))
    state = PartialState(cpu=options.device == "cpu")
    settings = run_settings(
        kind, recipe, options, base=identify_base(weights, adapters=adapters).fingerprint,
        data=data_fingerprint(data, splits), num_processes=state.num_processes,
    )  # fmt: skip
    with state.main_process_first():
        run.begin(settings)
    int8 = is_on(recipe.int8, training_device(options.device))
    base = open_base(
        weights, device=options.device, int8=int8, seed=recipe.seed, adapters=adapters,
        head="score" if kind == "reward" else "text",
    )  # fmt: skip
    return base, settings


def is_on(choice: str, device: torch.device) -> bool:
    """`auto` is on where there is CUDA."""
    return device.type == "cuda" if choice == "auto" else choice == "on"


def lora(recipe: SftRecipe | RewardRecipe | RlRecipe, task: str) -> Any:
    """PEFT's config of the recipe's adapter."""
    from peft import LoraConfig

    return LoraConfig(
        task_type=task, r=recipe.lora_rank, lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout, target_modules=list(recipe.target_modules), bias="none",
    )  # fmt: skip


def tokens(
    run: RunFolder, name: str, columns: tuple[str, ...], rows: Callable[[], Iterator[Any]]
) -> Dataset:
    """`rows` of token ids on the disk, in `RUN/tokens`, mapped into memory.

    Made by the first process and found by the others. Raises `CannotWrite`.
    """
    features = Features({column: List(Value("int32")) for column in columns})
    if next(rows(), None) is None:  # of nothing the library can make no file
        return Dataset.from_dict({column: [] for column in columns}, features=features)
    with disk_faults(run.path), PartialState().main_process_first():
        return Dataset.from_generator(
            _Rows(rows), features=features, cache_dir=str(run.path / TOKENS / name),
            fingerprint=f"chatserve-{name}",
        )  # fmt: skip


class _Rows:
    """A generator function that hashes by nothing: its cache lies in the run's own folder."""

    def __init__(self, rows: Callable[[], Iterator[Any]]) -> None:
        self._rows = rows

    def __call__(self) -> Iterator[Any]:
        return self._rows()

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, ("rows of this run",))


class DurableTrainer:
    """Mixed into a trainer of TRL: its checkpoints go to the run's folder, whole or not at all."""

    run: RunFolder
    keep_checkpoints: int
    evaluated_step: int | None = None

    def evaluate(self: Any, *arguments: Any, **others: Any) -> dict[str, float]:
        """Once a step: at an epoch's end transformers asks a second time."""
        if self.evaluated_step == self.state.global_step:
            return {}
        self.evaluated_step = self.state.global_step
        figures: dict[str, float] = super().evaluate(*arguments, **others)  # type: ignore[misc]
        return figures

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        accelerator, step = self.accelerator, self.state.global_step
        last = self.run.last_checkpoint()
        accelerator.wait_for_everyone()
        if last is not None and step_of(last) == step:
            return  # the second time, likewise
        if accelerator.is_main_process:
            self.run.clear_writing()
        accelerator.wait_for_everyone()
        with disk_faults(self.run.path):
            self.run.writing.mkdir(parents=True, exist_ok=True)
            # not TRL's own, which writes a card for a hub beside it
            Trainer._save_checkpoint(self, model, trial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            written = self.run.writing / f"checkpoint-{step}"
            self.run.place_checkpoint(written, step, keep=self.keep_checkpoints)
        accelerator.wait_for_everyone()

    def _save(self: Any, output_dir: str, state_dict: Any = None) -> None:
        """Of a checkpoint's weights the adapter alone."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_peft(self.accelerator.unwrap_model(self.model), folder)
        assert (folder / ADAPTER_CONFIG).exists()


class LogCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Hands what a trainer logs to the run's log, in the first process; all of them may stop."""

    def __init__(self, run: RunFolder, log: TrainingLog | None, report: Report) -> None:
        self._run, self._log, self._report = run, log, report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        values = {
            name: float(value)
            for name, value in (logs or {}).items()
            if isinstance(value, int | float) and not any(part in name for part in _UNLOGGED)
        }
        if not values.keys() - {"epoch"}:
            return
        if self._log is None:
            check_finite(self._run, state.global_step, values)
        else:
            self._log.write(state.global_step, values)
            self._report(state.global_step, state.max_steps, values)


def fit(
    trainer: Any,
    base: TrainingBase,
    run: RunFolder,
    recipe: SftRecipe | RewardRecipe | RlRecipe,
    settings: Mapping[str, Any],
    report: Report,
) -> Outcome:
    """Train from the last checkpoint on to the end, measure what is held out, write the adapter.

    Raises `TrainingDiverged` and `CannotWrite`.
    """
    accelerator = trainer.accelerator
    checkpoint = run.last_checkpoint()
    step = step_of(checkpoint) if checkpoint else 0
    log = TrainingLog(run, step, settings) if accelerator.is_main_process else None
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogCallback(run, log, report))
    try:
        with disk_faults(run.path):
            _train(trainer, checkpoint)
        if trainer.eval_dataset is not None and not _is_evaluated(run, trainer.state.global_step):
            trainer.evaluate()
    finally:
        if log is not None:
            log.close()
    steps = int(trainer.state.global_step)
    # of the log, which a run that was killed after its last step has whole
    figures = {name: value for row in read_log(run.log) for name, value in row.items()}
    figures = {name: value for name, value in figures.items() if name not in ("step", "epoch")}
    if accelerator.is_main_process:
        kind: Kind = settings["kind"]
        save_adapter(
            run, accelerator.unwrap_model(trainer.model), base, kind=kind, recipe=recipe,
            steps=steps, figures=figures,
        )  # fmt: skip
        # only training needed them, and they are made again from the data
        shutil.rmtree(run.path / TOKENS, ignore_errors=True)
    accelerator.wait_for_everyone()
    return Outcome(run.adapter, steps, figures)


def _train(trainer: Any, checkpoint: Path | None) -> None:
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:  # where nothing is left to do, transformers would do one step more
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state


def _is_evaluated(run: RunFolder, step: int) -> bool:
    return any(row["step"] == step and "eval_loss" in row for row in read_log(run.log))
