"""Where the time of one decode step goes: `python -m benchmarks.profile WEIGHTS [--streams N]`.

Prints one JSON line for the CPU kernels and one for PyTorch's operators on the same 8-bit weights,
in microseconds of a step; the kernels' parts are those of the first thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.machine import describe
from chatserve.hub import resolve_weights
from chatserve.models.batch import Batch, Segment
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy, choose_policy
from chatserve.models.fallback import FallbackModel
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model

BLOCK_SIZE = 32
STEPS = 40
# PyTorch's operators by what they are there for; the rest is "other"
PARTS = {
    "aten::_weight_int8pack_mm": "matmul", "aten::mm": "matmul", "aten::addmm": "matmul",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attend",
    "aten::_fused_rms_norm": "norm", "aten::silu": "swiglu",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", nargs="?", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--context", type=int, default=64, help="tokens before the step")
    arguments = parser.parse_args()
    path = resolve_weights(arguments.weights, revision="main", offline=True)
    policy = choose_policy("cpu", load_8bit=True)
    for chosen in (policy, dataclasses.replace(policy, kernels=None)):
        line = profile(path, chosen, arguments.streams, arguments.context)
        print(json.dumps({"what": "decode step by part", "model": arguments.weights, **line}))


def profile(path: Path, policy: DevicePolicy, streams: int, context: int) -> dict[str, object]:
    """Median step and its parts in microseconds."""
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, policy)
    assert not isinstance(model, FallbackModel)
    step = _step_of(model, streams, context)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    parts = _kernel_parts(model, step) if isinstance(model, KernelLlama) else _torch_parts(step)
    return {
        "engine": policy.kernels.level if policy.kernels else "pytorch",
        "streams": streams,
        "context": context,
        "step_us": round(1e6 * statistics.median(seconds)),
        "parts_us": {part: round(value) for part, value in parts.items()},
        **describe(),
    }


def _step_of(model: Llama | KernelLlama, streams: int, context: int) -> Callable[[], None]:
    """One more token for each of `streams` sequences of `context` tokens."""
    blocks = context // BLOCK_SIZE + 1
    pool = model.build_kv_pool(streams * blocks, BLOCK_SIZE)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(streams)]

    def forward(batch: Batch) -> None:
        with torch.inference_mode():
            model.forward(batch, pool)  # type: ignore[arg-type]  # each builds its own pool

    for table in tables:
        ids = [(7 * i) % model.vocab_size for i in range(context)]
        forward(Batch(ids, range(context), [Segment(0, context, 0, table)], []))
    segments = [Segment(i, 1, context, table) for i, table in enumerate(tables)]
    batch = Batch([5] * streams, [context] * streams, segments, range(streams))
    return lambda: forward(batch)


def _kernel_parts(model: KernelLlama, step: Callable[[], None]) -> Mapping[str, float]:
    def steps() -> None:
        for _ in range(STEPS):
            step()

    parts = model.profile(steps)
    return {part: nanoseconds / 1000 / STEPS for part, nanoseconds in parts.items()}


def _torch_parts(step: Callable[[], None]) -> Mapping[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        for _ in range(STEPS):
            step()
    parts: Counter[str] = Counter()
    for event in record.key_averages():
        part = PARTS.get(event.key, "other")
        parts[part] += round(event.self_cpu_time_total)
    return {part: total / STEPS for part, total in parts.most_common()}


if __name__ == "__main__":
    main()
