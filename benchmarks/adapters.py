"""What adapters beside a base cost: `python -m benchmarks.adapters [WEIGHTS] [--streams 8]`.

Prints one JSON line: medians in microseconds of a decode step in 8 bits with none, one adapter on
one stream, one on all, and a different one on each; and of a prompt with and without one. Adapters
have random weights in every matrix of each block. Rounds of all cases are interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.machine import describe
from chatserve.hub import resolve_weights
from chatserve.models.adapter import Adapter, LoraPair
from chatserve.models.adapter_places import adapter_places
from chatserve.models.batch import Batch, NetworkAdapter, Segment
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama_kernels import KernelKVPool, KernelLlama
from chatserve.models.loader import load_model

BLOCK_SIZE = 32
CONTEXT = 64
BLOCKS = CONTEXT // BLOCK_SIZE + 1
PROMPT = 512
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", nargs="?", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    path = resolve_weights(arguments.weights, revision="main", offline=True)
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, choose_policy("cpu", load_8bit=True))
    assert isinstance(model, KernelLlama)
    streams = arguments.streams
    adapters = [random_adapter(model, arguments.rank, seed) for seed in range(streams)]
    none: list[NetworkAdapter | None] = [None] * streams
    cases = {
        "none": none,
        "one_stream": [adapters[0], *none[1:]],
        "all_the_same": [adapters[0]] * streams,
        "all_different": adapters,
    }
    # the cases take turns in the same blocks
    pool = model.build_kv_pool(max(streams * BLOCKS, PROMPT // BLOCK_SIZE), BLOCK_SIZE)
    steps = {name: decode(model, pool, given) for name, given in cases.items()}
    steps["prompt_none"] = prefill(model, pool, None)
    steps["prompt_adapted"] = prefill(model, pool, adapters[0])
    line = {
        "what": "adapters at run time", "model": arguments.weights, "streams": streams,
        "rank": arguments.rank, "context": CONTEXT, "prompt": PROMPT,
        "adapter_bytes": adapters[0].num_bytes,
        **measure(steps, arguments.rounds), **describe(),
    }  # fmt: skip
    print(json.dumps(line))


def measure(steps: Mapping[str, Step], rounds: int) -> dict[str, dict[str, int]]:
    """Microseconds; the cases take turns, so that none has the quieter minute.

    The fastest tenth says more than the median where other programs use the cores, too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            if name.startswith("prompt") and number % 4:
                continue
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    def table(pick: Callable[[list[float]], float]) -> dict[str, int]:
        return {name: round(1e6 * pick(each)) for name, each in seconds.items()}

    return {
        "median_us": table(statistics.median),
        "fastest_tenth_us": table(lambda each: sorted(each)[len(each) // 10]),
    }


def random_adapter(model: KernelLlama, rank: int, seed: int) -> NetworkAdapter:
    draw = torch.Generator().manual_seed(seed)
    pairs = {
        f"{module}.weight": LoraPair(
            torch.randn(rank, place.columns, generator=draw) * 0.02,
            torch.randn(place.rows, rank, generator=draw) * 0.02,
            scale=1.0,
        )
        for module, place in adapter_places(model.config).items()
        if module != "lm_head"
    }
    return model.build_adapter(Adapter(f"a{seed}", Path(), f"ad_{seed}", pairs))


def decode(
    model: KernelLlama, pool: KernelKVPool, adapters: Sequence[NetworkAdapter | None]
) -> Step:
    """One more token for a sequence with each of `adapters`."""
    num_rows = len(adapters)
    segments = [
        Segment(i, 1, CONTEXT, range(i * BLOCKS, (i + 1) * BLOCKS), adapter)
        for i, adapter in enumerate(adapters)
    ]
    batch = Batch([5] * num_rows, [CONTEXT] * num_rows, segments, range(num_rows))

    def step() -> None:
        with torch.inference_mode():
            model.forward(batch, pool)

    return step


def prefill(model: KernelLlama, pool: KernelKVPool, adapter: NetworkAdapter | None) -> Step:
    segment = Segment(0, PROMPT, 0, range(PROMPT // BLOCK_SIZE), adapter)
    batch = Batch([5] * PROMPT, range(PROMPT), [segment], [PROMPT - 1])

    def step() -> None:
        with torch.inference_mode():
            model.forward(batch, pool)

    return step


if __name__ == "__main__":
    main()
