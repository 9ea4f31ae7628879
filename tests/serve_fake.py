"""`chatserve serve` with fake workers, for tests of the processes around them.

With QUICK_RESTARTS set, crashed workers are started again after milliseconds. FAKE_BYTES says what
WEIGHTS take, as JSON by their names, and under "free" what there is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from chatserve.server import command_line
from chatserve.server.repertoire.measure import Estimate
from chatserve.server.supervisor import RestartPolicy

WORKER = (sys.executable, "-m", "tests.fake_worker")


def quick_policy() -> RestartPolicy:
    return RestartPolicy(first_pause_s=0.01, max_pause_s=0.02)


async def fake_measure(weights: str) -> Estimate | None:
    sizes = json.loads(os.environ.get("FAKE_BYTES", "{}"))
    size = sizes.get(Path(weights).name)
    return None if size is None else Estimate(size, sizes.get("free", 10**12))


if __name__ == "__main__":
    policy = quick_policy if os.environ.get("QUICK_RESTARTS") else None
    raise SystemExit(command_line.serve(worker_command=WORKER, policy=policy, measure=fake_measure))
