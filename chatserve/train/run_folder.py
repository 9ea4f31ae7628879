"""A training run on disk: its settings, checkpoints, log and the adapter it leaves behind.

    RUN/settings.json           every setting, and what base and data were
    RUN/checkpoint-N/           adapter, optimiser, schedule, random states after step N
    RUN/log.jsonl               one JSON object a line: {"step": 1, "loss": 2.5, …}
    RUN/tensorboard/            the same for TensorBoard
    RUN/adapter/                the adapter to serve, once the run has ended

Everything appears under its name whole or not at all (written aside, synced, renamed), so a run
that was killed anywhere goes on from its last checkpoint. Knows no trainer and no tensor.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chatserve.errors import CannotWrite, UsageError

SETTINGS = "settings.json"
LOG = "log.jsonl"
TENSORBOARD = "tensorboard"
ADAPTER = "adapter"
WRITING = ".writing"
"""Where things are written that have no name yet; whatever is left there is from a killed run."""
_CHECKPOINT = re.compile(r"checkpoint-([1-9][0-9]*)")
_MAX_SHOWN = 8


class RunFolder:
    """One run. Raises `CannotWrite` where the disk is full or the folder not ours to write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def writing(self) -> Path:
        return self.path / WRITING

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder with `settings`, or find those that it was begun with.

        Raises `UsageError` naming what differs: a run goes on as it began, or elsewhere.
        """
        settings = json.loads(json.dumps(settings))  # as they will be read
        known = self.settings()
        if known is None:
            if self.path.exists() and any(self.path.iterdir()):
                raise UsageError(
                    f"{self.path} is not empty and holds no {SETTINGS}, so it is no run to go on "
                    "with; choose another --out"
                )
            with disk_faults(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(self.path / SETTINGS, settings)
        elif difference := _difference(known, settings):
            raise UsageError(
                f"{self.path} was begun with other settings: {difference}; give it the same, or "
                "choose another --out"
            )

    def settings(self) -> dict[str, Any] | None:
        """What the run was begun with; None where none was. Raises `UsageError` when damaged."""
        try:
            content = json.loads((self.path / SETTINGS).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self.path / SETTINGS} cannot be read ({error}); choose another --out"
            ) from error
        if not isinstance(content, dict):
            raise UsageError(f"{self.path / SETTINGS} is no table; choose another --out")
        return content

    def clear_writing(self) -> None:
        """Remove what a killed run was writing; only one process of a run does."""
        shutil.rmtree(self.writing, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """Whole ones, the oldest first."""
        if not self.path.is_dir():
            return []
        found = [
            (int(match[1]), entry)
            for entry in self.path.iterdir()
            if (match := _CHECKPOINT.fullmatch(entry.name))
        ]
        return [entry for _, entry in sorted(found)]

    def last_checkpoint(self) -> Path | None:
        return next(reversed(self.checkpoints()), None)

    def place_checkpoint(self, written: Path, step: int, *, keep: int) -> Path:
        """The folder `written` becomes the checkpoint of `step`; all but the last `keep` go."""
        target = self.path / f"checkpoint-{step}"
        with disk_faults(self.path):
            place_folder(written, target)
        for old in self.checkpoints()[: -max(1, keep)]:
            # renamed first: half a checkpoint must not look like one
            doomed = self.path / f".{old.name}.old"
            shutil.rmtree(doomed, ignore_errors=True)
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return target

    def write_checkpoint(self, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
        """`write` fills a folder aside, which becomes the checkpoint of `step`."""
        with disk_faults(self.path):
            self.writing.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=self.writing))
            write(aside)
        return self.place_checkpoint(aside, step, keep=keep)


def step_of(checkpoint: Path) -> int:
    """After which step it was made."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` at once or not at all. Raises `OSError`."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def place_folder(written: Path, target: Path) -> None:
    """Rename a folder into place once all its bytes are on the disk. Raises `OSError`."""
    for path in sorted(written.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    written.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class disk_faults:
    """Whatever the disk refuses inside, by whichever library, becomes `CannotWrite`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif error is not None and _is_full(error):
            reason = "the disk is full"
        else:
            return
        raise CannotWrite(
            f"cannot write to {self._path} ({reason}); free some space there and run the same "
            "command again: it goes on from the last checkpoint"
        ) from error


def _is_full(error: BaseException) -> bool:
    """PyTorch's and safetensors' writers raise errors of their own."""
    text = str(error)
    return (
        os.strerror(errno.ENOSPC) in text
        or "PytorchStreamWriter failed" in text
        or "unexpected pos" in text
    )


def _difference(known: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """`name was A and is B` of what is not the same, one after the other."""
    before, after = _flat(known), _flat(given)
    parts = [
        f"{name} was {_shown(before.get(name))} and is {_shown(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    more = f", and {len(parts) - _MAX_SHOWN} more" if len(parts) > _MAX_SHOWN else ""
    return ", ".join(parts[:_MAX_SHOWN]) + more


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(value: object) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)[:100]
