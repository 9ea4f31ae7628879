"""A worker with a real model whose network has faults: those that a request's `max_tokens` name.

`python -m tests.faulty_worker serve …` is `chatserve serve` over such workers.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RAISES, NAN, NO_MEMORY, BREAKS, HANGS = 41, 42, 43, 44, 45
FIRST_TOKENS = 3
"""So many come before the fault."""


def with_faults(run: Callable[..., Any]) -> Callable[..., Any]:
    """`Runner.run` with faults. What breaks, in a batch, stays broken, and what hangs does so for
    ever: with BREAKS_ONCE set, a file, only in the first process that does."""
    is_broken = False

    def faulty(runner: Any, items: Any, *rest: Any) -> Any:
        nonlocal is_broken
        faults = [_fault_of(item.sequence) for item in items]
        if BREAKS in faults and len(faults) > 1 and not Path(os.environ["BREAKS_ONCE"]).exists():
            Path(os.environ["BREAKS_ONCE"]).touch()
            is_broken = True
        if HANGS in faults and not Path(os.environ["BREAKS_ONCE"]).exists():
            Path(os.environ["BREAKS_ONCE"]).touch()
            threading.Event().wait()
        if is_broken:
            raise RuntimeError("the device is lost")
        if RAISES in faults:
            raise RuntimeError("planted")
        if NO_MEMORY in faults:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: planted")
        logits, hidden = run(runner, items, *rest)
        if NAN in faults:
            sampled = [fault for fault, item in zip(faults, items, strict=True) if item.is_sampled]
            logits[[fault == NAN for fault in sampled]] = torch.nan
        return logits, hidden

    return faulty


def _fault_of(sequence: Any) -> int | None:
    return sequence.params.max_tokens if sequence.num_generated_tokens >= FIRST_TOKENS else None


def main(arguments: list[str]) -> int:
    from chatserve.server import command_line

    if arguments[:1] == ["serve"]:
        command = (sys.executable, "-m", "tests.faulty_worker")
        return command_line.serve(arguments[1:], worker_command=command)
    from chatserve.engine.runner import Runner

    Runner.run = with_faults(Runner.run)  # type: ignore[method-assign]
    return command_line.worker(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
