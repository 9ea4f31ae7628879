"""Logprobs of answers and of prompts: the model's own, whatever shares the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sampler import Sampler
from chatserve.engine.sequence import SamplingParams, TokenEvent, TokenLogprobs
from chatserve.engine.speaker import Speaker
from chatserve.models.batch import Model
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model
from tests import tiny
from tests.unit.engine.scripted import ByteTokenizer, drain, scripted_engine

Told = Sequence[TokenLogprobs | None]

PROMPT = [*range(40, 140), 7, 7]


@pytest.fixture(scope="module", params=["torch", "kernels"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model[Any]:
    policy = choose_policy("cpu", "float32", load_8bit=request.param == "kernels")
    if request.param == "kernels" and policy.kernels is None:
        pytest.skip("the CPU kernels are not here")
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        return load_model(checkpoint, policy)


def build(model: Model[Any], **options: Any) -> Engine:
    return Engine(model, ByteTokenizer(), num_kv_tokens=40 * 32, **options)


def score(engine: Engine, prompt: list[int], **options: Any) -> list[TokenEvent]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 0, "prompt_logprobs": 3, **options})
    engine.add("scored", prompt, params)
    return drain(engine)["scored"]


def prompt_logprobs(events: list[TokenEvent]) -> list[TokenLogprobs | None]:
    return [told for event in events for told in event.prompt_logprobs]


def expected(model: Model[Any], prompt: list[int]) -> torch.Tensor:
    """(N, V) of what stands behind each token."""
    return torch.log_softmax(build(model).read(prompt).float(), dim=-1)


def is_same(model: Model[Any], told: Told, wanted: Told) -> bool:
    """To the bit where a row's logits do not depend on its neighbours."""
    if isinstance(model, KernelLlama):
        return told == wanted
    pairs = zip(told, wanted, strict=True)
    return all(
        a is b is None
        or (
            a is not None
            and b is not None
            and a.token_id == b.token_id
            and abs(a.logprob - b.logprob) < 1e-4
            and [id_ for id_, _ in a.top] == [id_ for id_, _ in b.top]
        )
        for a, b in pairs
    )


def test_a_prompt_is_scored_by_what_the_model_reads(model: Model[Any]) -> None:
    wanted = expected(model, PROMPT)
    events = score(build(model), PROMPT)
    told = prompt_logprobs(events)
    assert told[0] is None and len(told) == len(PROMPT)
    for position, entry in enumerate(told[1:]):
        assert entry is not None and entry.token_id == PROMPT[position + 1]
        assert entry.logprob == pytest.approx(float(wanted[position, entry.token_id]), abs=1e-4)
        assert entry.top[0][1] == pytest.approx(float(wanted[position].max()), abs=1e-4)
        assert len(entry.top) == 3
    assert events[-1].finish_reason == "length"
    assert events[-1].num_generated_tokens == 0
    assert not any(event.token_ids or event.text for event in events)


def test_scores_do_not_depend_on_chunks_neighbours_and_caches(model: Model[Any]) -> None:
    alone = prompt_logprobs(score(build(model), PROMPT))
    chunked = score(build(model, max_num_batched_tokens=7), PROMPT)
    assert is_same(model, prompt_logprobs(chunked), alone)
    busy = build(model)
    for name, length in {"a": 3, "b": 60}.items():
        busy.add(name, PROMPT[:length], SamplingParams(seed=1, max_tokens=30, ignore_eos=True))
    for _ in range(5):
        busy.step()
    assert is_same(model, prompt_logprobs(score(busy, PROMPT)), alone)
    # all of it is in the prefix cache now
    assert is_same(model, prompt_logprobs(score(busy, PROMPT)), alone)


def test_a_preempted_sequence_tells_each_score_once(model: Model[Any]) -> None:
    alone = prompt_logprobs(score(build(model), PROMPT))
    tight = Engine(model, ByteTokenizer(), num_kv_tokens=7 * 32, max_num_batched_tokens=16)
    endless = SamplingParams(seed=1, max_tokens=120, ignore_eos=True)
    tight.add("old", PROMPT[:60], endless)
    events = score(tight, PROMPT, max_tokens=60, ignore_eos=True)
    assert tight.num_preempted
    assert is_same(model, prompt_logprobs(events), alone)
    assert events[-1].num_generated_tokens == 60


def test_a_prompt_of_one_token_has_one_empty_score(model: Model[Any]) -> None:
    assert prompt_logprobs(score(build(model), [5])) == [None]
    assert prompt_logprobs(score(build(model), [5], max_tokens=3, ignore_eos=True)) == [None]


