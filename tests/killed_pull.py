"""A process that starts a chain's pull again and again and lets each die of SIGKILL at some call.

    python -m tests.killed_pull NAME BASE KILLS

HF_ENDPOINT and CHATSERVE_HOME are set. Prints one JSON line per kill: whether it was killed, what
the model's folder was then, and what it is after a whole run that follows. The moment is a number
of Python and C calls, not a time: half of them anywhere, half from where the model gets its name.
"""

from __future__ import annotations

import contextlib
import io
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

from chatserve import cache, chains
from chatserve.catalogue import CHAINS
from tests.published import contents

Files = dict[str, bytes] | None


class Moment(NamedTuple):
    """The `call`-th call of a run, or of its end."""

    is_end: bool
    call: int


class Killer:
    """Counts calls of this thread; at its moment the process kills itself as `kill -9` would."""

    def __init__(self, moment: Moment | None) -> None:
        self._moment = moment
        self.num_calls = 0
        self.end_call: int | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self.num_calls += 1
        code = frame.f_code
        if event == "call" and code.co_name == "_record" and "chains" in code.co_filename:
            self.end_call = self.num_calls
        if self._moment in (Moment(False, self.num_calls), Moment(True, self.num_end_calls)):
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def num_end_calls(self) -> int:
        return -1 if self.end_call is None else self.num_calls - self.end_call


def pull(name: str, base: str, moment: Moment | None) -> Killer:
    killer = Killer(moment)
    sys.setprofile(killer)
    with contextlib.redirect_stderr(io.StringIO()):
        chains.make(CHAINS[name], base)
    sys.setprofile(None)
    return killer


def pull_in_child(name: str, base: str, moment: Moment) -> bool:
    """True when it was killed."""
    pid = os.fork()
    if pid == 0:
        pull(name, base, moment)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def moments(kills: int, calls: Killer) -> list[Moment]:
    choose = random.Random(0)
    anywhere = [
        Moment(False, choose.randint(1, calls.num_calls * 9 // 10)) for _ in range(kills // 2)
    ]
    left = kills - len(anywhere)
    return anywhere + [Moment(True, calls.num_end_calls * index // left) for index in range(left)]


def state(target: Path, whole: Files) -> str:
    if not target.exists():
        return "absent"
    return "whole" if contents(target) == whole else "half"


def main() -> None:
    name, base, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    target = cache.models_folder() / name
    chains.make(CHAINS[name], base)
    whole = contents(target)
    shutil.rmtree(cache.models_folder())
    calls = pull(name, base, None)  # not the first run, whose imports are thousands of calls
    for moment in moments(kills, calls):
        shutil.rmtree(cache.models_folder())
        killed = pull_in_child(name, base, moment)
        after = state(target, whole)
        chains.make(CHAINS[name], base)
        left = [path.name for path in cache.models_folder().iterdir()]
        left = sorted(each for each in left if not each.startswith(".lock-"))
        line = {"killed": killed, "after": after, "again": state(target, whole), "left": left}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
