"""How late the event loops of controller and worker run while 64 streams go through them.

    python -m benchmarks.loop_lag [--streams 64] [--seconds 10]

The worker has no weights: a token every 5 ms and stream, so that nothing but HTTP is
measured. Prints one JSON line: for each process p50, p99 and the most, in ms, waiting for a
processor included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from tests.faults.client import LoadClient, Request
from tests.faults.engine import STEP_S, Script
from tests.faults.house import MODEL, house
from tests.faults.invariants import check, outcome
from tests.faults.window import STRICT


def measure(num_streams: int, seconds: float, *, is_strict: bool = True) -> dict[str, Any]:
    say = round(seconds / STEP_S)
    strict = {STRICT: "1"} if is_strict else {}
    flags = (f"--max-num-seqs={num_streams}",)
    with tempfile.TemporaryDirectory() as folder, house(Path(folder)) as rig:
        controller = rig.start_controller(**strict)
        worker = rig.start_worker(*flags, **strict)
        rig.wait_for_workers(1)
        for process in (controller, worker):
            process.look()
        client = LoadClient(rig.port, timeout_s=60 + 10 * seconds)
        requests = [request(f"r{i}", say) for i in range(num_streams)]
        records = asyncio.run(client.send_all(requests, at_once=num_streams))
        lags = {"controller": controller.look().lag, "worker": worker.look().lag}
    if wrong := check(records):
        raise SystemExit(f"{len(wrong)} of the streams are wrong; the first: {wrong[0]}")
    if any(outcome(record) != "done" for record in records):
        raise SystemExit("not all streams are whole")
    took = max(r.ended_at for r in records) - min(r.asked_at for r in records)
    return {"tokens_per_s": round(num_streams * say / took), "lag": lags}


def request(key: str, say: int) -> Request:
    script = Script(key, say)
    messages = [{"role": "user", "content": script.prompt}]
    return Request({"model": MODEL, "messages": messages, "stream": True}, text=script.text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    figures = measure(options.streams, options.seconds)
    print(json.dumps({
        "benchmark": "loop_lag", **machine.describe(), "streams": options.streams, **figures,
    }))  # fmt: skip
