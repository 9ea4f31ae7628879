"""/v1/embeddings and /v1/score over real sockets, judged by the official client: a real engine on a
tiny model alone and behind a controller, and a fake one for what goes wrong."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from chatserve.config import WorkerConfig
from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.serving import load
from chatserve.errors import GenerationFailed, Overloaded
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.pooled_batch import MAX_IN_FLIGHT
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.fakes import FakeEngine, FakeModel, FakeStream
from tests.servers import RunningServer, http_request, send_raw, serving

TOKEN = "control-token"
TEXTS = ["the cat sat", "on the mat " * 30, "x", "ünïcode 🙂"]
SIZE = 64


@dataclass(frozen=True)
class House:
    folder: Path
    engine: AsyncEngine
    worker: RunningServer
    controller: RunningServer


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    config = WorkerConfig(
        weights=str(folder), device="cpu", dtype="float32", model_names=("tiny",), max_num_seqs=4,
        max_num_batched_tokens=64,
    )  # fmt: skip
    engine, model = load(config)
    registry = WorkerRegistry(time.monotonic, expiry_s=3600)  # nothing beats here

    def build() -> Edge:
        engine.start()
        policy = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])
        return create_worker_app(engine, model, policy=policy)

    with ExitStack() as stack:
        worker = stack.enter_context(serving(build))
        controller = stack.enter_context(
            serving(lambda: create_controller_app(registry, control_token=TOKEN))
        )
        cards = [ModelCard(name="tiny", created=1)]
        registry.register("w", worker.url, WorkerStatus(state="ready", models=cards))
        yield House(folder, engine, worker, controller)
        worker.call(engine.stop())


@pytest.fixture(params=["worker", "controller"])
def client(house: House, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    server: RunningServer = getattr(house, request.param)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


def vectors_of(reply: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [each.index for each in reply.data] == list(range(len(reply.data)))
    return np.array([each.embedding for each in reply.data], np.float32)


def expected_vector(model: Any, text: str, pooling: str) -> np.ndarray:
    with torch.inference_mode():
        ids = torch.tensor([list(tiny_ids(text))])
        states = model.base_model(ids).last_hidden_state[0].numpy()
    vector = states.mean(0) if pooling == "mean" else states[-1]
    return vector / np.linalg.norm(vector)


def tiny_ids(text: str) -> list[int]:
    """The tokenizer gives each byte its letter's place among all letters."""
    from tokenizers import pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    places = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return [places[bytes_to_unicode()[byte]] for byte in text.encode()]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_numbers_equal_base64_and_transformers(
    client: openai.OpenAI, house: House, pooling: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(house.folder, dtype=torch.float32)
    expected = np.array([expected_vector(model, text, pooling) for text in TEXTS])
    extra = {"pooling": pooling}
    # the client asks for base64 unless it is told
    coded = client.embeddings.create(model="tiny", input=TEXTS, extra_body=extra)
    numbers = client.embeddings.create(
        model="tiny", input=TEXTS, encoding_format="float", extra_body=extra
    )
    raw = client.embeddings.create(
        model="tiny", input=TEXTS, encoding_format="base64", extra_body=extra
    )
    assert np.array_equal(vectors_of(coded), vectors_of(numbers))
    for each, text in zip(raw.data, expected, strict=True):
        bytes_ = base64.b64decode(str(each.embedding))
        assert np.abs(np.frombuffer(bytes_, "<f4") - text).max() < 1e-4
    assert np.allclose(np.linalg.norm(vectors_of(coded), axis=1), 1, atol=1e-6)
    assert coded.model == "tiny"
    num_tokens = sum(len(text.encode()) for text in TEXTS)
    assert (coded.usage.prompt_tokens, coded.usage.total_tokens) == (num_tokens, num_tokens)


def test_ids_and_texts_are_the_same_input(client: openai.OpenAI) -> None:
    ids = [tiny_ids(text) for text in TEXTS]
    texts = vectors_of(client.embeddings.create(model="tiny", input=TEXTS))
    assert np.allclose(vectors_of(client.embeddings.create(model="tiny", input=ids)), texts)
    one = client.embeddings.create(model="tiny", input=ids[0])
    assert np.allclose(vectors_of(one), texts[:1], atol=1e-6)


def test_a_cut_vector_has_length_1_again(client: openai.OpenAI) -> None:
    whole = vectors_of(client.embeddings.create(model="tiny", input="cat"))[0]
    for num_dimensions in (1, 8, SIZE):
        reply = client.embeddings.create(model="tiny", input="cat", dimensions=num_dimensions)
        [found] = vectors_of(reply)
        part = whole[:num_dimensions]
        assert np.allclose(found, part / np.linalg.norm(part), atol=1e-6)


def test_more_inputs_than_the_engine_takes_at_once_beside_a_chat(
    client: openai.OpenAI, house: House
) -> None:
    texts = [f"text number {index}" * (1 + index % 7) for index in range(90)]
    with ThreadPoolExecutor(1) as threads:
        chat = threads.submit(
            client.chat.completions.create, model="tiny", max_tokens=40, temperature=0,
            messages=[{"role": "user", "content": "hi"}],
        )  # fmt: skip
        together = vectors_of(client.embeddings.create(model="tiny", input=texts))
    alone = chat.result().choices[0].message.content
    again = client.chat.completions.create(
        model="tiny", max_tokens=40, temperature=0, messages=[{"role": "user", "content": "hi"}]
    )
    assert again.choices[0].message.content == alone
    for index in (0, 31, 89):
        one = vectors_of(client.embeddings.create(model="tiny", input=texts[index]))
        assert np.allclose(together[index], one[0], atol=1e-5)


def test_too_long_is_refused_unless_it_may_be_cut(client: openai.OpenAI) -> None:
    full = client.embeddings.create(model="tiny", input="a" * 512)
    assert full.usage.prompt_tokens == 512
    with pytest.raises(openai.BadRequestError, match="513 tokens, tiny holds 512") as caught:
        client.embeddings.create(model="tiny", input=["a", "a" * 513])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    cut = client.embeddings.create(
        model="tiny", input="a" * 513, extra_body={"truncate_prompt_tokens": -1}
    )
    assert np.allclose(vectors_of(cut), vectors_of(full), atol=1e-6)
    assert cut.usage.model_extra == {"prompt_tokens_dropped": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"dimensions": SIZE + 1},
        {"dimensions": 0},
        {"encoding_format": "int8"},
        {"extra_body": {"pooling": "cls"}},
        {"extra_body": {"truncate_prompt_tokens": 0}},
        {"extra_body": {"colour": "red"}},
    ],
)
def test_refused(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**{"model": "tiny", "input": "a", **fields})
    names = set(fields) | set(fields.get("extra_body", {}))
    assert caught.value.param in names


