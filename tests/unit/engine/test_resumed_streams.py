"""Sequences that were begun elsewhere, on the engine's own thread: ids, places, readers, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import Begun, SamplingParams, TokenEvent
from chatserve.engine.token_stream import MAX_PENDING
from chatserve.errors import ContextLengthExceeded, EngineStopped, InvalidRequest, Overloaded
from tests.unit.engine.scripted import GREEDY, NUM_KV_TOKENS, scripted_engine, text

ENDLESS = SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True)
PROMPT = [0, 1, 2, 3]
Check = Callable[[AsyncEngine, Engine], Awaitable[None]]


def run(check: Check, **options: int) -> None:
    async def main() -> None:
        limits = {"max_num_seqs": 2, "max_num_waiting": 1, **options}
        engine, _ = scripted_engine("Hello", max_num_seqs=limits["max_num_seqs"])
        async_engine = AsyncEngine(engine, **limits)
        async_engine.start()
        try:
            async with asyncio.timeout(60):
                await check(async_engine, engine)
        finally:
            await async_engine.stop()

    asyncio.run(main())


def begun(said: str, *, has_ended: bool = False) -> Begun:
    units = tuple((byte,) for byte in said.encode())
    return Begun(units, tuple(() for _ in units), has_ended=has_ended)


async def collect(
    events: AsyncEngine, name: str, params: SamplingParams, told: Begun
) -> Sequence[TokenEvent]:
    async with events.submit(name, PROMPT, params, begun=told) as stream:
        return [event async for event in stream]


def test_what_was_said_comes_first() -> None:
    async def check(events: AsyncEngine, engine: Engine) -> None:
        answer = await collect(events, "a", GREEDY, begun("Hel"))
        assert [event.text for event in answer] == ["H", "e", "l", "l", "o", ""]
        assert answer[-1].finish_reason == "stop"
        assert events.stats().free_kv_tokens == NUM_KV_TOKENS

    run(check)


def test_the_same_answer_may_still_be_under_way_here() -> None:
    """A connection is lost, not the worker: the stream comes back before its end is noticed."""

    async def check(events: AsyncEngine, engine: Engine) -> None:
        async with events.submit("a", PROMPT, ENDLESS) as lost:
            await anext(lost)
            for _ in range(2):
                assert text(await collect(events, "a", GREEDY, begun("He"))) == "Hello"
            async with events.submit("a", PROMPT, ENDLESS, begun=begun("He")) as second:
                await anext(second)
                await lost.aclose()
                # closing the one has not ended the other
                assert [(await anext(second)).text for _ in range(4)] == list("ello")
        assert text(await collect(events, "b", GREEDY, begun("H"))) == "Hello"
        assert engine.num_free_kv_tokens == NUM_KV_TOKENS

    run(check)


def test_no_queue_refuses_it() -> None:
    """It has waited for its turn where it began."""

    async def check(events: AsyncEngine, engine: Engine) -> None:
        streams = [events.submit(str(number), PROMPT, ENDLESS) for number in range(3)]
        with pytest.raises(Overloaded):
            events.submit("late", PROMPT, GREEDY)
        streams += [events.submit(str(n), PROMPT, GREEDY, begun=begun("H")) for n in range(3, 6)]
        unsaid = events.submit("unsaid", PROMPT, GREEDY, begun=Begun((), ()))
        await streams[0].aclose()
        for stream in streams[3:]:
            assert text([event async for event in stream]) == "Hello"
        for stream in streams[:3]:
            await stream.aclose()
        assert text([event async for event in unsaid]) == "Hello"
        # and all places are free again
        for number in range(3):
            await events.submit(str(number), PROMPT, GREEDY).aclose()

    run(check)


def test_one_that_had_ended_only_says_so() -> None:
    async def check(events: AsyncEngine, engine: Engine) -> None:
        params = SamplingParams(temperature=0, max_tokens=3)
        answer = await collect(events, "a", params, begun("Hel", has_ended=True))
        assert text(answer) == "Hel" and answer[-1].finish_reason == "length"
        assert not engine.has_work and events.stats().num_running == 0

    run(check)


def test_one_that_cannot_be_is_an_error_of_its_stream() -> None:
    async def check(events: AsyncEngine, engine: Engine) -> None:
        [event] = await collect(events, "a", GREEDY, begun("Hello", has_ended=True))
        assert isinstance(event.error, InvalidRequest) and event.error.param == "journal"
        with pytest.raises(ContextLengthExceeded):
            events.submit(
                "a", PROMPT, SamplingParams(max_tokens=NUM_KV_TOKENS), begun=begun("Hello")
            )
        assert text(await collect(events, "a", GREEDY, begun("H"))) == "Hello"

    run(check)


def test_a_long_journal_is_read_at_the_readers_pace() -> None:
    """More of it than a reader who falls behind is allowed: nothing is lost, and it goes on."""
    said = "Hello" * (MAX_PENDING // 5 + 20)

    async def check(events: AsyncEngine, engine: Engine) -> None:
        params = SamplingParams(temperature=0, max_tokens=len(said) + 30, min_tokens=9000)
        async with events.submit("a", PROMPT, params, begun=begun(said)) as stream:
            await asyncio.sleep(0)
            answer = [event async for event in stream]
        assert text(answer).startswith(said) and len(text(answer)) == len(said) + 30
        assert engine.num_held == 0 and engine.num_free_kv_tokens == NUM_KV_TOKENS

    run(check)


def test_an_engine_that_has_stopped_takes_none() -> None:
    async def check(events: AsyncEngine, engine: Engine) -> None:
        await events.stop()
        with pytest.raises(EngineStopped):
            events.submit("a", PROMPT, GREEDY, begun=begun("H"))

    run(check)
