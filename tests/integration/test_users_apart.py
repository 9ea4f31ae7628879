"""What one client sends is nobody else's: prompts in the cache, answers, what was cancelled."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from random import Random

import httpx
import pytest

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server import cache_salt
from chatserve.server import worker as module_of_worker
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import RunningServer, serving

KEYS = ("key-a", "key-b", "key-c")
TOKEN = "control-token"
WAIT_S = 30.0
NUM_TOKENS = 10
# no end-of-sequence id is ever the likeliest
ENDLESS = {str(id): -100 for id in (tiny.BOS_ID, tiny.START_ID, tiny.EOS_ID)}
LONG = "You are a patient assistant, and this is a prompt of more than a block. " * 3


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningServer]]:
    """A worker with keys of its own, and a controller that has them before it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=1024)
    config = WorkerConfig(
        weights=str(folder), device="cpu", dtype="float32", model_names=("tiny",),
        # an answer alone is that among others, bit for bit and on any processor
        deterministic=True, max_num_waiting=1024,
    )  # fmt: skip
    engine, model = load(config)
    of_worker = AccessPolicy.build("127.0.0.1", api_keys=[*KEYS, TOKEN], control_token=TOKEN)
    of_controller = AccessPolicy.build("127.0.0.1", api_keys=KEYS, control_token=TOKEN)
    registry = WorkerRegistry(lambda: 0.0)

    def build() -> Edge:
        engine.start()
        return create_worker_app(engine, model, policy=of_worker, control_token=TOKEN)

    with (
        serving(build) as worker,
        serving(
            lambda: create_controller_app(registry, control_token=TOKEN, policy=of_controller)
        ) as controller,
    ):
        cards = [ModelCard(name="tiny", created=1)]
        registry.register("w", worker.url, WorkerStatus(state="ready", models=cards))
        yield {"worker": worker, "controller": controller}
        worker.call(engine.stop())


@pytest.fixture(params=["worker", "controller"])
def server(request: pytest.FixtureRequest, servers: dict[str, RunningServer]) -> RunningServer:
    return servers[request.param]


def reused(server: RunningServer, key: str, prompt: str, header: str = "Authorization") -> int:
    """How many tokens of `prompt` were in the cache."""
    value = f"Bearer {key}" if header == "Authorization" else key
    answer = httpx.post(
        f"{server.url}/v1/completions", headers={header: value}, timeout=WAIT_S,
        json={"model": "tiny", "prompt": prompt, "max_tokens": 1, "logit_bias": ENDLESS},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    details = answer.json()["usage"]["prompt_tokens_details"]
    return int(details["cached_tokens"])


def test_a_prompt_of_one_key_is_not_in_the_cache_of_another(server: RunningServer) -> None:
    prompt = f"{time.monotonic_ns()} {LONG}"
    assert reused(server, KEYS[0], prompt) == 0
    assert reused(server, KEYS[0], prompt) > 100
    assert reused(server, KEYS[1], prompt) == 0
    assert reused(server, KEYS[1], prompt) > 100
    # the same key in Anthropic's header is the same user
    assert reused(server, KEYS[0], prompt, "x-api-key") > 100


def test_without_salts_it_would_be(
    servers: dict[str, RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_worker, "salt_of", lambda *_: b"")
    prompt = f"{time.monotonic_ns()} {LONG}"
    assert reused(servers["worker"], KEYS[0], prompt) == 0
    assert reused(servers["worker"], KEYS[1], prompt) > 100


def test_salts_of_keys_are_no_keys() -> None:
    salts = {cache_salt.salt_of({"authorization": f"Bearer {key}"}, TOKEN) for key in KEYS}
    assert not any(key.encode() in salt for key in KEYS for salt in salts)


class Client:
    """Sends requests with canaries, alone or all at once, and reads what comes back."""

    def __init__(self, server: RunningServer, http: httpx.AsyncClient) -> None:
        self._url = f"{server.url}/v1/completions"
        self._http = http

    async def ask(self, number: int, *, is_stream: bool, cancel_after: int | None = None) -> str:
        """The text, which begins with the prompt; what had come of it when it was cancelled."""
        body = {
            "model": "tiny", "prompt": prompt_of(number), "echo": True, "max_tokens": NUM_TOKENS,
            "seed": number, "temperature": number % 2, "logit_bias": ENDLESS, "stream": is_stream,
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {KEYS[number % len(KEYS)]}"}
        if not is_stream:
            answer = await self._http.post(self._url, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["text"])
        text = ""
        async with self._http.stream("POST", self._url, json=body, headers=headers) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if cancel_after is not None and len(text) > len(prompt_of(number)) + cancel_after:
                    return text
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    text += "".join(choice["text"] for choice in event["choices"])
        return text


def canary(number: int) -> str:
    return f"CANARY-{number:05d}-{number * 7919 % 99991:05d}"


def prompt_of(number: int) -> str:
    # a beginning that all share, so that there is something to mix up
    return f"{LONG}{canary(number)} says"


def interleaved(
    server: RunningServer, num_requests: int, num_kinds: int, seed: int
) -> Counter[str]:
    """Requests of `num_kinds` kinds, each first alone and then among all others."""
    random = Random(seed)
    outcomes: Counter[str] = Counter()

    async def main() -> None:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(timeout=WAIT_S, limits=limits) as http:
            client = Client(server, http)
            alone = [await client.ask(kind, is_stream=False) for kind in range(num_kinds)]

            async def one(number: int) -> None:
                kind = number % num_kinds
                is_cancelled = random.random() < 0.25
                after = random.randrange(NUM_TOKENS) if is_cancelled else None
                is_stream = is_cancelled or random.random() < 0.5
                text = await client.ask(kind, is_stream=is_stream, cancel_after=after)
                foreign = text.replace(canary(kind), "").count("CANARY")
                assert not foreign, (number, text)
                if is_cancelled and text != alone[kind]:
                    assert alone[kind].startswith(text.rstrip("\ufffd")), number
                    outcomes["cancelled"] += 1
                else:
                    assert text == alone[kind], number
                    outcomes["equal"] += 1

            await asyncio.gather(*map(one, range(num_requests)))

    asyncio.run(main())
    return outcomes


def test_interleaved_answers_are_those_of_each_alone(servers: dict[str, RunningServer]) -> None:
    outcomes = interleaved(servers["controller"], 120, 24, seed=30)
    assert outcomes["equal"] > 60 and outcomes["cancelled"] > 5, outcomes


@pytest.mark.soak
def test_a_thousand_interleaved_answers(server: RunningServer) -> None:
    outcomes = interleaved(server, 1_000, 100, seed=31)
    print(dict(outcomes))
    assert outcomes["equal"] > 600 and outcomes["cancelled"] > 50, outcomes


def test_an_answer_with_another_s_canary_would_be_found() -> None:
    """What the check above looks for."""
    assert f"{prompt_of(1)} {canary(2)}".replace(canary(1), "").count("CANARY") == 1
