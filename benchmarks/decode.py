"""Decode speed of one stream: chatserve's engine against transformers' `generate`, in one run.

    python benchmarks/decode.py [WEIGHTS] [--dtype bfloat16] [--repeats 5]

Prints one JSON line. Variants are interleaved; figures are medians in tokens per second,
in-process, greedy, from the difference of a long and a short run: prefill does not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import describe
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.hub import resolve_weights
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model

PROMPT = list(range(1000, 1032))
SHORT, LONG = 2, 66


class NoTokenizer:
    """Text does not matter here."""

    eos_ids: frozenset[int] = frozenset()
    forbidden_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"x"


def chatserve_runner(
    checkpoint: Checkpoint, dtype: str, *, load_8bit: bool, streams: int = 1
) -> Callable[[int], float]:
    """Seconds for `streams` sequences of `count` new tokens each."""
    policy = choose_policy("cpu", dtype, load_8bit=load_8bit)
    model = load_model(checkpoint, policy)

    def run(count: int) -> float:
        engine = Engine(model, NoTokenizer(), num_kv_tokens=100_000)
        for index in range(streams):
            engine.add(str(index), PROMPT, SamplingParams(temperature=0, max_tokens=count))
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return time.perf_counter() - start

    return run


def transformers_runner(checkpoint: Checkpoint, dtype: str) -> Callable[[int], float]:
    """Seconds for one `generate` of `count` new tokens on the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    config = LlamaConfig(**{k: v for k, v in checkpoint.config.items() if k != "model_type"})
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    state = model.state_dict()
    for name in checkpoint.weights.tensors():
        state[name].copy_(checkpoint.weights.read(name))
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)

    def run(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=count,
                max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.disable()
    torch.set_num_threads(arguments.threads)
    path: Path = resolve_weights(arguments.weights)
    checkpoint = open_checkpoint(path)
    ModelConfig.from_hf(checkpoint.config)
    runners = {
        "chatserve": chatserve_runner(checkpoint, arguments.dtype, load_8bit=False),
        "chatserve_8bit": chatserve_runner(checkpoint, arguments.dtype, load_8bit=True),
        "chatserve_8_streams": chatserve_runner(
            checkpoint, arguments.dtype, load_8bit=False, streams=8
        ),
        "transformers": transformers_runner(checkpoint, arguments.dtype),
    }
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in range(-1, arguments.repeats):  # the first round only warms up
        for name, run in runners.items():
            elapsed = run(LONG) - run(SHORT)
            streams = 8 if name == "chatserve_8_streams" else 1
            if repeat >= 0:
                speeds[name].append(streams * (LONG - SHORT) / elapsed)
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    print(
        json.dumps(
            {
                "benchmark": "decode",
                **describe(),
                "model": path.name,
                "dtype": arguments.dtype,
                "tokens_per_s": medians,
                "ratio_to_transformers": round(medians["chatserve"] / medians["transformers"], 2),
                "ratio_8bit_to_half": round(medians["chatserve_8bit"] / medians["chatserve"], 2),
                "repeats": arguments.repeats,
            }
        )
    )


if __name__ == "__main__":
    main()
