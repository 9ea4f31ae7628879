"""What picking tokens adds to a step: the same step with and without it, in turns.

    python -m benchmarks.sampling_in_step WEIGHTS [--streams 1,16] [--context 80] [--pairs 40]

Prints one JSON line. Per number of streams and parameters: the median microseconds of a bare step,
how much a step that picks ahead takes more (noise of the step included),
and as a share of the bare step in percent; the same for sampling after the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.sampling import CASES, states_of
from chatserve.engine.sampler import Sampler, build_sampler
from chatserve.engine.sampler_state import SamplerState
from chatserve.models.batch import Batch, Segment
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model
from chatserve.models.tokenizer import load_tokenizer
from chatserve.quality.texts import SHIPPED

BLOCK_SIZE = 32


def texts(weights: Path, count: int, num_tokens: int) -> list[list[int]]:
    """Parts of the shipped texts, spread over all of them: a model is sure of some tokens and
    unsure of others, and a filter keeps one of the vocabulary or hundreds."""
    shipped = "\n".join(path.read_text("utf-8") for path in sorted(SHIPPED.glob("*.txt")))
    token_ids = load_tokenizer(weights).encode(shipped, add_bos=False)
    step = (len(token_ids) - num_tokens) // count
    return [token_ids[step * i : step * i + num_tokens] for i in range(count)]


class Bench:
    """A network with some sequences of `context` tokens in its cache."""

    def __init__(self, weights: Path, max_streams: int, context: int) -> None:
        policy = choose_policy("cpu", load_8bit=True)
        model = load_model(open_checkpoint(weights), policy)
        if not isinstance(model, KernelLlama):
            raise SystemExit("the CPU kernels are not here: python -m chatserve.kernels.build")
        self.model = model
        self.context = context
        self.num_blocks = context // BLOCK_SIZE + 1
        self.pool: Any = model.build_kv_pool(max_streams * self.num_blocks, BLOCK_SIZE)
        self.sampler: Sampler = build_sampler(model, [])
        self.texts = texts(weights, max_streams, context + 1)
        rows = range(context)
        for stream, token_ids in enumerate(self.texts):
            batch = Batch(token_ids[:context], rows, [self._segment(stream, 0, rows)], [])
            model.forward(batch, self.pool)

    def _segment(self, stream: int, num_past: int, rows: range) -> Segment:
        first = stream * self.num_blocks
        start = rows.start if num_past == 0 else stream
        return Segment(start, len(rows), num_past, range(first, first + self.num_blocks))

    def batch(self, num_streams: int) -> Batch:
        segments = [
            self._segment(stream, self.context, range(stream, stream + 1))
            for stream in range(num_streams)
        ]
        tokens = [token_ids[-1] for token_ids in self.texts[:num_streams]]
        return Batch(tokens, [self.context] * num_streams, segments, range(num_streams))

    def times(self, batch: Batch, states: list[SamplerState]) -> tuple[float, float, float]:
        """Microseconds of a bare step, of one that picks ahead, of one sampled after it."""
        start = time.perf_counter()
        self.model.forward(batch, self.pool)
        bare = time.perf_counter()
        self.model.forward(replace(batch, ahead=self.sampler.ahead(states)), self.pool)
        picked = time.perf_counter()
        self.sampler.sample(self.model.forward(batch, self.pool), states)
        end = time.perf_counter()
        return (bare - start) * 1e6, (picked - bare) * 1e6, (end - picked) * 1e6


def measure(bench: Bench, name: str, num_streams: int, pairs: int) -> dict[str, float]:
    batch = bench.batch(num_streams)
    states = states_of(CASES[name], num_streams, bench.model.vocab_size)
    times = [bench.times(batch, states) for _ in range(pairs + 3)][3:]
    bare = statistics.median(time[0] for time in times)
    ahead = statistics.median(time[1] - time[0] for time in times)
    after = statistics.median(time[2] - time[0] for time in times)
    return {
        "step_us": round(bare, 1),
        "ahead_us": round(ahead, 1),
        "ahead_percent": round(100 * ahead / bare, 2),
        "after_us": round(after, 1),
        "after_percent": round(100 * after / bare, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--context", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    streams = [int(count) for count in arguments.streams.split(",")]
    bench = Bench(arguments.weights, max(streams), arguments.context)
    figures = {
        f"{count} streams, {name}": measure(bench, name, count, arguments.pairs)
        for count in streams
        for name in CASES
    }
    print(
        json.dumps(
            {
                "benchmark": "sampling in a step",
                **describe(),
                "weights": arguments.weights.parent.name,
                "vocabulary": bench.model.vocab_size,
                "pairs": arguments.pairs,
                "figures": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
