"""`chatserve serve` over workers of the rig, which are started again as often as they die.

With FAULT_FRONTS set they listen on ports, so that there can be proxies in front of them.
"""

from __future__ import annotations

import contextlib
import os
import sys

from chatserve.server import command_line, launch
from chatserve.server.supervisor import RestartPolicy
from tests.faults.planted import plant
from tests.faults.window import open_window
from tests.faults.worker import FRONTS

WORKER = (sys.executable, "-m", "tests.faults.worker")


def patient_policy() -> RestartPolicy:
    return RestartPolicy(first_pause_s=0.01, max_pause_s=0.1, max_restarts=1_000_000)


if __name__ == "__main__":
    plant()
    open_window()
    if FRONTS in os.environ:
        vars(launch)["socket_folder"] = contextlib.nullcontext
    raise SystemExit(command_line.serve(worker_command=WORKER, policy=patient_policy))
