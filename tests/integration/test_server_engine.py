"""The worker's HTTP side with the real engine behind it, on a tiny random model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from chatserve.config import WorkerConfig
from chatserve.engine.async_engine import AsyncEngine, EngineStats
from chatserve.engine.serving import load
from chatserve.server.edge import Edge
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import RunningServer, http_request, read_until, send_raw, serving

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
# an answer that goes on to its limit: no end-of-sequence id is ever the likeliest
ENDLESS = {str(id): -100 for id in (tiny.BOS_ID, tiny.START_ID, tiny.EOS_ID)}


@dataclass(frozen=True)
class Worker:
    server: RunningServer
    engine: AsyncEngine


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=4096)
    config = WorkerConfig(
        weights=str(folder), device="cpu", dtype="float32", model_names=("tiny",), max_num_seqs=4
    )
    engine, model = load(config)

    def build() -> Edge:
        engine.start()
        return create_worker_app(engine, model)

    with serving(build) as server:
        yield Worker(server, engine)
        server.call(engine.stop())


@pytest.fixture
def client(worker: Worker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{worker.server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("temperature", [0, 1])
def test_streamed_equals_whole_for_the_same_seed(client: openai.OpenAI, temperature: float) -> None:
    options: dict[str, Any] = {
        "model": "tiny", "messages": MESSAGES, "n": 3, "seed": 5, "max_tokens": 20,
        "temperature": temperature, "logit_bias": ENDLESS,
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    texts = [choice.message.content or "" for choice in whole.choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert len(set(texts)) == (1 if temperature == 0 else 3)
    assert whole.usage is not None and whole.usage.completion_tokens == 60
    assert {choice.finish_reason for choice in whole.choices} == {"length"}


def test_context_is_counted_in_tokens(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    assert "4,096" in caught.value.message


def is_free(stats: EngineStats, idle: EngineStats) -> bool:
    # the figures are read one by one while the engine goes on
    is_idle = not stats.num_running and not stats.num_waiting
    return is_idle and stats.free_kv_tokens == idle.free_kv_tokens


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_cache_long_before_the_limit(worker: Worker, stream: bool) -> None:
    idle = worker.engine.stats()
    assert idle.num_running == 0
    body = {
        "model": "tiny", "messages": MESSAGES, "n": 3, "stream": stream, "logit_bias": ENDLESS,
    }  # fmt: skip
    request = http_request("POST", "/v1/chat/completions", body)
    deadline = time.monotonic() + 20
    with closing(send_raw(worker.server.port, request)) as sock:
        if stream:
            read_until(sock, b'"content":"')
        while worker.engine.stats().num_running < 3:
            assert time.monotonic() < deadline
    while not is_free(stats := worker.engine.stats(), idle):
        assert time.monotonic() < deadline, stats
    assert stats.tick - idle.tick < 3000, "it ran to its limit instead of being aborted"
