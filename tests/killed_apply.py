"""A process that starts apply-delta again and again and lets each die of SIGKILL at a chosen call.

    python -m tests.killed_apply FOLDER KILLS {replace,fresh,two-steps}

FOLDER holds `base`, `first` and `second`, two deltas. Prints one JSON line per kill. The moment is
a number of Python and C calls, not a time: the same on a busy machine. `two-steps` replaces the
target by removing it and renaming, as a program without an exchange of names would.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from chatserve.models import safetensors_writer
from chatserve.models.delta import apply_delta

Contents = dict[str, bytes]


class Moment(NamedTuple):
    """The `call`-th call of a run, or of its end: from where `finish` begins."""

    is_end: bool
    call: int


class Killer:
    """Counts calls of this thread; at its moment the process kills itself as `kill -9` would."""

    def __init__(self, moment: Moment | None) -> None:
        self._moment = moment
        self.num_calls = 0
        self.finish_call: int | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self.num_calls += 1
        code = frame.f_code
        if (
            event == "call"
            and code.co_name == "finish"
            and "safetensors_writer" in code.co_filename
        ):
            self.finish_call = self.num_calls
        if self._moment in (Moment(False, self.num_calls), Moment(True, self.num_end_calls)):
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def num_end_calls(self) -> int:
        return -1 if self.finish_call is None else self.num_calls - self.finish_call


def apply(root: Path, delta: str, moment: Moment | None) -> Killer:
    killer = Killer(moment)
    sys.setprofile(killer)
    apply_delta(root / "base", root / delta, root / "target", force=True)
    sys.setprofile(None)
    return killer


def apply_in_child(root: Path, delta: str, moment: Moment) -> bool:
    """True when it was killed."""
    pid = os.fork()
    if pid == 0:
        apply(root, delta, moment)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


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


def moments(kills: int, calls: Killer) -> list[Moment]:
    """Half of them anywhere, half spread over the end, where the names change."""
    choose = random.Random(0)
    anywhere = [
        Moment(False, choose.randint(1, calls.num_calls * 19 // 20)) for _ in range(kills // 2)
    ]
    left = kills - len(anywhere)
    end = [Moment(True, calls.num_end_calls * index // left) for index in range(left)]
    return anywhere + end


def in_two_steps(first: Path, second: Path) -> None:
    shutil.rmtree(second)
    first.rename(second)
    first.mkdir()  # an exchange leaves both names


def main() -> None:
    root, kills, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    target = root / "target"
    known: dict[str, Contents] = {}
    for delta in ("first", "second"):
        apply_delta(root / "base", root / delta, target, force=True)
        known[delta] = contents(target) or {}
    if mode == "two-steps":
        safetensors_writer.exchange = in_two_steps
    restore(target, None if mode == "fresh" else known["first"])
    calls = apply(root, "second", None)  # how many calls a whole run has
    for moment in moments(kills, calls):
        restore(target, None if mode == "fresh" else known["first"])
        before = state(target, known)
        killed = apply_in_child(root, "second", moment)
        after = state(target, known)
        print(json.dumps({"killed": killed, "before": before, "after": after}))
    apply_delta(root / "base", root / "first", target, force=True)
    left = sorted(path.name for path in root.iterdir())
    print(json.dumps({"last": state(target, known), "left": left}))


if __name__ == "__main__":
    main()
