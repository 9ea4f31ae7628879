"""What a request's extras cost: engine steps with and without them, in turns.

    python -m benchmarks.answer_features WEIGHTS [--streams 1,8] [--rounds 12]

Prints one JSON line. Per number of streams: the median milliseconds of a plain step, and how much
longer those of each case take, in percent. A round decodes the same tokens of every case, in one
process, with every sequence of a case asking for the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.sampling_in_step import texts
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.tokenizer import load_tokenizer

CONTEXT = 80
NUM_STEPS = 24
PLAIN = SamplingParams(temperature=0.8, max_tokens=10 * NUM_STEPS, ignore_eos=True)
CASES = {
    "plain": PLAIN,
    "logprobs": replace(PLAIN, logprobs=0),
    "top 5 logprobs": replace(PLAIN, logprobs=5),
    "top 20 logprobs": replace(PLAIN, logprobs=20),
    "penalties": replace(
        PLAIN, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1
    ),
    "top-p, top-k, min-p, bias": replace(
        PLAIN, top_p=0.9, top_k=40, min_p=0.02, logit_bias={i: 1.0 for i in range(100, 400)}
    ),
}
CHOICES = "n choices of one prompt"


def decode(engine: Engine, prompts: list[list[int]], params: SamplingParams, group: bool) -> float:
    """Seconds of a step, after all prompts are computed."""
    names = [str(index) for index in range(len(prompts))]
    for index, name in enumerate(names):
        prompt = prompts[0] if group else prompts[index]
        engine.add(
            name, prompt, replace(params, seed=index), choice=index if group else 0,
            group="one" if group else None,
        )  # fmt: skip
    num_answering: set[str] = set()
    while len(num_answering) < len(names):
        num_answering |= {event.seq_id for event in engine.step() if event.token_ids}
    start = time.perf_counter()
    for _ in range(NUM_STEPS):
        engine.step()
    seconds = (time.perf_counter() - start) / NUM_STEPS
    for name in names:
        engine.abort(name)
    return seconds


def measure(engine: Engine, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    cases = {**CASES, **({CHOICES: PLAIN} if len(prompts) > 1 else {})}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, params in cases.items():
            seconds[name].append(decode(engine, prompts, params, name == CHOICES))
    plain = seconds["plain"][1:]
    figures = {"plain_ms": round(1000 * statistics.median(plain), 3)}
    for name in cases:
        if name != "plain":
            ratios = [a / b for a, b in zip(seconds[name][1:], plain, strict=True)]
            figures[f"{name}, %"] = round(100 * (statistics.median(ratios) - 1), 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.streams.split(",")]
    checkpoint = open_checkpoint(arguments.weights)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, choose_policy("cpu", load_8bit=True))
    tokenizer = load_tokenizer(arguments.weights, checkpoint.metadata)
    engine = Engine(model, tokenizer, num_kv_tokens=32 * 32 * max(counts))
    prompts = texts(arguments.weights, max(counts), CONTEXT)
    figures = {
        f"{count} streams": measure(engine, prompts[:count], arguments.rounds) for count in counts
    }
    print(
        json.dumps(
            {
                "benchmark": "features of an answer",
                **describe(),
                "weights": arguments.weights.parent.name,
                "rounds": arguments.rounds,
                "figures": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
