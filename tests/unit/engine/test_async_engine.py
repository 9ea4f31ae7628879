"""Where the engine thread meets asyncio: order, cancellation, overload, death."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.engine.token_stream import MAX_PENDING, TokenStream
from chatserve.errors import ContextLengthExceeded, GenerationFailed, Overloaded
from tests.unit.engine.scripted import GREEDY, NUM_KV_TOKENS, Scripted, scripted_engine, text

ENDLESS = SamplingParams(temperature=0, max_tokens=5000, ignore_eos=True)
PROMPT = [0, 1, 2, 3]


def run(
    test: Callable[[AsyncEngine, Engine, Scripted], Awaitable[None]],
    script: str = "Hello",
    **options: int,
) -> None:
    async def main() -> None:
        limits = {"max_num_seqs": 16, "max_num_waiting": 64, **options}
        engine, model = scripted_engine(script, max_num_seqs=limits["max_num_seqs"])
        async_engine = AsyncEngine(engine, **limits)
        async_engine.start()
        try:
            async with asyncio.timeout(30):
                await test(async_engine, engine, model)
        finally:
            await async_engine.stop()

    asyncio.run(main())


async def collect(events: AsyncEngine, name: str) -> list[TokenEvent]:
    async with events.submit(name, PROMPT, GREEDY) as stream:
        return [event async for event in stream]


def test_many_requests_at_once_get_their_own_text() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        answers = await asyncio.gather(*(collect(events, str(index)) for index in range(40)))
        assert {text(answer) for answer in answers} == {"Hello"}
        stats = events.stats()
        assert (stats.num_running, stats.num_waiting, stats.free_kv_tokens) == (0, 0, NUM_KV_TOKENS)
        assert stats.tick >= 6
        while events.stats().last_token_age_s:
            await asyncio.sleep(0)  # the thread is about to fall asleep

    run(check)


def test_closing_the_stream_aborts_the_sequence() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        async with events.submit("a", PROMPT, ENDLESS) as stream:
            await anext(stream)
        # commands run in order: when this answer is there, the abort has happened
        await collect(events, "b")
        assert engine.num_free_kv_tokens == NUM_KV_TOKENS

    run(check)


def test_a_stream_that_was_never_read_can_be_closed() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        await events.submit("a", PROMPT, ENDLESS).aclose()
        await collect(events, "b")
        assert engine.num_free_kv_tokens == NUM_KV_TOKENS

    run(check)


def test_a_cancelled_reader_aborts() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        started = asyncio.Event()

        async def read() -> None:
            async with events.submit("a", PROMPT, ENDLESS) as stream:
                async for _ in stream:
                    started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await collect(events, "b")
        assert engine.num_free_kv_tokens == NUM_KV_TOKENS

    run(check)


def test_a_full_queue_is_refused_at_the_call() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        first = events.submit("a", PROMPT, ENDLESS)
        await anext(first)
        waiting = events.submit("b", PROMPT, ENDLESS)
        with pytest.raises(Overloaded):
            events.submit("c", PROMPT, ENDLESS)
        await waiting.aclose()
        await first.aclose()

    run(check, max_num_seqs=1, max_num_waiting=1)


def test_a_request_that_never_fits_is_refused_at_the_call() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        with pytest.raises(ContextLengthExceeded):
            events.submit("a", [1] * 9_999, ENDLESS)

    run(check)


def test_stop_ends_open_streams_with_an_error() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        stream = events.submit("a", PROMPT, ENDLESS)
        await anext(stream)
        await events.stop()
        rest = [event async for event in stream]
        assert isinstance(rest[-1].error, GenerationFailed)
        with pytest.raises(GenerationFailed):
            events.submit("b", PROMPT, GREEDY)

    run(check)


def test_a_dead_engine_thread_tells_every_stream_and_the_statistics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Bug(BaseException):
        pass

    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        model.failures[0] = Bug("bug")  # type: ignore[assignment]
        answer = await collect(events, "a")
        assert isinstance(answer[-1].error, GenerationFailed)
        assert not events.stats().is_alive
        with pytest.raises(GenerationFailed):
            events.submit("b", PROMPT, GREEDY)

    run(check)
    assert "the engine thread died" in caplog.text


def test_the_thread_sleeps_while_there_is_nothing_to_do() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        await collect(events, "a")
        waits = []
        wait = events._wake.wait
        events._wake.wait = lambda: waits.append(1) or wait()  # type: ignore[method-assign,func-returns-value]
        for name in "bcd":
            await collect(events, name)
        # at most one sleep between two answers: it is woken, it does not poll
        assert len(waits) <= 3

    run(check)


def test_more_requests_at_once_than_may_run_wait_without_being_refused() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        streams = [events.submit(str(index), PROMPT, GREEDY) for index in range(2 + 5)]
        with pytest.raises(Overloaded, match="5 requests are waiting already, the limit is 5"):
            events.submit("one too many", PROMPT, GREEDY)
        answers = await asyncio.gather(*(drain(stream) for stream in streams))
        assert {text(answer) for answer in answers} == {"Hello"}

    async def drain(stream: TokenStream) -> list[TokenEvent]:
        return [event async for event in stream]

    run(check, max_num_seqs=2, max_num_waiting=5)


def test_a_long_prefill_counts_as_progress() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        stream = events.submit("a", [1] * 5000, replace(ENDLESS, max_tokens=4000))
        first = events.stats()
        await anext(stream)
        ages = events.stats()
        assert ages.tick >= 5000 // 512 and ages.last_token_age_s < 10
        assert first.num_waiting == 1 and ages.num_running == 1
        await stream.aclose()

    run(check)


def test_choices_share_their_prompt_and_salts_keep_beginnings_apart() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        prompt = [7] * 100

        async def cached(name: str, choice: int = 0, salt: bytes = b"") -> int:
            stream = events.submit(name, prompt, GREEDY, choice=choice, salt=salt)
            async with stream:
                return [event async for event in stream][-1].num_cached_tokens

        assert await asyncio.gather(*(cached("a", choice) for choice in range(3))) == [0, 99, 99]
        assert await cached("b") == 96
        assert await cached("c", salt=b"key") == 0
        assert await cached("d", salt=b"key") == 96
        assert model.num_computed_tokens < 3 * 100 + 300

    run(check)


def test_places_in_the_queue_are_known_while_a_step_runs() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        async with events.submit("a", PROMPT, ENDLESS) as first:
            await anext(first)
            waiting = [events.submit(name, PROMPT, ENDLESS) for name in "bc"]
            while waiting[1].place is None:
                await anext(first)
            assert [each.place for each in (first, *waiting)] == [None, 1, 2]
            for each in waiting:
                await each.aclose()
            while waiting[1].place is not None:
                await anext(first)

    run(check, max_num_seqs=1)


def test_keys_are_told_apart_when_the_queue_is_full() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        streams = [events.submit(f"a{n}", PROMPT, ENDLESS, salt=b"a") for n in range(6)]
        with pytest.raises(Overloaded):
            events.submit("a6", PROMPT, ENDLESS, salt=b"a")
        streams.append(events.submit("b", PROMPT, ENDLESS, salt=b"b"))
        for stream in streams:
            await stream.aclose()
        # every place is free again
        again = [events.submit(f"c{n}", PROMPT, GREEDY) for n in range(6)]
        for stream in again:
            assert text([event async for event in stream]) == "Hello"
        assert not events.admission.num_waiting and not events.admission._total

    run(check, max_num_seqs=2, max_num_waiting=4)


def test_places_come_back_however_a_sequence_ends() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        model.failures[9] = RuntimeError("planted")
        await collect(events, "a")
        failing = [9, 1, 2, 3]
        assert [e async for e in events.submit("b", failing, GREEDY)][-1].error is not None
        await events.submit("c", PROMPT, ENDLESS).aclose()
        left = events.submit("d", PROMPT, ENDLESS)
        await events.stop()
        await left.aclose()
        assert events.admission._total == 0 and not events.admission._counts

    run(check)


def test_a_reader_who_falls_behind_is_waited_for_and_nothing_is_lost() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        slow = events.submit("slow", PROMPT, ENDLESS)
        quick = events.submit("quick", PROMPT, replace(ENDLESS, max_tokens=4000))
        texts = []
        async for event in quick:
            texts.append(event.text)
        # it has had all the time it takes to say its 5,000 tokens
        assert slow.is_held and MAX_PENDING <= len(slow._events) < 2 * MAX_PENDING
        # nothing runs and nothing is late
        while events.stats().last_token_age_s:
            await asyncio.sleep(0)
        stats = events.stats()
        assert (stats.num_running, stats.num_waiting, engine.num_held) == (0, 0, 1)
        said = [event async for event in slow]
        assert said[-1].num_generated_tokens == 5000 and not slow.is_held
        assert text(said).startswith("".join(texts)) and len(text(said)) > 4000
        assert engine.num_free_kv_tokens == NUM_KV_TOKENS

    run(check)


def test_closing_a_held_stream_frees_all_of_it() -> None:
    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        slow = events.submit("slow", PROMPT, ENDLESS)
        async with events.submit("quick", PROMPT, ENDLESS) as quick:
            while not slow.is_held:
                await anext(quick)
        await slow.aclose()
        await collect(events, "b")
        assert engine.num_free_kv_tokens == NUM_KV_TOKENS and engine.num_held == 0
        assert events.admission._total == 0

    run(check)
