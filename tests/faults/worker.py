"""A worker process of the rig: `tests.fake_worker`, with a model `scripted` whose engine does what
each prompt says; with a window, and perhaps behind a proxy.

With FAULT_FRONTS set, a folder, it registers not with its own port but with the one that it finds
there in a file named after it: whoever runs the test has put a proxy in front.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from chatserve.config import WorkerConfig
from chatserve.progress import Progress
from chatserve.server import command_line, worker_process
from chatserve.server.contract import Engine, ServedModel
from chatserve.server.heartbeat import HeartbeatSender
from tests import fake_worker
from tests.fakes import FakeModel
from tests.faults.engine import ScriptedEngine
from tests.faults.planted import plant
from tests.faults.window import open_window

FRONTS = "FAULT_FRONTS"


class FrontedHeartbeat(HeartbeatSender):
    """Tells the controller of the port that stands before this worker's own."""

    def __init__(self, controller: str, token: str, *, port: int, **options: Any) -> None:
        super().__init__(controller, token, port=front_of(port), **options)


def front_of(port: int) -> int:
    """The proxy before `port`; waits until there is one. Without a folder, the port itself."""
    folder = os.environ.get(FRONTS)
    if folder is None:
        return port
    Path(folder, f"{port}.wanted").write_text(str(os.getpid()), "ascii")
    answer = Path(folder, f"{port}.front")
    while not answer.exists():
        time.sleep(0.01)
    return int(answer.read_text("ascii"))


def load(config: WorkerConfig, progress: Progress) -> tuple[Engine, ServedModel]:
    if Path(config.weights).name != "scripted":
        return fake_worker.load(config, progress)
    engine = ScriptedEngine(
        max_num_seqs=config.max_num_seqs, max_num_waiting=config.max_num_waiting
    )
    return engine, FakeModel(
        names=config.model_names, context_length=200_000, vocab_size=200_000, stop=(),
        stop_token_ids=(), strip_leading_space=False,
    )  # fmt: skip


if __name__ == "__main__":
    plant()
    open_window()
    vars(worker_process)["HeartbeatSender"] = FrontedHeartbeat
    raise SystemExit(command_line.worker(load=load))
