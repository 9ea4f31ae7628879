"""What a schema costs: tokens a second of plain answers and of ones that must match it, in turns.

    python -m benchmarks.structured_output WEIGHTS [--streams 1,8] [--rounds 10]

Prints one JSON line: per number of streams the tokens a second of both and the difference in
percent, microseconds of a mask (median, 99th percentile and worst, in the thread that fills them),
milliseconds until a schema is compiled: the first (which starts the process that tries it), one
more, and one that has been seen. A round decodes as many tokens of each, in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe
from benchmarks.sampling_in_step import texts
from chatserve.engine.engine import Engine
from chatserve.engine.grammar import Grammar, Matcher
from chatserve.engine.sequence import SamplingParams
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.tokenizer import load_tokenizer
from chatserve.protocol.response_format import read_schema

CONTEXT = 80
NUM_STEPS = 48
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "gone"]}, "maxItems": 4},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
# an answer that does not end within a round
PEOPLE = {"type": "array", "items": PERSON, "minItems": 10_000}
PLAIN = SamplingParams(temperature=0.8, max_tokens=10 * NUM_STEPS, ignore_eos=True)


@dataclass
class TimedGrammar:
    """Notes how long each mask takes."""

    inner: Grammar
    seconds: list[float] = field(default_factory=list)

    def matcher(self) -> TimedMatcher:
        return TimedMatcher(self.inner.matcher(), self.seconds)


@dataclass
class TimedMatcher:
    inner: Matcher
    seconds: list[float]

    @property
    def is_finished(self) -> bool:
        return self.inner.is_finished

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        start = time.perf_counter()
        self.inner.fill_mask(words)
        self.seconds.append(time.perf_counter() - start)

    def accept(self, token_id: int) -> None:
        self.inner.accept(token_id)


def tokens_per_s(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    """Of all streams together, after all prompts are computed."""
    names = [str(index) for index in range(len(prompts))]
    for index, name in enumerate(names):
        engine.add(name, prompts[index], replace(params, seed=index))
    answering: set[str] = set()
    while len(answering) < len(names):
        answering |= {event.seq_id for event in engine.step() if event.token_ids}
    start = time.perf_counter()
    for _ in range(NUM_STEPS):
        engine.step()
    seconds = time.perf_counter() - start
    for name in names:
        engine.abort(name)
    return NUM_STEPS * len(names) / seconds


def measure(
    engine: Engine, prompts: list[list[int]], grammar: Grammar, rounds: int
) -> dict[str, float]:
    timed = TimedGrammar(grammar)
    held = replace(PLAIN, grammar=timed)
    pairs = [
        (tokens_per_s(engine, prompts, PLAIN), tokens_per_s(engine, prompts, held))
        for _ in range(rounds + 1)
    ][1:]
    masks = sorted(1e6 * each for each in timed.seconds)
    return {
        "plain_tokens_per_s": round(statistics.median(plain for plain, _ in pairs), 1),
        "json_schema_tokens_per_s": round(statistics.median(held for _, held in pairs), 1),
        "slower_percent": round(100 * (1 - statistics.median(b / a for a, b in pairs)), 1),
        "mask_us_p50": round(statistics.median(masks), 1),
        "mask_us_p99": round(masks[int(0.99 * len(masks))], 1),
        "mask_us_max": round(masks[-1], 1),
    }


def compile_ms(grammars: GrammarCompiler, schema: dict[str, Any]) -> tuple[Grammar, float]:
    spec = read_schema(schema, "schema")
    start = time.perf_counter()
    grammar = asyncio.run(grammars.compile(spec))
    return grammar, round(1000 * (time.perf_counter() - start), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.streams.split(",")]
    checkpoint = open_checkpoint(arguments.weights)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, choose_policy("cpu", load_8bit=True))
    tokenizer = load_tokenizer(arguments.weights, checkpoint.metadata)
    engine = Engine(model, tokenizer, num_kv_tokens=32 * 32 * max(counts))
    prompts = texts(arguments.weights, max(counts), CONTEXT)
    with closing(GrammarCompiler(tokenizer, model.vocab_size)) as grammars:
        _, first_ms = compile_ms(grammars, PERSON)
        grammar, another_ms = compile_ms(grammars, PEOPLE)
        _, seen_ms = compile_ms(grammars, PEOPLE)
        figures = {
            f"{count} streams": measure(engine, prompts[:count], grammar, arguments.rounds)
            for count in counts
        }
    print(
        json.dumps(
            {
                "benchmark": "structured output",
                **describe(),
                "weights": arguments.weights.parent.name,
                "vocabulary": model.vocab_size,
                "compile_ms": {"first": first_ms, "another": another_ms, "seen": seen_ms},
                "figures": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
