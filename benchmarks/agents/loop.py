"""An agent's loop: a JSON request per line on stdin, a JSON reply per line on stdout.

The first line out says that the engine is loaded. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Measured(Protocol):
    """One loaded engine."""

    vocab_size: int

    def decode(self, prompts: Sequence[list[int]], tokens: int) -> float:
        """Make `tokens` in every stream; tokens per second of all of them, prefill left out."""
        ...

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from the prompt to its first token."""
        ...


def serve(load: Callable[[], Measured]) -> None:
    """Answer until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    start = time.perf_counter()
    engine = load()
    say({"load_s": time.perf_counter() - start, "vocab_size": engine.vocab_size})
    for line in sys.stdin:
        say(_answer(engine, json.loads(line)))


def _answer(engine: Measured, request: dict[str, Any]) -> dict[str, float]:
    prompts = request["prompts"]
    if request["what"] == "decode":
        return {"tokens_per_s": engine.decode(prompts, request["tokens"])}
    seconds = engine.prefill(prompts[0])
    return {"tokens_per_s": len(prompts[0]) / seconds, "first_token_ms": 1000 * seconds}