def test_another_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a")


def test_scores_are_the_cosines_of_embeddings(client: openai.OpenAI) -> None:
    first, *rest = vectors_of(client.embeddings.create(model="tiny", input=TEXTS)).astype(float)
    body = {"model": "tiny", "text_1": TEXTS[0], "text_2": [*TEXTS[1:], TEXTS[0]]}
    reply: Any = client.post("/score", cast_to=object, body=body)
    assert [each["score"] for each in reply["data"]] == pytest.approx(
        [*(float(first @ other) for other in rest), 1], abs=1e-6
    )
    assert [each["index"] for each in reply["data"]] == [0, 1, 2, 3]
    assert reply["id"].startswith("score-")
    assert reply["usage"]["prompt_tokens"] == sum(len(text.encode()) for text in TEXTS)
    pairs: Any = client.post(
        "/score", cast_to=object, body={**body, "text_1": TEXTS[1:3], "text_2": TEXTS[1:3]}
    )
    assert [each["score"] for each in pairs["data"]] == pytest.approx([1, 1])


def test_nothing_is_left_of_them(house: House, client: openai.OpenAI) -> None:
    free = house.engine.engine.num_free_kv_tokens
    client.embeddings.create(model="tiny", input=TEXTS)
    assert house.engine.engine.num_free_kv_tokens == free
    stats = house.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)


