"""The best of several answers by a reward model on the same base, behind a real controller, worker
and engine, asked by the real client; its scores are PEFT's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from chatserve.config import WorkerConfig
from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.reward import Reward
from chatserve.engine.sequence import LoadedAdapter
from chatserve.engine.serving import load
from chatserve.errors import GenerationFailed, ModelLoadError, Overloaded, UsageError
from chatserve.models.form import choose_kernels
from chatserve.models.packing import FINE
from chatserve.protocol.control import bearer
from chatserve.server.contract import ServedModel
from chatserve.server.rating import RATING, rated_ids
from chatserve.server.worker import create_worker_app
from tests import adapters, rewards, tiny
from tests.fakes import FakeAdapters, FakeEngine, FakeModel, FakeStream, fake_adapter
from tests.integration.test_adapters import ENDLESS, KEY, TOKEN, WAIT_S, House
from tests.servers import RunningServer, http_request, send_raw, serving

QUESTION = "Why is the sky blue? " * 4
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": QUESTION}]
ANSWERS = ("Because of its air.", "No idea, sorry. " * 20, "42")
BEFORE = f"Question: {QUESTION}\n\nAnswer: "
ASKED: Any = {
    "model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 5, "logit_bias": ENDLESS,
}  # fmt: skip


@dataclass(frozen=True)
class Street:
    """A controller with a worker that has the reward model, and one that has not."""

    house: House
    base: Path
    adapter: Path
    engine: AsyncEngine
    model: ServedModel

    @property
    def rm(self) -> LoadedAdapter:
        return self.model.adapters.loaded()["rm"]

    def by_peft(self, *answers: str) -> list[float]:
        return rewards.by_peft(self.base, self.adapter, [BEFORE + answer for answer in answers])


def config(base: Path, *rm: str, **options: Any) -> WorkerConfig:
    return WorkerConfig(
        weights=str(base), device="cpu", model_names=("tiny",), reward_adapter=rm,
        **{"dtype": "float32", **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranking")
    tiny.save_model(folder / "base", max_position_embeddings=1024)
    rewards.write(folder / "rm")
    return folder


@pytest.fixture(scope="module")
def street(folder: Path) -> Iterator[Street]:
    base, adapter = folder / "base", folder / "rm"
    with ExitStack() as stack:
        house = House(stack, "tiny")
        house.add("plain", *load(config(base)))
        engine, model = load(config(base, f"rm={adapter}"))
        house.add("rates", engine, model)
        yield Street(house, base, adapter, engine, model)


@pytest.fixture(scope="module")
def client(street: Street) -> Iterator[openai.OpenAI]:
    url = f"{street.house.controller.url}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=WAIT_S) as client:
        yield client


def score(client: openai.OpenAI, answers: Any, **fields: Any) -> list[float]:
    body = {"model": "tiny:rm", "text_1": QUESTION, "text_2": answers, **fields}
    reply: Any = client.post("/score", cast_to=object, body=body)
    assert [each["index"] for each in reply["data"]] == list(range(len(reply["data"])))
    return [each["score"] for each in reply["data"]]


def scores_of(choices: Sequence[Any]) -> list[float]:
    assert [choice.index for choice in choices] == list(range(len(choices)))
    return [choice.score for choice in choices]


def test_the_best_comes_first_with_pefts_scores(street: Street, client: openai.OpenAI) -> None:
    for _ in range(2):  # the workers take turns, but one of them cannot rank
        reply = client.chat.completions.create(**ASKED, n=4, extra_body={"rank_by": "rm"})
    scores = scores_of(reply.choices)
    texts = [choice.message.content or "" for choice in reply.choices]
    assert len(set(texts)) == 4 and scores == sorted(scores, reverse=True)
    assert scores == pytest.approx(street.by_peft(*texts), abs=1e-4)
    assert scores == pytest.approx(score(client, texts), abs=1e-6)
    assert reply.model == "tiny" and reply.usage is not None
    assert reply.usage.completion_tokens == 4 * 24
    extra = reply.usage.model_extra or {}
    assert extra["ranking_tokens"] == sum(len((BEFORE + text).encode()) for text in texts)


def test_the_best_of_more_are_returned(client: openai.OpenAI) -> None:
    extra = {"rank_by": "tiny:rm", "best_of": 4}
    all_ranked = client.chat.completions.create(**ASKED, n=4, extra_body={"rank_by": "rm"})
    two = client.chat.completions.create(**ASKED, n=2, extra_body=extra)
    one = client.chat.completions.create(**ASKED, extra_body=extra)
    for reply in (two, one):
        best = all_ranked.choices[: len(reply.choices)]
        assert [each.message for each in reply.choices] == [each.message for each in best]
        assert scores_of(reply.choices) == pytest.approx(scores_of(best), abs=1e-6)
    assert one.usage is not None and one.usage.completion_tokens == 4 * 24
    without = client.chat.completions.create(**ASKED, n=4)
    assert {each.message.content for each in without.choices} == {
        each.message.content for each in all_ranked.choices
    }, "the same answers, only their order is another"
    assert "score" not in (without.choices[0].model_extra or {})


def test_completions_are_ranked_for_each_prompt(street: Street, client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tiny", prompt=[BEFORE, "Question: x\n\nAnswer: "], n=2, max_tokens=8, seed=1,
        echo=True, logit_bias=ENDLESS, extra_body={"rank_by": "rm"},
    )  # fmt: skip
    scores = scores_of(reply.choices)
    texts = [choice.text for choice in reply.choices]
    assert all(text.startswith("Question: ") for text in texts)
    assert scores == pytest.approx(rewards.by_peft(street.base, street.adapter, texts), abs=1e-4)
    assert scores[0] >= scores[1] and scores[2] >= scores[3]


def test_scores_of_pairs_and_lists(street: Street, client: openai.OpenAI) -> None:
    expected = street.by_peft(*ANSWERS)
    assert score(client, list(ANSWERS)) == pytest.approx(expected, abs=1e-4)
    assert score(client, ANSWERS[0]) == pytest.approx(expected[:1], abs=1e-4)
    pairs = score(client, list(ANSWERS), text_1=[QUESTION] * 3)
    assert pairs == pytest.approx(expected, abs=1e-4)
    activated = score(client, list(ANSWERS), use_activation=True)
    assert activated == pytest.approx(1 / (1 + np.exp(-np.array(expected))), abs=1e-4)


def test_the_reward_model_is_listed_and_writes_nothing(client: openai.OpenAI) -> None:
    card = client.models.retrieve("tiny:rm").to_dict()
    about: Any = card["chatserve"]
    assert card["parent"] == "tiny" and about["reward_model"] and about["embeddings_only"]
    with pytest.raises(openai.BadRequestError, match='rank_by: "rm"') as caught:
        client.chat.completions.create(**ASKED | {"model": "tiny:rm"})
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2, "extra_body": {"rank_by": "other"}}, "no reward model here; there is"),
        ({"n": 1, "extra_body": {"rank_by": "rm"}}, "ranks several answers"),
        ({"n": 2, "stream": True, "extra_body": {"rank_by": "rm"}}, "cannot be streamed"),
        ({"n": 2, "max_tokens": 990, "extra_body": {"rank_by": "rm"}}, "max_tokens"),
    ],
)
def test_refused(client: openai.OpenAI, fields: Any, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.chat.completions.create(**ASKED | fields)


def test_the_question_is_computed_once_to_answer_and_once_to_rate(
    street: Street, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[str, int] = {}
    scheduler = street.engine.engine._scheduler
    complete = scheduler.complete

    def note(item: Any, num_accepted: int = 0) -> None:
        sequence = item.sequence
        left = max(0, sequence.num_prompt_tokens - sequence.num_computed)
        computed[sequence.seq_id] = computed.get(sequence.seq_id, 0) + min(left, item.num_tokens)
        complete(item, num_accepted)

    monkeypatch.setattr(scheduler, "complete", note)
    question = "How is it new? " * 8
    messages = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(
        **ASKED | {"messages": messages}, n=4, extra_body={"rank_by": "rm"}
    )
    assert reply.usage is not None
    said = [num for seq_id, num in computed.items() if "-rank" not in seq_id]
    assert sorted(said) == [1, 1, 1, reply.usage.prompt_tokens]
    rated = sorted(num for seq_id, num in computed.items() if "-rank" in seq_id)
    asked = len(f"Question: {question}\n\nAnswer: ".encode())
    assert len(rated) == 4 and rated[-1] > asked
    whole = (reply.usage.model_extra or {})["ranking_tokens"]
    # whole blocks of 32 tokens are found again
    assert sum(rated) == whole - 3 * (asked // 32 * 32)


def test_nothing_is_left_of_them(street: Street, client: openai.OpenAI) -> None:
    engine = street.engine.engine
    worker = street.house.registry._workers["rates"].base_url
    body = {**ASKED, "n": 4, "max_tokens": 600, "rank_by": "rm"}
    tick = street.engine.stats().tick
    port = int(worker.rpartition(":")[2])
    request = http_request("POST", "/v1/chat/completions", body, headers=dict(bearer(TOKEN)))
    with send_raw(port, request):
        street.house.wait_for(lambda: street.engine.stats().tick > tick)
    street.house.wait_for(lambda: not (engine.num_running or engine.num_waiting))
    assert engine.num_free_kv_tokens == engine.num_kv_tokens
    assert not street.engine._streams


@pytest.mark.parametrize("kernels", ["", "off"])
@pytest.mark.parametrize("form", ["float32", "8 bits"])
def test_scores_in_every_form_of_the_base(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, form: str
) -> None:
    if kernels == "off":
        monkeypatch.setenv("CHATSERVE_KERNELS", kernels)
    elif choose_kernels(FINE)[0] is None:
        pytest.skip("no kernels for this processor")
    form_options = (
        {"dtype": "float32"} if form == "float32" else {"dtype": "auto", "load_8bit": True}
    )
    engine, model = load(config(folder / "base", f"rm={folder / 'rm'}", **form_options))
    assert bool(model.description["kernels"]) == (form == "8 bits" and kernels == "")
    rm = model.adapters.loaded()["rm"]
    assert rm.reward is not None
    for place, answer in enumerate(ANSWERS):
        ids = rated_ids(model, rm.reward, rm.reward.text(QUESTION, answer))
        engine.engine.add(str(place), ids, RATING, adapter=rm)
    scores = {}
    while engine.engine.has_work:
        for event in engine.engine.step():
            if event.embedding is not None:
                scores[int(event.seq_id)] = rm.reward.score(event.embedding)
    texts = [BEFORE + answer for answer in ANSWERS]
    expected = rewards.by_peft(folder / "base", folder / "rm", texts)
    # float32 is exact; eight bits of a random network are about 0.02 off, the adapter moves 0.5
    tolerance = 1e-4 if form == "float32" else 0.1
    assert [scores[place] for place in range(3)] == pytest.approx(expected, abs=tolerance)


def test_texts_that_end_as_in_training(folder: Path, tmp_path: Path) -> None:
    rewards.write(tmp_path / "rm", record={"ends_with": "<|im_end|>"})
    engine, model = load(config(folder / "base", f"rm={tmp_path / 'rm'}"))
    rm = model.adapters.loaded()["rm"]
    assert rm.reward is not None
    engine.engine.add("a", rated_ids(model, rm.reward, BEFORE + "so"), RATING, adapter=rm)
    [event] = [event for event in engine.engine.step() if event.is_last]
    [expected] = rewards.by_peft(folder / "base", tmp_path / "rm", [BEFORE + "so"], ends=True)
    assert event.embedding is not None
    assert rm.reward.score(event.embedding) == pytest.approx(expected, abs=1e-4)


def test_at_start_what_is_no_reward_model_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = adapters.write(tmp_path / "plain")
    with pytest.raises(ModelLoadError, match="has no score head"):
        load(config(folder / "base", f"rm={plain}"))
    for wrong, reason in (
        (("rm",), "NAME=PATH"),
        (("a b=x",), "NAME=PATH"),
        (("rm=x", "rm=y"), "two adapters would be called rm"),
    ):
        with pytest.raises(UsageError, match=f"--reward-adapter.*{reason}"):
            load(config(folder / "base", *wrong))


# Below: a fake engine, for what goes wrong.


class Rewards(FakeAdapters):
    def __init__(self) -> None:
        super().__init__()
        reward = Reward(np.array([0.0, 1.0, 0.0, 0.0]))
        self._loaded = {"rm": replace(fake_adapter("rm"), reward=reward)}


CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
RANKED = CHAT | {"n": 3, "rank_by": "rm", "max_tokens": 9}


class Varied(FakeEngine):
    """Each choice says something else. `is_stuck`: the reward model never comes to an end."""

    def __init__(self, *, is_stuck: bool = False, refusals: int = 0) -> None:
        super().__init__(step_s=0)
        self.is_stuck = is_stuck
        self.refusals = refusals
        self.rating_error: GenerationFailed | None = None

    def submit(self, *arguments: Any, **options: Any) -> FakeStream:
        if "choice" in options:
            self.pieces = ("a" * (1 + options["choice"]),)
            return super().submit(*arguments, **options)
        if self.refusals:
            self.refusals -= 1
            raise Overloaded("the queue is full; try again in a moment")
        self.hangs, self.error = self.is_stuck, self.rating_error
        return super().submit(*arguments, **options)


@contextmanager
def fake(engine: FakeEngine) -> Iterator[RunningServer]:
    with serving(lambda: create_worker_app(engine, FakeModel(adapters=Rewards()))) as server:
        yield server


def ask(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=RANKED | fields, timeout=WAIT_S)


def test_leaving_while_answers_are_rated_aborts_it() -> None:
    engine = Varied(is_stuck=True)
    with fake(engine) as server:
        with send_raw(server.port, http_request("POST", "/v1/chat/completions", RANKED)):
            # the first goes alone, for the others to share what it has read
            engine.wait_for(lambda e: len(e.finished) == 3 and len(e.running) == 1)
        engine.wait_for(lambda e: len(e.aborted) == 1)
        server.wait_until_idle()
    assert not engine.running and len(engine.submitted) == 4


def test_a_full_queue_costs_no_answer_that_is_there() -> None:
    engine = Varied(refusals=3)
    with fake(engine) as server:
        reply = ask(server)
    assert reply.status_code == 200 and engine.refusals == 0
    assert len(reply.json()["choices"]) == 3 and len(engine.submitted) == 6


def test_a_reward_model_that_fails_is_told() -> None:
    engine = Varied()
    engine.rating_error = GenerationFailed("the model computed no finite states")
    with fake(engine) as server:
        reply = ask(server)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "generation_failed")
    assert not engine.running


def test_an_answer_that_was_said_twice_is_rated_once() -> None:
    engine = FakeEngine(("same",), step_s=0)
    with fake(engine) as server:
        reply = ask(server)
    assert len({choice["score"] for choice in reply.json()["choices"]}) == 1
    assert len(engine.submitted) == 4
