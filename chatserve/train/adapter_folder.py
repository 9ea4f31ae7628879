"""The adapter that a run leaves: PEFT's files, and a record of how it was trained.

`chatserve_training.json` has no date in it: the same run writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chatserve.errors import ModelLoadError
from chatserve.models.score_head import TRAINING_RECORD, training_record
from chatserve.train.base import BaseIdentity, TrainingBase
from chatserve.train.run_folder import RunFolder, disk_faults, place_folder, write_json
from chatserve.train.texts import TEMPLATE

if TYPE_CHECKING:
    from peft import PeftModel

Kind = Literal["sft", "reward", "rl"]
FORMAT = 1


def save_adapter(
    run: RunFolder,
    model: PeftModel,
    base: TrainingBase | BaseIdentity,
    *,
    kind: Kind,
    recipe: object,
    steps: int,
    figures: Mapping[str, float] | None = None,
    name: str = "default",
) -> Path:
    """Write `RUN/adapter` whole or not at all: the adapter `name` of `model`, with its score head.

    figures: what the run measured at its end. Raises `CannotWrite`.
    """
    record = {
        "format": FORMAT,
        "kind": kind,
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "template": TEMPLATE,
        "recipe": dataclasses.asdict(recipe),  # type: ignore[call-overload]
        "steps": steps,
        "figures": dict(figures or {}),
    }
    with disk_faults(run.path):
        run.writing.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=run.writing))
        folder.chmod(0o755)
        write_peft(model, folder, name)
        write_json(folder / TRAINING_RECORD, record)
        place_folder(folder, run.adapter)
        run.clear_writing()
    return run.adapter


def write_peft(model: PeftModel, folder: Path, name: str = "default") -> None:
    """PEFT's two files of the adapter `name` in `folder` itself, without a card of the hub."""
    # an embedding that was not trained is the base's
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    if name != "default":  # PEFT gives every other one a folder of its own
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)


def check_adapter_base(folder: Path, base: TrainingBase | BaseIdentity) -> Mapping[str, Any]:
    """The record of an adapter that is to be used on `base`; empty where chatserve wrote none.

    Raises `ModelLoadError` when it was trained on other weights.
    """
    record = training_record(folder)
    trained_on = record.get("base_fingerprint")
    if trained_on is not None and trained_on != base.fingerprint:
        raise ModelLoadError(
            f"{folder}: was trained on {record.get('base')!r} ({trained_on}), this base is "
            f"{base.name!r} ({base.fingerprint}); use it with its own base, with the same adapters "
            "merged in"
        )
    return record
