"""`chatserve serve` with fake workers, for tests of the processes around them.

With QUICK_RESTARTS set, crashed workers are started again after milliseconds.
"""

from __future__ import annotations

import os
import sys

from chatserve.server import command_line
from chatserve.server.supervisor import RestartPolicy

WORKER = (sys.executable, "-m", "tests.fake_worker")


def quick_policy() -> RestartPolicy:
    return RestartPolicy(first_pause_s=0.01, max_pause_s=0.02)


if __name__ == "__main__":
    policy = quick_policy if os.environ.get("QUICK_RESTARTS") else None
    raise SystemExit(command_line.serve(worker_command=WORKER, policy=policy))
