"""The engine that notes what it is asked: nothing is changed but a seed that was not given."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chatserve.engine.grammar import GrammarOrigin
from chatserve.engine.sequence import Begun, SamplingParams
from chatserve.errors import GenerationFailed, Overloaded
from chatserve.server.recording import RecordingEngine
from chatserve.server.replay_log import LoggedAnswer, ReplayLog, newest
from tests.fakes import FakeEngine, FakeModel, fake_adapter


def logged(
    path: Path, engine: FakeEngine, *requests: tuple[str, SamplingParams, dict[str, Any]]
) -> list[LoggedAnswer]:
    """What the log has of requests that are read to their end, oldest first."""

    async def main() -> None:
        for name, params, options in requests:
            stream = recording.submit(name, [1, 2], params, **options)
            events = [event async for event in stream]
            assert events[-1].is_last or engine.error
            await stream.aclose()

    with closing(ReplayLog(path)) as log:
        recording = RecordingEngine(engine, FakeModel(), log)
        asyncio.run(main())
    return newest(path, 100)[::-1]


def test_what_is_asked_and_said(tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.5, top_k=3, logit_bias={5: 1.0}, seed=9, max_tokens=4)
    engine = FakeEngine()
    [answer] = logged(tmp_path / "log.db", engine, ("id-1", params, {"salt": b"s"}))
    assert engine.submitted[0].params == params and engine.submitted[0].salt == b"s"
    assert (answer.id, answer.choice, answer.model) == ("id-1", 0, "fake")
    assert (answer.adapter, answer.fingerprint, answer.grammar) == (None, "fp_fake", None)
    assert (answer.prompt_ids, answer.token_ids) == ([1, 2], [0, 1, 2, 3])
    assert answer.finish_reason == "length"
    assert answer.sampling == {
        "temperature": 0.5, "top_p": 1.0, "top_k": 3, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {"5": 1.0},
        "min_tokens": 0, "ignore_eos": False, "seed": 9,
    }  # fmt: skip


def test_an_answer_that_was_begun_elsewhere_is_logged_whole(tmp_path: Path) -> None:
    params = SamplingParams(seed=9, max_tokens=4)
    begun = Begun(((0,), (1, 2)), ((), ()))
    engine = FakeEngine()
    [answer] = logged(tmp_path / "log.db", engine, ("id-1", params, {"begun": begun}))
    assert engine.submitted[0].begun == begun
    assert answer.token_ids == [0, 1, 2, 3] and answer.finish_reason == "length"


def test_choices_share_a_seed_that_was_drawn_and_prompts_do_not(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=4)
    engine = FakeEngine()
    requests = [("a-0", params, {"choice": 0}), ("a-0", params, {"choice": 1})]
    answers = logged(tmp_path / "log.db", engine, *requests, ("a-1", params, {}))
    seeds = [answer.sampling["seed"] for answer in answers]
    assert seeds == [each.params.seed for each in engine.submitted]
    assert seeds[0] == seeds[1] != seeds[2]


def test_an_adapter_and_its_fingerprint(tmp_path: Path) -> None:
    adapter = fake_adapter("law")
    params = SamplingParams(max_tokens=2)
    path = tmp_path / "log.db"
    answers = logged(path, FakeEngine(), ("a", params, {"adapter": adapter}), ("b", params, {}))
    assert [answer.adapter for answer in answers] == ["law", None]
    assert answers[0].fingerprint != answers[1].fingerprint


class Yes:
    origin = GrammarOrigin("choice", '["yes"]', after_space=True)

    def matcher(self) -> Any:
        raise AssertionError("the engine's own")


def test_what_it_had_to_match(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=2, grammar=Yes())
    [answer] = logged(tmp_path / "log.db", FakeEngine(), ("a", params, {}))
    assert answer.grammar == {"kind": "choice", "source": '["yes"]', "after_space": True}


def test_an_engine_that_fails(tmp_path: Path) -> None:
    engine = FakeEngine(error=GenerationFailed("broken"))
    [answer] = logged(tmp_path / "log.db", engine, ("a", SamplingParams(max_tokens=9), {}))
    assert answer.finish_reason is None and answer.token_ids == [0, 1, 2, 3, 4]


def test_what_says_nothing_is_not_logged(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    assert logged(path, FakeEngine(), ("a", SamplingParams(max_tokens=0), {})) == []
    with pytest.raises(Overloaded):
        logged(path, FakeEngine(refusal=Overloaded("full")), ("a", SamplingParams(), {}))
    assert newest(path, 1) == []


def test_the_rest_goes_to_the_engine(tmp_path: Path) -> None:
    engine = FakeEngine()
    with closing(ReplayLog(tmp_path / "log.db")) as log:
        recording = RecordingEngine(engine, FakeModel(), log)
        recording.start()
        assert engine.is_started and recording.stats() is engine.stats()
        assert recording.draw_seed() == 1000
        asyncio.run(recording.stop())
        assert engine.stopped.is_set()
