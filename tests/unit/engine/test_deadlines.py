"""The four limits: which comes first, and hangs at each of them in a real engine."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.deadlines import NO_LIMITS, first_deadline
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import Phase, SamplingParams, TokenEvent
from chatserve.errors import (
    ChatserveError,
    FirstTokenTimeout,
    QueueTimeout,
    RequestTimeout,
    TokenGapTimeout,
    WorkerStalled,
)
from chatserve.models.batch import Batch
from chatserve.options import TimeLimits
from tests.unit.engine.ledger import LedgerPool
from tests.unit.engine.scripted import NUM_KV_TOKENS, ByteTokenizer, Scripted

LIMITS = TimeLimits(
    queue_timeout_s=100, first_token_timeout_s=200, token_gap_timeout_s=30, request_timeout_s=1000
)
ENDLESS = SamplingParams(temperature=0, max_tokens=5000, ignore_eos=True)
PROMPT = [0, 1, 2, 3]
WAIT_S = 30.0
LIMIT_S = 0.3
"""What tests set a limit to that is to strike."""


@dataclass
class Times:
    arrived_at: float
    spoke_at: float | None = None


@pytest.mark.parametrize(
    ("phase", "spoke_at", "moved_at", "due", "kind"),
    [
        # before the first token: the queue, unless the engine has stalled
        ("waiting", None, 1095, 1100, QueueTimeout),
        ("waiting", None, 1000, 1030, WorkerStalled),
        ("prefill", None, 1195, 1200, FirstTokenTimeout),
        ("prefill", None, 1010, 1040, WorkerStalled),
        # who arrives at an engine that has been idle finds it on time
        ("waiting", None, 10, 1030, WorkerStalled),
        # in decode it is the silence that counts
        ("decode", 1500, 1500, 1530, TokenGapTimeout),
        ("decode", 1500, 1525, 1555, TokenGapTimeout),
        ("decode", 1500, 1559, 1560, TokenGapTimeout),
        # preempted, or held for a slow reader: silent without fault
        ("waiting", 1500, 1800, 1830, WorkerStalled),
        ("prefill", 1500, 1800, 1830, WorkerStalled),
        ("decode", 1990, 1990, 2000, RequestTimeout),
    ],
)
def test_which_limit_comes_first(
    phase: Phase, spoke_at: float | None, moved_at: float, due: float, kind: type[ChatserveError]
) -> None:
    deadline = first_deadline(LIMITS, Times(1000, spoke_at), phase, moved_at)
    assert (deadline.due, deadline.kind) == (due, kind)


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
@pytest.mark.parametrize("spoke_at", [None, 1.0])
def test_without_limits_nothing_is_ever_due(phase: Phase, spoke_at: float | None) -> None:
    assert first_deadline(NO_LIMITS, Times(0, spoke_at), phase, 0).due == math.inf


class Hanging(Scripted):
    """Hangs before a step of its choice until it is let go."""

    def __init__(self) -> None:
        super().__init__("word ", eos=False)
        self.hangs_at: int | None = None
        self.step_s = 0.0
        self.gate = threading.Event()

    def forward(self, batch: Batch, pool: LedgerPool) -> Any:
        if self.hangs_at is not None and self.num_steps >= self.hangs_at:
            assert self.gate.wait(WAIT_S)
        time.sleep(self.step_s)
        return super().forward(batch, pool)


def run(
    test: Callable[[AsyncEngine, Hanging], Awaitable[None]], limits: TimeLimits, **options: int
) -> None:
    async def main() -> None:
        model = Hanging()
        engine = Engine(model, ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS, **options)
        events = AsyncEngine(engine, max_num_seqs=options.get("max_num_seqs", 16), limits=limits)
        events.start()
        try:
            async with asyncio.timeout(WAIT_S):
                await test(events, model)
                model.gate.set()
                # what was aborted leaves nothing behind
                while engine.num_free_kv_tokens != NUM_KV_TOKENS or engine.has_work:
                    await asyncio.sleep(0.001)
        finally:
            model.gate.set()
            await events.stop()

    asyncio.run(main())


async def to_the_end(
    events: AsyncEngine, name: str, spoken: set[str] | None = None
) -> tuple[TokenEvent, float]:
    """The last event of an endless sequence, and when it came; `spoken` has who has any."""
    async with events.submit(name, PROMPT, ENDLESS) as stream:
        async for event in stream:
            last = event
            if spoken is not None:
                spoken.add(name)
    return last, time.monotonic()


def only(**limits: float) -> TimeLimits:
    return replace(NO_LIMITS, **limits)


def test_a_turn_that_does_not_come() -> None:
    async def check(events: AsyncEngine, model: Hanging) -> None:
        model.step_s = 0.005
        async with events.submit("a", PROMPT, ENDLESS) as first:
            await anext(first)
            started = time.monotonic()
            waiting = asyncio.create_task(to_the_end(events, "b"))
            while not waiting.done():
                # who has a turn keeps it
                assert (await anext(first)).error is None
            last, ended = waiting.result()
            assert isinstance(last.error, QueueTimeout) and "--queue-timeout-s" in str(last.error)
            assert ended - started >= LIMIT_S

    run(check, only(queue_timeout_s=LIMIT_S), max_num_seqs=1)


@pytest.mark.parametrize(
    ("hangs", "limits", "kind"),
    [
        ("at once", only(first_token_timeout_s=LIMIT_S), FirstTokenTimeout),
        ("at once", only(token_gap_timeout_s=LIMIT_S), WorkerStalled),
        ("once all have spoken", only(token_gap_timeout_s=LIMIT_S), TokenGapTimeout),
        ("once all have spoken", only(request_timeout_s=LIMIT_S), RequestTimeout),
        ("never", only(request_timeout_s=LIMIT_S), RequestTimeout),
    ],
)
def test_a_step_that_hangs(hangs: str, limits: TimeLimits, kind: type[ChatserveError]) -> None:
    async def check(events: AsyncEngine, model: Hanging) -> None:
        model.hangs_at = 0 if hangs == "at once" else None
        started = time.monotonic()
        spoken: set[str] = set()
        answering = asyncio.gather(*(to_the_end(events, str(i), spoken) for i in range(8)))
        if hangs == "once all have spoken":
            while len(spoken) < 8:
                await asyncio.sleep(0)
            model.hangs_at = 0
        outcomes = await answering
        assert {type(last.error) for last, _ in outcomes} == {kind}
        assert all(ended - started >= LIMIT_S for _, ended in outcomes)
        print(f"{kind.__name__}: {max(ended for _, ended in outcomes) - started - LIMIT_S:.3f} s")

    run(check, limits)


def test_without_its_limit_a_hang_is_for_ever() -> None:
    """The guard switched off: the limits that are left do not see it."""

    async def check(events: AsyncEngine, model: Hanging) -> None:
        model.hangs_at = 3
        async with events.submit("a", PROMPT, ENDLESS) as stream:
            for _ in range(3):
                await anext(stream)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 3 * LIMIT_S)

    run(check, only(queue_timeout_s=LIMIT_S, first_token_timeout_s=WAIT_S))


def test_an_engine_that_hangs_is_known_also_when_nobody_is_left() -> None:
    async def check(events: AsyncEngine, model: Hanging) -> None:
        assert events.stats().last_token_age_s == 0
        model.hangs_at = 0
        last, _ = await to_the_end(events, "a")
        assert isinstance(last.error, WorkerStalled)
        stats = events.stats()
        assert stats.last_token_age_s >= LIMIT_S and stats.num_running == 1
        with pytest.raises(WorkerStalled):
            events.submit("b", PROMPT, ENDLESS)
        model.hangs_at = None
        model.gate.set()
        while events.stats().last_token_age_s:
            await asyncio.sleep(0.001)
        assert events.stats().num_running == 0

    run(check, only(token_gap_timeout_s=LIMIT_S))


def test_who_speaks_is_not_overdue() -> None:
    """Its limits have passed many times before it ends."""

    async def check(events: AsyncEngine, model: Hanging) -> None:
        model.step_s = 0.01
        async with events.submit("a", PROMPT, ENDLESS) as stream:
            started = time.monotonic()
            while time.monotonic() < started + 4 * LIMIT_S:
                assert (await anext(stream)).error is None

    run(check, only(token_gap_timeout_s=LIMIT_S, queue_timeout_s=LIMIT_S))


def test_a_process_that_was_stopped_and_goes_on_ends_nobody() -> None:
    """The loop wakes with all deadlines passed, and the engine has a token to say."""

    async def check(events: AsyncEngine, model: Hanging) -> None:
        model.hangs_at = 3
        async with events.submit("a", PROMPT, ENDLESS) as stream:
            for _ in range(3):
                await anext(stream)
            time.sleep(2 * LIMIT_S)
            model.hangs_at = None
            model.gate.set()
            for _ in range(100):
                assert (await anext(stream)).error is None

    run(check, only(token_gap_timeout_s=LIMIT_S))


def test_stop_does_not_wait_for_a_step_that_hangs() -> None:
    async def main() -> None:
        model = Hanging()
        model.hangs_at = 0
        engine = Engine(model, ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS)
        events = AsyncEngine(engine)
        events.start()
        async with events.submit("a", PROMPT, ENDLESS) as stream:
            async with asyncio.timeout(WAIT_S):
                await events.stop()
                await events.stop()
                assert (await anext(stream)).error is not None
        model.gate.set()

    asyncio.run(main())