# Below: a fake engine, for what goes wrong.


class FullEngine(FakeEngine):
    """Has room for `room` sequences at a time, and refuses more."""

    def __init__(self, room: int) -> None:
        super().__init__(step_s=0)
        self.room = room
        self.most = 0
        self.num_refused = 0

    def submit(self, *arguments: Any, **options: Any) -> FakeStream:
        if len(self.running) >= self.room:
            self.num_refused += 1
            raise Overloaded("the queue is full; try again in a moment")
        stream = super().submit(*arguments, **options)
        self.most = max(self.most, len(self.running))
        return stream


@contextmanager
def fake(engine: FakeEngine) -> Iterator[RunningServer]:
    with serving(lambda: create_worker_app(engine, FakeModel())) as server:
        yield server


def embed(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json={"model": "fake", **fields})


def test_few_at_a_time_in_order() -> None:
    engine = FullEngine(room=1000)
    with fake(engine) as server:
        data = embed(server, input=[[3, index] for index in range(50)]).json()["data"]
    ratios = [each["embedding"][1] / each["embedding"][0] for each in data]
    assert ratios == pytest.approx([index / 3 for index in range(50)], rel=1e-5)
    assert engine.most == MAX_IN_FLIGHT
    assert len(engine.finished) == 50
    assert all(
        each.params == SamplingParams(max_tokens=0, pooling="mean") for each in engine.submitted
    )


def test_a_full_queue_slows_a_request_down_and_refuses_one_that_has_nothing_in_it() -> None:
    engine = FullEngine(room=3)
    with fake(engine) as server:
        reply = embed(server, input=[[3, index] for index in range(20)])
        assert reply.status_code == 200
        assert (engine.most, engine.num_refused > 0) == (3, True)
        engine.room = 0
        reply = embed(server, input=["a", "b"])
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "retry-after" in reply.headers


class CrowdedEngine(FakeEngine):
    """From the fourth sequence on it is full for a while, of others' sequences."""

    num_refused = 0

    def submit(self, *arguments: Any, **options: Any) -> FakeStream:
        if len(self.submitted) == 3 and self.num_refused < 6:
            self.num_refused += 1
            raise Overloaded("the queue is full; try again in a moment")
        return super().submit(*arguments, **options)


def test_a_queue_full_of_others_costs_nothing_that_was_computed() -> None:
    engine = CrowdedEngine()
    with fake(engine) as server:
        reply = embed(server, input=[[3, index] for index in range(5)])
    assert (reply.status_code, engine.num_refused) == (200, 6)
    assert len(reply.json()["data"]) == 5 == len(engine.finished)


def test_one_that_fails_takes_the_others_with_it() -> None:
    engine = FakeEngine(error=GenerationFailed("the model computed no finite states"))
    with fake(engine) as server:
        reply = embed(server, input=["a"] * 20)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "generation_failed")
    assert "no finite states" in reply.json()["error"]["message"]
    assert not engine.running


def test_a_client_that_leaves_aborts_all_of_them() -> None:
    engine = FakeEngine(hangs=True)
    with fake(engine) as server:
        body = {"model": "fake", "input": ["a"] * 20}
        request = http_request("POST", "/v1/embeddings", body)
        with send_raw(server.port, request):
            engine.wait_for(lambda e: len(e.running) == MAX_IN_FLIGHT, "nothing was submitted")
        engine.wait_for(lambda e: not e.running and len(e.aborted) == MAX_IN_FLIGHT)
    assert len(engine.submitted) == MAX_IN_FLIGHT


def test_prompts_of_different_keys_share_no_cache() -> None:
    engine = FakeEngine()
    with serving(
        lambda: create_worker_app(
            engine, FakeModel(), policy=AccessPolicy.build("127.0.0.1", api_keys=["one", "two"])
        )
    ) as server:
        for key in ("one", "two", "one"):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"model": "fake", "input": "a"}
            httpx.post(f"{server.url}/v1/embeddings", json=body, headers=headers)
    first, second, third = (each.salt for each in engine.submitted)
    assert first == third != second
