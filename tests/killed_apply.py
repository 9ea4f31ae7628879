"""A process that starts apply-delta again and again and lets each die of SIGKILL at a chosen call.

    python -m tests.killed_apply FOLDER KILLS {replace,fresh,two-steps}

FOLDER holds `base`, `first` and `second`, two deltas. Prints one JSON line per kill. `two-steps`
replaces the target by removing it and renaming, as a program without an exchange of names would.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from chatserve.models import safetensors_writer
from chatserve.models.delta import apply_delta
from tests.killer import Killer

Contents = dict[str, bytes]

END = ("finish", "safetensors_writer")  # where the names change


def contents(folder: Path) -> Contents | None:
    if not folder.is_dir():
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(target: Path, known: dict[str, Contents]) -> str:
    now = contents(target)
    if now is None:
        return "absent"
    return next((name for name, files in known.items() if files == now), "half")


def restore(target: Path, files: Contents | None) -> None:
    shutil.rmtree(target, ignore_errors=True)
    if files is not None:
        target.mkdir()
        for name, data in files.items():
            (target / name).write_bytes(data)


def in_two_steps(first: Path, second: Path) -> None:
    shutil.rmtree(second)
    first.rename(second)
    first.mkdir()  # an exchange leaves both names


def main() -> None:
    root, kills, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    target = root / "target"

    def apply() -> None:
        apply_delta(root / "base", root / "second", target, force=True)

    known: dict[str, Contents] = {}
    for delta in ("first", "second"):
        apply_delta(root / "base", root / delta, target, force=True)
        known[delta] = contents(target) or {}
    if mode == "two-steps":
        safetensors_writer.exchange = in_two_steps
    restore(target, None if mode == "fresh" else known["first"])
    calls = Killer(END)  # how many a whole run has
    calls.watch(apply)
    for moment in calls.moments(kills, share=0.95):
        restore(target, None if mode == "fresh" else known["first"])
        before = state(target, known)
        killed = Killer(END, moment).watch_in_child(apply)
        after = state(target, known)
        print(json.dumps({"killed": killed, "before": before, "after": after}))
    apply_delta(root / "base", root / "first", target, force=True)
    left = sorted(path.name for path in root.iterdir())
    print(json.dumps({"last": state(target, known), "left": left}))


if __name__ == "__main__":
    main()
