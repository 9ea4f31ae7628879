"""What picking tokens costs: the kernels and the PyTorch reference, by vocabulary and parameters.

    python -m benchmarks.sampling [--rows 16] [--threads 2] [--repeats 30]

Prints one JSON line: medians in microseconds of one call for all rows, Python included, with fresh
logits and threads awake as after a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.machine import describe
from chatserve.engine.sampler import Sampler
from chatserve.engine.sampler_state import SamplerState
from chatserve.engine.sequence import SamplingParams
from chatserve.kernels.library import load_kernels
from chatserve.models.kernel_matrix import KernelMatrix, Team
from chatserve.models.kernel_sampler import KernelSampler
from chatserve.models.packing import Packing

VOCABULARIES = (49_152, 128_256)
NUM_SEEN = 1000  # half of them in the prompt, half in the answer
CASES = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k_top_p": SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05),
    "penalties": SamplingParams(
        temperature=0.8, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.1,
    ),
}  # fmt: skip


def likely_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """(R, V) with a few candidates far above a broad rest, as a language model's are."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 2.5
    peaks = torch.randint(vocab_size, (num_rows, 30), generator=generator)
    heights = 16 - 0.3 * torch.arange(30.0).expand(num_rows, -1)
    return logits.scatter(1, peaks, heights)


def states_of(params: SamplingParams, num_rows: int, vocab_size: int) -> list[SamplerState]:
    seen = [37 * i % vocab_size for i in range(NUM_SEEN)]
    prompt, answer = seen[: NUM_SEEN // 2], seen[NUM_SEEN // 2 :]
    states = [
        SamplerState(params, prompt, seed=row, vocab_size=vocab_size) for row in range(num_rows)
    ]
    for state in states:
        for token_id in answer:
            state.add(token_id)
    return states


def measure(
    sampler: Sampler,
    logits: torch.Tensor,
    states: list[SamplerState],
    repeats: int,
    wake: Callable[[], object],
) -> float:
    """Median microseconds of a call, which gets logits of its own every time, after `wake`."""
    times = []
    work = torch.empty_like(logits)
    for _ in range(repeats + 3):
        work.copy_(logits)
        wake()
        start = time.perf_counter()
        sampler.sample(work, states)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[3:]) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # its own threads would spin on the cores of the team
    kernels = load_kernels()
    team = Team(kernels, arguments.threads)
    step = KernelMatrix(kernels, team, 4096, 1024, Packing(8, is_grouped=False))
    inputs = torch.ones(arguments.rows, 1024)
    figures: dict[str, dict[str, float]] = {}
    for vocab_size in VOCABULARIES:
        fast = Sampler(kernel=KernelSampler(kernels, team, vocab_size))
        logits = likely_logits(arguments.rows, vocab_size)
        for name, params in CASES.items():
            states = states_of(params, arguments.rows, vocab_size)
            variants = {
                "one_row": (fast, 1, arguments.repeats),
                "all_rows": (fast, arguments.rows, arguments.repeats),
                "torch_one_row": (Sampler(), 1, 5),
            }
            figures[f"{vocab_size} {name}"] = {
                variant: measure(
                    sampler, logits[:rows], states[:rows], repeats, partial(step.multiply, inputs)
                )
                for variant, (sampler, rows, repeats) in variants.items()
            }
    print(
        json.dumps(
            {
                "benchmark": "sampling",
                **describe(),
                "kernels": kernels.level,
                "rows": arguments.rows,
                "threads": arguments.threads,
                "microseconds": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
