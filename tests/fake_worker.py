"""A worker process with a fake engine: the real process, HTTP and control plane, no weights.

What it does is the name of its WEIGHTS, a folder of scripts that do not exist:
`ok` answers, `seconds` takes one, `endless` never stops, `slow-load` loads until its file `go`
exists, `missing`, `too-big`, `wrong-flag` and `refused` fail for good, `crash` and `segfault` die
at start, `crash-once` at its first start only, `quoting` has a bug in its engine, `dying-engine`
loses its engine after one request.

With UNTIED set it does not notice the end of its parent. The adapter `held` is read only once there
is a file `go` beside WEIGHTS, and not at all where there is one `lost`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from chatserve.config import WorkerConfig, split_adapters
from chatserve.engine.sequence import LoadedAdapter
from chatserve.errors import DoesNotFit, ModelLoadError, RegistrationFailed, UsageError
from chatserve.progress import Progress
from chatserve.server import command_line, worker_process
from tests.fakes import FakeAdapters, FakeEngine, FakeModel, FakeStats

PROMPT = "CANARY-PROMPT-8231"
FAILURES = {
    "missing": ModelLoadError("no such folder: missing; check the path"),
    "too-big": DoesNotFit("needs 140 GB, there are 2; try --load-8bit"),
    "wrong-flag": UsageError("no such template"),
    "refused": RegistrationFailed("the controller refuses this worker"),
    "crash": RuntimeError("the cause"),
}


class DyingEngine(FakeEngine):
    def stats(self) -> FakeStats:
        return FakeStats(is_alive=not self.submitted)


class QuotingEngine(FakeEngine):
    """Has a bug whose error quotes the prompt."""

    def submit(self, *arguments: Any, **options: Any) -> Any:
        raise ValueError(f"cannot do {PROMPT!r}")


class FolderAdapters(FakeAdapters):
    def __init__(self, folder: Path, *names: str) -> None:
        super().__init__(*names)
        self._folder = folder

    def stage_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter:
        while Path(path).name == "held" and not (self._folder / "go").exists():
            if (self._folder / "lost").exists():
                raise ModelLoadError(f"no such folder: {path}")
            time.sleep(0.01)
        return super().stage_below(name, path, replace=replace)


def load(config: WorkerConfig, progress: Progress) -> tuple[FakeEngine, FakeModel]:
    path = Path(config.weights)
    model = FakeModel(
        names=config.model_names,
        description={"device": config.device},
        adapters=FolderAdapters(path.parent, *split_adapters(config.adapter)[1]),
    )
    if path.name in FAILURES:
        raise FAILURES[path.name]
    if path.name == "segfault":
        os.kill(os.getpid(), 11)
    if path.name == "crash-once" and not path.exists():
        path.touch()
        raise RuntimeError("only once")
    if path.name == "slow-load":
        progress(25, 100)
        while not (path.parent / "go").exists():
            time.sleep(0.01)
    if path.name == "endless":
        return FakeEngine(["word "] * 100_000, step_s=0.005), FakeModel(
            names=config.model_names, context_length=200_000
        )
    if path.name == "seconds":
        return FakeEngine([f"{i} " for i in range(20)], step_s=0.05), model
    if path.name == "quoting":
        return QuotingEngine(), model
    if path.name == "dying-engine":
        return DyingEngine(["a"], hangs=True), model
    return FakeEngine(step_s=0.001), model


if __name__ == "__main__":
    if os.environ.get("UNTIED"):
        vars(worker_process)["tie_to_parent"] = lambda *_, **__: None
    raise SystemExit(command_line.worker(load=load))
