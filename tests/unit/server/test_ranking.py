"""What a reward model reads of a request, and what it cannot be asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chatserve.engine.reward import Reward
from chatserve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from chatserve.server.embedding_preparation import PreparedRating, prepare_score
from chatserve.server.preparation import Prepared, prepare_chat, prepare_completion
from chatserve.server.ranking import Ranking
from chatserve.server.rating import sigmoid
from tests.fakes import FakeAdapters, FakeModel, fake_adapter

REWARD = Reward(np.array([1.0, 0.0, 0.0, 0.0]), "Q:{question} A:{answer}!", (7,))
USER = {"role": "user", "content": "why"}


class Rewards(FakeAdapters):
    """`rm` rates, `poet` writes."""

    def __init__(self) -> None:
        super().__init__("poet")
        self._loaded = {**self._loaded, "rm": replace(fake_adapter("rm"), reward=REWARD)}


MODEL = FakeModel(adapters=Rewards(), context_length=100)


def chat(served: FakeModel = MODEL, /, *messages: Any, **fields: Any) -> Prepared:
    body = {"model": "fake", "messages": messages or [USER], "n": 2, "rank_by": "rm", **fields}
    return prepare_chat(json.dumps(body).encode(), served)


def ranking(prepared: Prepared) -> Ranking:
    assert prepared.ranking is not None
    return prepared.ranking


def completion(served: FakeModel = MODEL, /, **fields: Any) -> Prepared:
    body = {"model": "fake", "prompt": "Q:a A:", "n": 2, "rank_by": "rm", **fields}
    return prepare_completion(json.dumps(body).encode(), served)


def rated(prepared: Prepared, answer: str = "so", place: int = 0) -> bytes:
    """The text, between the fake tokenizer's BOS and what ends it."""
    start, *ids, end = ranking(prepared).ids(place, answer, MODEL)
    assert (start, end) == (0, 7)
    return bytes(ids)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_question_and_its_answer() -> None:
    assert rated(chat()) == b"Q:why A:so!"
    assert rated(chat(MODEL, message("system", "be kind"), USER)) == b"Q:why A:so!"
    assert chat(rank_by="fake:rm").ranking is not None
    assert chat(model="fake:poet").ranking is not None
    assert chat(rank_by=None).ranking is None


def test_earlier_turns_have_the_same_form() -> None:
    turns = [USER, message("assistant", "so"), message("user", "and"), message("user", "then")]
    assert rated(chat(MODEL, *turns)) == b"Q:why A:so!\n\nQ:and\n\nthen A:so!"


def test_an_answer_that_has_begun_is_rated_whole() -> None:
    begun = chat(MODEL, USER, message("assistant", "well, "), continue_final_message=True)
    assert rated(begun) == b"Q:why A:well, so!"


def test_turns_that_gave_way_are_not_rated() -> None:
    model = replace(MODEL, context_length=40)
    turns = [message("user", "x" * 60), message("assistant", "y"), USER]
    prepared = chat(model, *turns, truncation="rolling", max_tokens=2)
    assert prepared.rolled is not None and prepared.rolled.messages_dropped == (0, 1)
    assert rated(prepared) == b"Q:why A:so!"


def test_a_completion_is_rated_as_it_stands() -> None:
    prepared = completion(prompt=["Q:a A:", [3, 4, 5]])
    assert rated(prepared) == b"Q:a A:so"
    assert ranking(prepared).ids(1, "so", MODEL) == (3, 4, 5, *b"so", 7)


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"rank_by": "other"}, InvalidRequest, "'other' is no reward model here; there is rm"),
        ({"rank_by": "fake:no"}, InvalidRequest, "'fake:no' is no reward model here; there is rm"),
        ({"rank_by": "poet"}, InvalidRequest, "an adapter that writes, no reward model"),
        ({"n": 1}, InvalidRequest, "rank_by ranks several answers.*2 to 8"),
        ({"n": None}, InvalidRequest, "rank_by ranks several answers"),
        ({"stream": True}, UnsupportedParameter, "rank_by cannot be streamed.*leave stream out"),
        ({"rank_by": ""}, InvalidRequest, "rank_by"),
        ({"rank_by": 7}, InvalidRequest, "rank_by must be a text"),
    ],
)
def test_refused(fields: dict[str, Any], kind: Any, reason: str) -> None:
    for prepare in (chat, completion):
        with pytest.raises(kind, match=reason) as caught:
            prepare(**fields)
        assert caught.value.param == "rank_by"


def test_without_a_reward_model_the_way_to_one_is_told() -> None:
    with pytest.raises(InvalidRequest, match="there is none: start the server with --reward-adapt"):
        chat(FakeModel())


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "content": "1", "tool_call_id": "c"}


def test_calls_of_tools_are_not_rated() -> None:
    with pytest.raises(UnsupportedParameter, match="leave tools out"):
        chat(tools=[TOOL])
    assert chat(tools=[TOOL], tool_choice="none").ranking is not None
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    with pytest.raises(UnsupportedParameter, match=r"messages\[1\] is of a tool"):
        chat(MODEL, USER, called, RESULT, USER)


