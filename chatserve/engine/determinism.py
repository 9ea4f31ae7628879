"""`--deterministic`: an engine whose sequences do not depend on each other, and what that costs.

The CPU kernels give every row the same bits in any batch, so there it is free. PyTorch's operators
round a row differently among others: around them each sequence runs alone, and by blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from typing import Any

from chatserve.engine.engine import Engine, EngineTokenizer
from chatserve.engine.sequence import SamplingParams
from chatserve.models.batch import Model
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.one_by_one import OneByOne

BLOCK_SIZE = 64
"""Of a prompt so many tokens are computed together; an engine scores no more at once, either."""

_NUM_STREAMS = 4
_NUM_TOKENS = 34
_NUM_WARM = 2  # steps; the first of their kind are slower
_TIMED_S = 0.25
_MAX_S = 2.0  # then warm steps count, too


def is_free(model: Model[Any]) -> bool:
    return isinstance(model, KernelLlama)


def build_steady_engine(
    model: Model[Any], tokenizer: EngineTokenizer, *, num_kv_tokens: int, **options: Any
) -> Engine:
    """As `Engine`, for a model on PyTorch's operators. It may keep a block more than asked for."""
    num_blocks = -(-num_kv_tokens // BLOCK_SIZE)
    return Engine(
        OneByOne(model), tokenizer, num_kv_tokens=num_blocks * BLOCK_SIZE, block_size=BLOCK_SIZE,
        by_blocks=True, **options,
    )  # fmt: skip


def price(model: Model[Any], tokenizer: EngineTokenizer) -> str:
    """One line for the log: how fast a few streams are with it, and how fast without."""
    if is_free(model):
        return "deterministic: free, the CPU kernels compute every row as if it were alone"
    num_kv_tokens = 2 * _NUM_STREAMS * BLOCK_SIZE
    together = _tokens_per_s(Engine(model, tokenizer, num_kv_tokens=num_kv_tokens))
    alone = _tokens_per_s(build_steady_engine(model, tokenizer, num_kv_tokens=num_kv_tokens))
    return (
        f"deterministic: {_NUM_STREAMS} streams make {alone:.3g} tokens/s one by one, "
        f"{together:.3g} in a batch: it costs a factor of {together / alone:.2g}"
    )


def _tokens_per_s(engine: Engine) -> float:
    params = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True)
    for number in range(_NUM_STREAMS):
        engine.add(str(number), [number], params)
    steps: list[tuple[int, float]] = []
    while engine.has_work:
        start = time.perf_counter()
        num_tokens = sum(len(event.token_ids) for event in engine.step())
        steps.append((num_tokens, time.perf_counter() - start))
        if _seconds(steps[_NUM_WARM:]) >= _TIMED_S or _seconds(steps) >= _MAX_S:
            break
    counted = steps[_NUM_WARM:] or steps[-1:]
    return sum(num_tokens for num_tokens, _ in counted) / _seconds(counted)


def _seconds(steps: Rows[tuple[int, float]]) -> float:
    return sum(seconds for _, seconds in steps)
