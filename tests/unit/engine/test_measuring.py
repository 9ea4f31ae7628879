"""What the engine's thread and the event loop count of sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import Begun
from chatserve.meter import HistogramName, Meter
from tests.unit.engine.scripted import GREEDY, Scripted
from tests.unit.engine.test_async_engine import ENDLESS, PROMPT, collect, run


def count(meter: Meter, name: HistogramName) -> int:
    return sum(meter.histograms[name].counts)


def measured(
    test: Callable[[AsyncEngine], Awaitable[None]], *, script: str = "Hello", **options: int
) -> Meter:
    meters: list[Meter] = []

    async def check(events: AsyncEngine, engine: Engine, model: Scripted) -> None:
        meters.append(events.meter)
        await test(events)

    run(check, script, **options)
    return meters[0]


def test_an_answer_counts_once_of_everything() -> None:
    async def check(events: AsyncEngine) -> None:
        await collect(events, "a")

    meter = measured(check)
    # five letters, and the token that ends them
    assert (meter.prompt_tokens, meter.generation_tokens) == (len(PROMPT), 6)
    assert meter.outcomes["stop"] == sum(meter.outcomes.values()) == 1
    assert count(meter, "time_to_first_token") == count(meter, "queue_time") == 1
    assert count(meter, "inter_token_latency") == 5
    assert count(meter, "e2e_latency") == count(meter, "time_per_output_token") == 1
    assert count(meter, "step_time") >= 6
    assert meter.histograms["e2e_latency"].sum >= meter.histograms["time_to_first_token"].sum


def test_all_that_wait_are_timed_once() -> None:
    async def check(events: AsyncEngine) -> None:
        await asyncio.gather(*(collect(events, str(index)) for index in range(20)))

    meter = measured(check, max_num_seqs=2)
    assert count(meter, "queue_time") == count(meter, "time_to_first_token") == 20
    assert meter.histograms["queue_time"].sum <= meter.histograms["time_to_first_token"].sum


def test_a_prompt_of_several_choices_counts_once() -> None:
    async def check(events: AsyncEngine) -> None:
        streams = [events.submit("a", PROMPT, GREEDY, choice=choice) for choice in range(3)]
        for stream in streams:
            async with stream:
                assert [event async for event in stream][-1].finish_reason == "stop"

    meter = measured(check)
    assert (meter.prompt_tokens, meter.generation_tokens) == (len(PROMPT), 18)
    assert meter.outcomes["stop"] == 3


def test_who_leaves_is_counted_as_that() -> None:
    async def check(events: AsyncEngine) -> None:
        async with events.submit("a", PROMPT, ENDLESS) as stream:
            await anext(stream)
        await collect(events, "b")

    meter = measured(check)
    assert (meter.outcomes["abort"], meter.outcomes["stop"]) == (1, 1)
    assert count(meter, "e2e_latency") == 1


def test_a_reader_who_pauses_makes_no_token_late() -> None:
    async def check(events: AsyncEngine) -> None:
        async with events.submit("a", PROMPT, replace(ENDLESS, max_tokens=1500)) as stream:
            while not stream.is_held:
                await asyncio.sleep(0.001)
            assert [event async for event in stream][-1].finish_reason == "length"

    meter = measured(check, script="Hello" * 400)
    assert meter.generation_tokens == 1500
    # one gap at each pause is left out, and so is the mean of an answer with any
    assert 1400 < count(meter, "inter_token_latency") < 1499
    assert count(meter, "time_per_output_token") == 0


@pytest.mark.parametrize("num_said", [0, 2])
def test_what_was_said_elsewhere_is_not_counted_here(num_said: int) -> None:
    ids: list[int] = []

    async def check(events: AsyncEngine) -> None:
        first = await collect(events, "a")
        ids.extend(token_id for event in first for token_id in event.token_ids)
        meter = events.meter
        before = (meter.prompt_tokens, meter.generation_tokens)
        said = tuple((token_id,) for token_id in ids[:num_said])
        begun = Begun(said, ((),) * num_said)
        async with events.submit("b", PROMPT, GREEDY, begun=begun) as stream:
            again = [event async for event in stream]
        assert sum(len(event.token_ids) for event in again) == 6
        assert meter.generation_tokens - before[1] == 6 - num_said
        assert meter.prompt_tokens - before[0] == (0 if num_said else len(PROMPT))

    meter = measured(check)
    assert count(meter, "time_to_first_token") == (1 if num_said else 2)
