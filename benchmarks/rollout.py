"""Answers drawn in reinforcement learning: `python -m benchmarks.rollout [WEIGHTS] [--answers 32]`.

Prints one JSON line: tokens per second of the engine in each form and of transformers' generate,
each in the same loop of PPO on the same policy (an adapter of rank 16 on q and v that does
something), with the same questions and lengths; and the largest difference of a token's
log-probability between who drew and the trainer. Rounds of all ways are interleaved. Needs the
extra [train].
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.machine import describe
from chatserve.hub import resolve_weights
from chatserve.train.base import TrainingBase, open_base
from chatserve.train.offline import no_network
from chatserve.train.ppo.policy import ADAPTER, Policy, Sample, collate
from chatserve.train.ppo.rollout import Drawn, EngineRollout, Form, Request, Sampling
from chatserve.train.texts import query_text

QUESTIONS = (
    "How do I sort a list of pairs by the second value?",
    "What does the error 'address already in use' mean, and how do I find out who uses it?",
    "Why is my loop over a dictionary slower than one over a list?",
    "How can I undo the last commit without losing my changes?",
)
Draw = Callable[[Sequence[Request]], list[tuple[int, ...]]]
FORCED = Sampling(ignores_end=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", nargs="?", default="smollm2-135m")
    parser.add_argument("--answers", type=int, default=32, help="drawn at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--min-new-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    path = resolve_weights(arguments.weights, revision="main", offline=True)
    with no_network():
        base = open_base(path, device="cpu")
        policy = build_policy(base)
        requests = build_requests(base, arguments)
        ways, engines = build_ways(base, policy, requests, arguments)
        line = {
            "what": "answers drawn in reinforcement learning", "model": arguments.weights,
            "answers": arguments.answers, "dtype": str(base.model.dtype).removeprefix("torch."),
            "lengths": [arguments.min_new_tokens, arguments.max_new_tokens],
            **measure(ways, requests, arguments.rounds),
            "largest_difference": {
                form: difference(policy, requests, engine.draw(requests, FORCED))
                for form, engine in engines.items()
            },
            **describe(),
        }  # fmt: skip
    print(json.dumps(line))


def build_policy(base: TrainingBase) -> Policy:
    """The base with an adapter of the recipe's size whose numbers are random."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base.model, lora, adapter_name=ADAPTER)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.01)
    return Policy(model).eval()


def build_requests(base: TrainingBase, arguments: argparse.Namespace) -> list[Request]:
    draw = random.Random(0)
    return [
        Request(
            tuple(base.processing.encode_text(query_text(QUESTIONS[index % len(QUESTIONS)]))),
            draw.randrange(arguments.min_new_tokens, arguments.max_new_tokens),
            index,
        )
        for index in range(arguments.answers)
    ]


def build_ways(
    base: TrainingBase, policy: Policy, requests: Sequence[Request], arguments: argparse.Namespace
) -> tuple[dict[str, Draw], dict[Form, EngineRollout]]:
    """By name: the engine's forms, and transformers."""
    most = max(len(request.query_ids) for request in requests) + arguments.max_new_tokens
    forms: tuple[Form, ...] = ("int8", "shared")
    engines = {
        form: EngineRollout(
            policy.network, sorted(base.tokenizer.eos_ids), form,
            max_answers=arguments.answers, max_tokens=most,
        )
        for form in forms
    }  # fmt: skip

    def by(engine: EngineRollout) -> Draw:
        return lambda asked: [each.token_ids for each in engine.draw(asked, FORCED)]

    ways = {form: by(engine) for form, engine in engines.items()}
    return {**ways, "transformers": lambda asked: generate(policy.network, asked)}, engines


@torch.no_grad()
def generate(network: Any, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """All at once, padded on the left, up to the longest answer, as TRL's trainers do it."""
    width = max(len(request.query_ids) for request in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.query_ids) :] = torch.tensor(request.query_ids)
        mask[row, width - len(request.query_ids) :] = 1
    most = max(request.max_tokens for request in requests)
    found = network.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=most, min_new_tokens=most, use_cache=True, pad_token_id=0,
    )  # fmt: skip
    rows = found[:, width:].tolist()
    # of a shorter answer only its own tokens count
    return [tuple(row[: request.max_tokens]) for row, request in zip(rows, requests, strict=True)]


def measure(
    ways: dict[str, Draw], requests: Sequence[Request], rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens that are wanted per second, medians; the ways take turns."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, draw in ways.items():
            start = time.perf_counter()
            num_tokens = sum(map(len, draw(requests)))
            if number:  # the first round warms caches and allocators
                speeds[name].append(num_tokens / (time.perf_counter() - start))
    median = {name: statistics.median(each) for name, each in speeds.items()}
    return {
        "tokens_per_s": {name: round(each, 1) for name, each in median.items()},
        "over_transformers": {
            name: round(each / median["transformers"], 2) for name, each in median.items()
        },
    }


@torch.no_grad()
def difference(policy: Policy, requests: Sequence[Request], drawn: Sequence[Drawn]) -> float:
    """In nats, between who drew a token and the trainer's own network."""
    worst = 0.0
    for request, answer in zip(requests, drawn, strict=True):
        batch = collate([Sample(request.query_ids, answer.token_ids)], policy.device)
        trainers = policy(batch).logprobs[batch.mask]
        worst = max(worst, float((torch.tensor(answer.logprobs) - trainers).abs().max()))
    return round(worst, 6)


if __name__ == "__main__":
    main()
