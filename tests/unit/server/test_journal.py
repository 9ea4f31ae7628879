"""Blocks of a journal: written and read again, they say the same."""

from __future__ import annotations

import asyncio
import math

import pytest

from chatserve.engine.sequence import Begun, SamplingParams, TokenEvent, TokenLogprobs
from chatserve.protocol.control import JournalStart
from chatserve.server import generation as generations
from chatserve.server.generation import Generation
from chatserve.server.journal import NO_JOURNAL, WrittenJournal, unit_block
from chatserve.server.preparation import Prepared, Prompt
from chatserve.server.resumption import read_journal
from tests.fakes import FakeEngine

START = JournalStart(
    id="cmpl-1", created=5, fingerprint="fp_1", prompts=["ab"], seeds=[-1], max_tokens=[9]
)


def event(*token_ids: int, before: int = 1, **fields: object) -> TokenEvent:
    count = before + len(token_ids)
    made = TokenEvent("s", token_ids=token_ids, num_generated_tokens=count)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_what_is_written_is_read() -> None:
    told = (TokenLogprobs(3, -0.1, ((3, -0.1), (4, -math.inf))), TokenLogprobs(4, -1.5e-7))
    events = [
        (1, event(7, before=0, num_cached_tokens=12)),
        (0, event(8, 9, before=0)),
        (1, event()),
        (1, event(3, 4, logprobs=told)),
        (0, event(49_151)),
        (1, event(finish_reason="stop")),
        (0, event(5, 6, finish_reason="length")),
    ]
    blocks = [WrittenJournal(START).begun(b""), *(unit_block(i, each) for i, each in events)]
    assert all(block.startswith(b":") and block.count(b"\n") == 2 for block in blocks)
    read = read_journal(b"".join(blocks).decode())
    assert read.start == START and read.order == [index for index, _ in events]
    assert read.begun == {
        0: Begun(((8, 9), (49_151,), (5, 6)), ((), (), ()), 0, has_ended=True),
        1: Begun(((7,), (), (3, 4), ()), ((), (), told, ()), 12, has_ended=True),
    }


def test_a_usual_token_is_said_in_a_few_bytes() -> None:
    assert unit_block(0, event(4711)) == b":t 0 4711\n\n"
    assert unit_block(3, event()) == b":t 3\n\n"
    assert unit_block(0, event(1, finish_reason="stop")) == b":f 0 1\n\n"
    # what was cached is told once
    assert unit_block(0, event(1, num_cached_tokens=4)) == b":t 0 1\n\n"


def test_without_a_journal_frames_are_made_by_nothing_else() -> None:
    def frame_of(index: int, each: TokenEvent) -> bytes:
        return b"frame"

    assert NO_JOURNAL.behind(frame_of) is frame_of
    assert NO_JOURNAL.begun(b"a") + NO_JOURNAL.ended(b"b") == b"ab"
    assert not NO_JOURNAL.headers


@pytest.mark.parametrize(("at_once", "num_turns"), [(1, 40), (10, 4)])
def test_a_long_journal_lets_other_streams_have_their_turn(
    at_once: int, num_turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations, "REPLAYED_AT_ONCE", at_once)
    blocks = b"".join(unit_block(0, event(i, before=i)) for i in range(40))
    read = read_journal((WrittenJournal(START).begun(b"") + blocks).decode())
    prompt = Prompt((1,), SamplingParams(max_tokens=50))
    prepared = Prepared("m", (prompt,), 1, False, True, False, False)

    async def main() -> tuple[int, int]:
        fed, turns = [], 0

        async def another() -> None:
            nonlocal turns
            while len(fed) < 40:
                turns += 1
                await asyncio.sleep(0)

        generation = await Generation.submit(FakeEngine(["x"] * 50), "a", prepared, resumption=read)
        other = asyncio.create_task(another())
        await generation.replay(read, lambda index, each: fed.append(each))
        await other
        await generation.aclose()
        return len(fed), turns

    num_fed, turns = asyncio.run(main())
    assert num_fed == 40 and num_turns - 1 <= turns <= num_turns + 1
