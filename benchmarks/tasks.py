"""What is measured: tasks, and the figures that they yield with their units. Knows no peer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

What = Literal["prefill", "decode", "memory", "startup", "first-token", "streams", "cpu", "idle"]

Figures = dict[str, float]
"""By name; the end of a name says its unit."""

UNITS = {
    "tokens_per_s": "tokens/s",
    "_ms": "ms",
    "_s": "s",
    "_us_per_token": "µs/token",
    "_bytes": "bytes",
    "_percent": "% of a core",
}


@dataclass(frozen=True)
class Task:
    """One thing to measure. `prompt` tokens are read, then `tokens` made in each of `streams`."""

    mode: Literal["in-process", "http"]
    what: What
    prompt: int = 0
    streams: int = 1
    tokens: int = 1

    @property
    def label(self) -> str:
        parts = [self.what]
        if self.prompt:
            parts.append(f"prompt {self.prompt}")
        if self.what in ("decode", "streams", "cpu"):
            parts.append(f"{self.streams} x {self.tokens}")
        return ", ".join(parts)

    def as_fields(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """How large the tasks of a run are."""

    streams: tuple[int, ...] = (1, 4, 8, 16)
    prefill: tuple[int, ...] = (128, 512, 1500)
    context: int = 64
    long_context: int = 512
    tokens: int = 64


TRIAL = Sizes(streams=(1, 2), prefill=(16,), context=8, long_context=24, tokens=8)


def tasks_of(modes: tuple[str, ...], sizes: Sizes) -> list[Task]:
    """All tasks of the `modes`, in the order in which they are taken."""
    tasks: list[Task] = []
    if "in-process" in modes:
        tasks += [Task("in-process", "prefill", length) for length in sizes.prefill]
        tasks += [
            Task("in-process", "decode", context, streams, sizes.tokens)
            for streams, context in _decodes(sizes)
        ]
        tasks.append(Task("in-process", "memory"))
    if "http" in modes:
        tasks.append(Task("http", "startup"))
        tasks += [
            Task("http", "first-token", length) for length in (sizes.context, sizes.long_context)
        ]
        tasks += [
            Task("http", "streams", sizes.context, streams, sizes.tokens)
            for streams in sizes.streams
        ]
        tasks.append(Task("http", "cpu", sizes.context, max(sizes.streams), 4 * sizes.tokens))
        tasks += [Task("http", "idle"), Task("http", "memory")]
    return tasks


def _decodes(sizes: Sizes) -> Iterator[tuple[int, int]]:
    yield 1, sizes.context
    yield 1, sizes.long_context
    yield from ((streams, sizes.context) for streams in sizes.streams if streams > 1)


def unit_of(figure: str) -> str:
    return next(unit for suffix, unit in UNITS.items() if figure.endswith(suffix))


def is_better_high(figure: str) -> bool:
    return figure.endswith("tokens_per_s")


def random_prompts(task: Task, vocab_size: int, round_: int) -> list[list[int]]:
    """Token ids for each stream; no two rounds or streams share a prefix that a cache could use.

    From the middle of the vocabulary: special tokens lie at its ends.
    """
    source = random.Random(f"{task} {round_}")
    ids = range(vocab_size // 8, vocab_size // 2)
    return [source.choices(ids, k=task.prompt) for _ in range(task.streams)]
