"""A process that starts a chain's pull again and again and lets each die of SIGKILL at some call.

    python -m tests.killed_pull NAME BASE KILLS

HF_ENDPOINT and CHATSERVE_HOME are set. Prints one JSON line per kill: whether it was killed, what
the model's folder was then, and what it is after a whole run that follows. Half the moments lie
anywhere, half behind where the model gets its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import torch

from chatserve import cache, chains
from chatserve.catalogue import CHAINS
from tests.killer import Killer
from tests.published import contents

Files = dict[str, bytes] | None

END = ("_record", "chains")  # where the model gets its name


def state(target: Path, whole: Files) -> str:
    if not target.exists():
        return "absent"
    return "whole" if contents(target) == whole else "half"


def main() -> None:
    name, base, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    target = cache.models_folder() / name

    def pull() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            chains.make(CHAINS[name], base)

    chains.make(CHAINS[name], base)
    whole = contents(target)
    shutil.rmtree(cache.models_folder())
    calls = Killer(END)  # not of the first run, whose imports are thousands of them
    calls.watch(pull)
    for moment in calls.moments(kills, share=0.9):
        shutil.rmtree(cache.models_folder())
        killed = Killer(END, moment).watch_in_child(pull)
        after = state(target, whole)
        chains.make(CHAINS[name], base)
        left = [path.name for path in cache.models_folder().iterdir()]
        left = sorted(each for each in left if not each.startswith(".lock-"))
        line = {"killed": killed, "after": after, "again": state(target, whole), "left": left}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
