"""Measures chatserve's engine as `chatserve worker` builds it, without HTTP.

python -m benchmarks.agents.chatserve_agent WEIGHTS

Settings come from the environment (CHATSERVE_DTYPE, CHATSERVE_LOAD_8BIT, …).
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Sequence

from benchmarks.agents.loop import serve
from chatserve.config import WorkerConfig, build
from chatserve.engine import serving
from chatserve.engine.sequence import SamplingParams


class ChatserveEngine:
    """The synchronous engine, stepped by hand."""

    def __init__(self, weights: str) -> None:
        config = build(WorkerConfig, {"weights": weights, "offline": True})
        async_engine, served = serving.load(config)
        # the engine inside: its thread and queue are what the HTTP figures add
        self._engine = async_engine.engine
        self.vocab_size = served.vocab_size
        self._names = itertools.count()

    def decode(self, prompts: Sequence[list[int]], tokens: int) -> float:
        waiting = {self._add(prompt, tokens + 1) for prompt in prompts}
        while waiting:
            waiting -= {event.seq_id for event in self._engine.step() if event.token_ids}
        made, start = 0, time.perf_counter()
        while self._engine.has_work:
            made += sum(len(event.token_ids) for event in self._engine.step())
        return made / (time.perf_counter() - start)

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self._add(prompt, 1)
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - start

    def _add(self, prompt: list[int], tokens: int) -> str:
        name = f"benchmark-{next(self._names)}"
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self._engine.add(name, prompt, params)
        return name


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    serve(lambda: ChatserveEngine(sys.argv[1]))