def test_choices_of_one_request_are_scored_each(model: Model[Any]) -> None:
    engine = build(model)
    params = SamplingParams(seed=1, max_tokens=4, prompt_logprobs=1, ignore_eos=True)
    for choice in range(3):
        engine.add(str(choice), PROMPT, params, choice=choice, group="one")
    answers = drain(engine)
    told = [prompt_logprobs(answers[str(choice)]) for choice in range(3)]
    assert len(told[0]) == len(PROMPT)
    assert is_same(model, told[1], told[0]) and is_same(model, told[2], told[0])


def test_an_answer_of_no_tokens_ends_at_once(model: Model[Any]) -> None:
    engine = build(model)
    engine.add("none", PROMPT[:65], SamplingParams(max_tokens=0))
    [event] = drain(engine)["none"]
    assert (event.finish_reason, event.token_ids, event.num_prompt_tokens) == ("length", (), 65)
    assert engine.num_free_kv_tokens == 40 * 32


ASKED = {
    "greedy": SamplingParams(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True),
    "drawn": SamplingParams(seed=3, top_p=0.9, max_tokens=12, logprobs=4, ignore_eos=True),
    "held back": SamplingParams(
        seed=4, frequency_penalty=1, repetition_penalty=1.2, logit_bias={9: 5.0}, max_tokens=12,
        logprobs=0, ignore_eos=True,
    ),
}  # fmt: skip


def answers(engine: Engine, names: list[str]) -> dict[str, list[tuple[int, TokenLogprobs]]]:
    for name in names:
        engine.add(name, PROMPT[:30], ASKED[name])
    return {
        name: [
            pair for event in events for pair in zip(event.token_ids, event.logprobs, strict=True)
        ]
        for name, events in drain(engine).items()
    }


def test_answers_are_told_as_they_are_alone(model: Model[Any]) -> None:
    together = answers(build(model), list(ASKED))
    for name, params in ASKED.items():
        alone = answers(build(model), [name])[name]
        assert [id_ for id_, _ in alone] == [id_ for id_, _ in together[name]]
        assert is_same(model, [told for _, told in alone], [told for _, told in together[name]])
        for token_id, told in together[name]:
            assert told.token_id == token_id and told.logprob <= 0
            assert params.logprobs is not None and len(told.top) <= params.logprobs
            assert sum(math.exp(value) for _, value in told.top) <= 1 + 1e-6
    assert all(told.top[0] == (id_, told.logprob) for id_, told in together["greedy"])


def test_logprobs_change_no_text(model: Model[Any]) -> None:
    told = answers(build(model), list(ASKED))
    engine = build(model)
    for name, params in ASKED.items():
        engine.add(name, PROMPT[:30], replace(params, logprobs=None))
    for name, events in drain(engine).items():
        assert not any(event.logprobs for event in events)
        assert [id_ for event in events for id_ in event.token_ids] == [
            id_ for id_, _ in told[name]
        ]


def test_without_kernels_the_same_is_told(
    model: Model[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(model, KernelLlama):
        pytest.skip("this network samples in PyTorch or in the kernels, after the step in both")
    with_kernels = answers(build(model), list(ASKED))
    engine = build(model)
    forbidden = [id_ for id_ in ByteTokenizer.forbidden_ids if id_ < model.vocab_size]
    sampler = Sampler(sorted(forbidden), None)
    monkeypatch.setattr(engine, "_sampler", sampler)
    monkeypatch.setattr(engine, "_speaker", Speaker(sampler, ByteTokenizer.eos_ids))
    for name, pairs in answers(engine, list(ASKED)).items():
        for (id_, told), (wanted_id, wanted) in zip(pairs, with_kernels[name], strict=True):
            assert id_ == wanted_id
            assert told.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_drafts_that_are_right_have_logprobs_too() -> None:
    engine, _ = scripted_engine("abcabcabcabcabc", speculation=True)
    engine.add("a", [1, 2, 3, 4], SamplingParams(temperature=0, max_tokens=64, logprobs=1))
    events = drain(engine)["a"]
    assert max(len(event.token_ids) for event in events) > 1
    for event in events:
        assert [told.token_id for told in event.logprobs] == list(event.token_ids)


def test_a_prompt_without_finite_logits_fails_alone() -> None:
    engine, model = scripted_engine("ab")
    model.nan_first_ids.add(9)
    engine.add("bad", [9, 2, 3, 4], SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0))
    engine.add("good", [1, 2, 3, 4], SamplingParams(temperature=0, prompt_logprobs=0))
    events = drain(engine)
    assert "finite" in str(events["bad"][-1].error)
    assert events["good"][-1].finish_reason == "stop"
