"""`chatserve serve` over workers of the rig, which are started again as often as they die."""

from __future__ import annotations

import sys
import time

from chatserve.server import command_line
from chatserve.server.supervisor import RestartPolicy
from tests.faults.planted import plant
from tests.faults.window import open_window

WORKER = (sys.executable, "-m", "tests.faults.worker")


def patient_policy() -> RestartPolicy:
    return RestartPolicy(
        time.monotonic, first_pause_s=0.01, max_pause_s=0.1, max_restarts=1_000_000
    )


if __name__ == "__main__":
    plant()
    open_window()
    raise SystemExit(command_line.serve(worker_command=WORKER, policy=patient_policy))
