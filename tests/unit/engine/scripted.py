"""An engine whose model says what a test tells it to, and what tests read of any engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.models.batch import Batch
from tests import tiny
from tests.unit.engine.ledger import LedgerModel, LedgerPool


class ByteTokenizer:
    """Token n is byte n; three special ids after them."""

    eos_ids = frozenset({tiny.EOS_ID})
    forbidden_ids = frozenset(range(tiny.EOS_ID + 1, tiny.VOCAB_SIZE))
    strips_leading_space = True

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


class Scripted(LedgerModel):
    """A model that continues every sequence with a script, and fails when it is told to."""

    def __init__(self, script: str, *, eos: bool = True) -> None:
        super().__init__()
        self.ids = [*script.encode(), *([tiny.EOS_ID] if eos else [])]
        self.failures: dict[int, Exception] = {}
        self.nan_first_ids: set[int] = set()

    def forward(self, batch: Batch, pool: LedgerPool) -> torch.Tensor:
        logits = super().forward(batch, pool)
        for segment in batch.segments:
            first, *_ = pool.history(segment, 1)
            if first in self.failures:
                raise self.failures[first]
        return logits

    def write_row(self, row: torch.Tensor, history: list[int]) -> None:
        row[self.ids[(len(history) - PROMPT_LEN) % len(self.ids)]] = 9.0
        if history[0] in self.nan_first_ids:
            row[3] = torch.nan


PROMPT_LEN = 4
NUM_KV_TOKENS = 9_984  # 312 blocks
GREEDY = SamplingParams(temperature=0, max_tokens=64)


def scripted_engine(script: str, *, eos: bool = True, **options: Any) -> tuple[Engine, Scripted]:
    model = Scripted(script, eos=eos)
    return Engine(model, ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS, **options), model


def drain(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(5000):
        if not engine.has_work:
            return events
        for event in engine.step():
            events.setdefault(event.seq_id, []).append(event)
    raise AssertionError("the engine never finished")


def text(events: Iterable[TokenEvent]) -> str:
    return "".join(event.text for event in events)
