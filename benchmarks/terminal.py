"""What `chatserve chat` costs while it draws an answer, and how soon it asks for a question.

    python -m benchmarks.terminal [--seconds 20] [--tokens-per-s 100]

The chat runs in a pty against a server that sends Markdown at a fixed rate. Prints one JSON line:
processor time of the client in percent of a core while the answer comes; seconds from its start to
its first prompt; and, for answers of 10,000 tokens that are one block, drawn ten tokens at a time,
the time of the last thousand tokens over that of the first thousand.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import machine
from chatserve.cli.live_markdown import LiveMarkdown
from tests.e2e.terminal import Terminal
from tests.fake_openai import FakeOpenAI, Stream

REPOSITORY = Path(__file__).parents[1]
NUM_TOKENS = 10_000
BATCH = 10
COLUMNS, ROWS = 100, 40
_WORDS = "the quick brown fox jumps over a lazy dog while **bold** words and `code` come"


class Talker:
    """Says Markdown of all kinds, a word and the blank behind it each time, at a fixed rate."""

    def __init__(self, seconds: float, tokens_per_s: float) -> None:
        self.num_tokens = round((seconds + 2) * tokens_per_s)
        self._step_s = 1 / tokens_per_s

    def __call__(self, stream: Stream) -> None:
        tokens = markdown(random.Random(1))
        due = time.perf_counter()
        for _ in range(self.num_tokens):
            stream.text(next(tokens))
            due += self._step_s
            time.sleep(max(due - time.perf_counter(), 0))
        stream.text("\n\nthat is all")
        stream.end(num_tokens=self.num_tokens)


def markdown(chance: random.Random) -> Iterator[str]:
    """Tokens of an answer that never ends: paragraphs, lists, code and tables in turn."""
    while True:
        for block in (
            f"## {_sentence(chance, 4)}\n\n",
            *(_sentence(chance, 60) + "\n\n" for _ in range(3)),
            "".join(f"- {_sentence(chance, 12)}\n" for _ in range(8)) + "\n",
            _code(12) + "\n",
            "| a | b |\n|---|---|\n"
            + "".join(f"| {_sentence(chance, 2)} | {_sentence(chance, 4)} |\n" for _ in range(6))
            + "\n",
        ):
            yield from _tokens(block)


def blocks(chance: random.Random) -> dict[str, str]:
    """Answers of `NUM_TOKENS` that are one block each."""
    lines = NUM_TOKENS // 10
    return {
        "paragraph": _sentence(chance, NUM_TOKENS),
        "code": _code(NUM_TOKENS // 10),
        "item": f"- {_sentence(chance, NUM_TOKENS)}",
        "items": "- a list:\n" + "".join(f"  - {_sentence(chance, 9)}\n" for _ in range(lines)),
        "quote": "".join(f"> {_sentence(chance, 9)}\n" for _ in range(lines)),
        "list": "".join(f"- {_sentence(chance, 9)}\n" for _ in range(lines)),
        "numbers": "".join(f"{n}. {_sentence(chance, 9)}\n" for n in range(1, lines)),
        "table": "| a | b |\n|---|---|\n"
        + "".join(f"| {_sentence(chance, 4)} | {n} |\n" for n in range(NUM_TOKENS // 7)),
        "mixed": "".join(_take(markdown(chance), NUM_TOKENS)),
    }


def growth(text: str) -> float:
    """The time of the last thousand tokens over that of the first."""
    drawing = LiveMarkdown()
    tokens = list(_tokens(text))[:NUM_TOKENS]
    times = []
    for start in range(0, len(tokens), BATCH):
        started = time.process_time()
        drawing.feed("".join(tokens[start : start + BATCH]), COLUMNS, ROWS)
        times.append(time.process_time() - started)
    tenth = len(times) // 10
    return sum(times[-tenth:]) / sum(times[:tenth])


def measure_chat(seconds: float, tokens_per_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as home, FakeOpenAI() as server:
        server.scripts["talk"] = Talker(seconds, tokens_per_s)
        started = time.perf_counter()
        argv = ["-m", "chatserve.cli", "--base-url", server.url]
        terminal = Terminal(argv, {"PYTHONPATH": str(REPOSITORY), "CHATSERVE_HOME": home})
        try:
            terminal.wait_for("\n>", "fake-1b")
            first_prompt_s = time.perf_counter() - started
            client = psutil.Process(terminal.child.pid)
            terminal.type("talk\r")
            terminal.wait_until(lambda: len(server.bodies) == 1, "the question")
            before, began = client.cpu_times(), time.perf_counter()
            while time.perf_counter() < began + seconds:
                _read_for_a_second(terminal)
            after, took = client.cpu_times(), time.perf_counter() - began
            terminal.type("\x04")
        finally:
            terminal.close()
    busy_s = after.user + after.system - before.user - before.system
    return {
        "first_prompt_s": round(first_prompt_s, 2),
        "cpu_percent": round(100 * busy_s / took, 2),
    }


def _read_for_a_second(terminal: Terminal) -> None:
    end = time.perf_counter() + 1
    terminal.wait_until(lambda: time.perf_counter() > end, "a second")


def _sentence(chance: random.Random, num_words: int) -> str:
    return " ".join(chance.choices(_WORDS.split(), k=num_words))


def _code(num_functions: int) -> str:
    functions = (
        f"def f{n}(x):\n    # adds {n}\n    return x + {n}\n\n" for n in range(num_functions)
    )
    return f"```python\n{''.join(functions)}```\n"


def _tokens(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"\S*\s+|\S+$", text))


def _take(tokens: Iterator[str], num: int) -> list[str]:
    return [next(tokens) for _ in range(num)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--tokens-per-s", type=float, default=100.0)
    options = parser.parse_args()
    figures: dict[str, Any] = measure_chat(options.seconds, options.tokens_per_s)
    grown = {name: round(growth(text), 2) for name, text in blocks(random.Random(1)).items()}
    print(json.dumps({"benchmark": "terminal", **machine.describe(), **figures, "growth": grown}))