@pytest.mark.parametrize(
    "messages",
    [
        [message("system", "x")],
        [message("assistant", "x"), USER],
        [USER, message("assistant", "x")],
    ],
)
def test_a_chat_without_a_question(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="rates answers to questions"):
        chat(MODEL, *messages)


def test_no_answers_to_rank() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        completion(max_tokens=0)


def test_answers_get_the_room_that_they_are_rated_in() -> None:
    # of 100: BOS, `Q:` … ` A:` … `!`, and what ends it
    question = "x" * 80
    beside = 100 - (1 + len(f"Q:{question} A:!") + 1)
    asked = chat(MODEL, message("user", question), max_tokens=beside)
    assert asked.prompts[0].params.max_tokens == beside
    with pytest.raises(ContextLengthExceeded, match=f"max_tokens is {beside + 1}.*{beside} of 100"):
        chat(MODEL, message("user", question), max_tokens=beside + 1)
    assert chat(MODEL, message("user", question)).prompts[0].params.max_tokens <= beside
    with pytest.raises(ContextLengthExceeded, match="reads the question in 100 tokens"):
        chat(MODEL, message("user", "x" * 92))
    long = completion(prompt="x" * 90)
    assert long.prompts[0].params.max_tokens == 100 - 92


def test_an_answer_that_does_not_fit_is_not_cut() -> None:
    found = ranking(chat())
    fits = "x" * (100 - len(found.ids(0, "", MODEL)))
    assert len(found.ids(0, fits, MODEL)) == 100
    with pytest.raises(ContextLengthExceeded, match="an answer has 101 tokens as rm reads it"):
        found.ids(0, fits + "x", MODEL)


def test_only_rewards_need_no_logprobs_to_choose_by() -> None:
    assert chat(best_of=4).prompts[0].params.logprobs is None
    by_logprobs = chat(rank_by=None, n=1, best_of=4)
    assert by_logprobs.prompts[0].params.logprobs == 0
    assert (by_logprobs.num_choices, by_logprobs.num_dropped) == (4, 3)
    assert not by_logprobs.shows_logprobs


def test_a_reward_model_writes_nothing() -> None:
    for prepare in (chat, completion):
        with pytest.raises(UnsupportedParameter, match='ask fake with rank_by: "rm"') as caught:
            prepare(model="fake:rm", rank_by=None)
        assert caught.value.param == "model"


# ---- /v1/score ----


def score(served: FakeModel = MODEL, /, **fields: Any) -> PreparedRating:
    body = {"model": "fake:rm", "text_1": "why", "text_2": ["so", "no", "so"], **fields}
    prepared = prepare_score(json.dumps(body).encode(), served)
    assert isinstance(prepared, PreparedRating)
    return prepared


def test_pairs_for_a_reward_model_are_computed_once_each() -> None:
    prepared = score()
    assert prepared.pooled.prompts == ((0, *b"Q:why A:so!", 7), (0, *b"Q:why A:no!", 7))
    assert prepared.pooled.params.pooling == "last" and prepared.shares_beginning
    states = [np.array([each, 9, 9, 9], np.float32) for each in (-2, 3)]
    assert prepared.scores(states) == [-2, 3, -2]
    activated = score(use_activation=True).scores(states)
    assert activated == [sigmoid(-2), sigmoid(3), sigmoid(-2)]
    both = score(text_1=["a", "b"], text_2=["c", "d"])
    assert both.pooled.prompts == ((0, *b"Q:a A:c!", 7), (0, *b"Q:b A:d!", 7))
    assert not both.shares_beginning


def test_a_sigmoid_of_any_score() -> None:
    assert (sigmoid(0), sigmoid(1e4), sigmoid(-1e4)) == (0.5, 1, 0)
    assert sigmoid(2) == pytest.approx(1 - sigmoid(-2)) == pytest.approx(0.880797)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"text_2": ["so", "x" * 90]}, "text_2", r"text_2\[1\] with its question has 101 tokens"),
        ({"text_2": "x" * 1700}, "text_2", "text_2 with its question has 1,709 bytes"),
        ({"text_2": ["so", ""]}, "text_2", r"text_2\[1\] is empty"),
        ({"text_1": ""}, "text_1", "text_1 is empty"),
        ({"text_2": ["x"] * 2049}, "text_2", "1 to 2,048 entries, it has 2,049"),
        ({"text_1": ["a", "b"]}, "text_1", "text_1 has 2 texts and text_2 3"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "rates whole texts"),
        ({"pooling": "mean"}, "pooling", "rates whole texts"),
        ({"model": "fake", "use_activation": True}, "use_activation", "is for reward models"),
    ],
)
def test_scores_that_are_refused(fields: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        score(**fields)
    assert caught.value.param == param
