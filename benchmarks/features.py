"""What chatserve adds to its kernels, on and off in turn: prefix cache, and drafts from the prompt.

    python -m benchmarks.features [--model smollm2-135m] [--form int8] [--rounds 5]

In-process. One JSON line per feature: the first token of a prompt whose first 1,000 tokens are
cached, over that of a new one; decode speed with drafts over that without, for an answer that
repeats its prompt and for one that does not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.peers.agent import AgentPeer
from benchmarks.peers.chatserve import FORMS, PLAIN, check_form
from benchmarks.places import models_folder
from benchmarks.quality import TEXTS
from benchmarks.run_model import RunModel
from chatserve.models.special_tokens import Special
from chatserve.models.tokenizer import load_tokenizer

PREFIX_TOKENS = 1000
TAIL_TOKENS = 20


def prefix_cache(agent: AgentPeer, model: RunModel, num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds to the first token: new prompts, and prompts whose beginning was seen."""
    times: dict[str, list[float]] = {"new": [], "cached": []}
    source = random.Random(0)

    def ids(count: int) -> list[int]:
        return source.choices(range(model.vocab_size // 8, model.vocab_size // 2), k=count)

    for _ in range(num_rounds):
        prefix = ids(PREFIX_TOKENS)
        for case in times:
            reply = agent.ask("prefill", [prefix + ids(TAIL_TOKENS)], 1)
            times[case].append(reply["first_token_ms"])
    return times


def drafts(
    agents: dict[str, AgentPeer], prompt: list[int], tokens: int, num_rounds: int
) -> dict[str, list[float]]:
    """Tokens per second of one stream, per agent."""
    speeds: dict[str, list[float]] = {name: [] for name in agents}
    for _ in range(num_rounds):
        for name, agent in agents.items():
            speeds[name].append(agent.ask("decode", [prompt], tokens)["tokens_per_s"])
    return speeds


def chat_prompt(model: RunModel, question: str) -> list[int]:
    """In SmolLM2's template: all benchmark models have its tokenizer."""
    tokenizer = load_tokenizer(model.folder)
    start, end = Special("<|im_start|>"), Special("<|im_end|>")
    parts = [start, f"user\n{question}", end, "\n", start, "assistant\n"]
    return tokenizer.encode(parts, add_bos=False)


def summary(values: dict[str, list[float]], over: str, under: str) -> dict[str, object]:
    """Medians of each case and the ratio of two of them."""
    medians = {name: statistics.median(found) for name, found in values.items()}
    return {
        **{name: round(median, 2) for name, median in medians.items()},
        "ratio": round(medians[over] / medians[under], 3),
        "rounds": len(values[over]),
        "min": {name: round(min(found), 2) for name, found in values.items()},
        "max": {name: round(max(found), 2) for name, found in values.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--models", type=Path, default=models_folder())
    parser.add_argument("--form", default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args(argv)
    check_form(arguments.form)
    model = RunModel.open(arguments.models / arguments.model)
    command = [sys.executable, "-m", "benchmarks.agents.chatserve_agent", str(model.folder)]
    settings = {**PLAIN, **FORMS[arguments.form]}
    agents = {
        name: AgentPeer(f"chatserve, {name}", command, {**settings, "CHATSERVE_SPECULATION": on})
        for name, on in (("off", "0"), ("on", "1"))
    }
    common = {**describe(), "model": model.name, "form": arguments.form}

    def say(benchmark: str, unit: str, figures: dict[str, object]) -> None:
        print(json.dumps({"benchmark": benchmark, **common, "unit": unit, **figures}), flush=True)

    story = (TEXTS / "story.txt").read_text("utf-8")
    prompts = {
        "edit": f"Correct the spelling of this text:\n\n{story}",
        "new text": "Write a long story about a lighthouse keeper and his clock.",
    }
    try:
        times = prefix_cache(agents["off"], model, arguments.rounds)
        say("prefix-cache", "ms", summary(times, "cached", "new"))
        for case, question in prompts.items():
            prompt = chat_prompt(model, question)
            speeds = drafts(agents, prompt, arguments.tokens, arguments.rounds)
            say(f"drafts, {case}", "tokens/s", summary(speeds, "on", "off"))
    finally:
        for agent in agents.values():
            agent.close()


if __name__ == "__main__":
    main()
