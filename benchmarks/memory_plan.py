"""What `chatserve plan` says, beside what a worker's process takes at its peak.

    python -m benchmarks.memory_plan WEIGHTS [--forms half,8-bit,4-bit] [--context 1024]
        [--concurrency 2]

Prints a JSON line per form. Each is loaded in a process of its own, one after the other, and its KV
cache filled by `--concurrency` prompts as long as `--context`. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.processes import memory_bytes

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "half": {"dtype": "bfloat16"},
    "8-bit": {"load_8bit": True},
    "4-bit": {"load_4bit": True},
}


def measure(weights: str, form: str, context: int, concurrency: int) -> dict[str, Any]:
    """Plan and peaks of one form, in bytes, from a process that does nothing else."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_plan", weights, "--child", form,
         "--context", str(context), "--concurrency", str(concurrency)],
        cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    line: dict[str, Any] = json.loads(result.stdout)
    return line


def _run(weights: str, form: str, context: int, concurrency: int) -> dict[str, Any]:
    import chatserve.server.worker_process  # noqa: F401  # a worker has the server in memory, too
    from chatserve.config import WorkerConfig
    from chatserve.engine import serving
    from chatserve.models.checkpoint import open_checkpoint
    from chatserve.models.memory_plan import plan_memory

    config = WorkerConfig(
        weights=weights, offline=True, device="cpu", context_length=context,
        max_num_seqs=concurrency, **FORMS[form],
    )  # fmt: skip
    engine, _ = serving.load(config)
    load_peak = _peak_bytes()
    _fill(engine._engine, context, concurrency)
    peak = _peak_bytes()
    checkpoint = open_checkpoint(serving.resolve_weights(weights, offline=True))
    with closing(checkpoint.weights):
        plan = plan_memory(
            checkpoint, engine._engine._runner._model.policy, context=context,
            concurrency=concurrency, max_rows=config.max_num_batched_tokens,
        )  # fmt: skip
    return {
        "model": Path(weights).name if Path(weights).name != "hf" else Path(weights).parent.name,
        "form": form,
        "held_as": plan.form,
        "context": plan.context,
        "concurrency": plan.concurrency,
        "weights_bytes": plan.weights_bytes,
        "kv_bytes": plan.kv_bytes,
        "activation_bytes": plan.activation_bytes,
        "slack_bytes": plan.slack_bytes,
        "predicted_bytes": plan.total_bytes,
        "measured_bytes": peak,
        "measured_load_bytes": load_peak,
        "predicted_over_measured": round(plan.total_bytes / peak, 3),
    }


def _fill(engine: Any, context: int, concurrency: int) -> None:
    """Run so many different prompts through the engine that its pool is full."""
    from chatserve.engine.sequence import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for index in range(concurrency):
        ids = [(7 * place + index) % 251 for place in range(context - 2)]
        engine.add(f"prompt-{index}", ids, params)
    while engine.has_work:
        engine.step()


def _peak_bytes() -> int:
    return int(memory_bytes([os.getpid()])["peak_rss_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("--forms", default="half,8-bit,4-bit")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--child", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_run(options.weights, options.child, options.context,
                              options.concurrency)))  # fmt: skip
        return
    for form in options.forms.split(","):
        line = measure(options.weights, form, options.context, options.concurrency)
        print(json.dumps({"benchmark": "memory_plan", **describe(), **line}), flush=True)


if __name__ == "__main__":
    main()
