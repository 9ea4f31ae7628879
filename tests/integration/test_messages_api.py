"""/v1/messages over real sockets, judged by the official client: alone and behind a controller."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import MessageParam

from chatserve.errors import ChatserveError, GenerationFailed, NoWorkerAvailable, Overloaded
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.fakes import ANSWER, FakeClock, FakeEngine, FakeModel
from tests.servers import STREAM_HEAD, RunningServer, ScriptedWorker, chunked, serving

TOKEN, KEY = "control-token", "my-key"
TEXT = "".join(ANSWER)
HI: list[MessageParam] = [{"role": "user", "content": "hi"}]
ASK: dict[str, Any] = {"model": "fake", "max_tokens": 100, "messages": HI}


@contextmanager
def controller(worker_url: str) -> Iterator[RunningServer]:
    registry = WorkerRegistry(FakeClock())
    policy = AccessPolicy.build("127.0.0.1", api_keys=[KEY], control_token=TOKEN)
    with serving(
        lambda: create_controller_app(registry, control_token=TOKEN, policy=policy)
    ) as server:
        cards = [ModelCard(name="fake", created=1)]
        registry.register("w", worker_url, WorkerStatus(state="ready", models=cards))
        yield server


@contextmanager
def front(kind: str, engine: FakeEngine, **options: Any) -> Iterator[RunningServer]:
    """Where clients come in, with this engine behind it."""
    keys = [KEY] if kind == "worker" else [TOKEN]
    policy = AccessPolicy.build("127.0.0.1", api_keys=keys)
    token = None if kind == "worker" else TOKEN
    with ExitStack() as stack:
        worker = stack.enter_context(
            serving(
                lambda: create_worker_app(
                    engine, FakeModel(), policy=policy, control_token=token, **options
                )
            )
        )
        yield worker if kind == "worker" else stack.enter_context(controller(worker.url))


ENGINE = FakeEngine(step_s=0, num_cached=2)


@pytest.fixture(scope="module", params=["worker", "controller"])
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with front(request.param, ENGINE) as server:
        yield server


@contextmanager
def client_of(server: RunningServer, key: str = KEY) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as client:
        yield client


def test_whole(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**ASK, system="be brief", extra_body={"temperature": 0.5})
    assert message.id.startswith("msg_") and message.role == "assistant"
    [block] = message.content
    assert block.type == "text" and block.text == TEXT
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    num_prompt = len("<system>be brief<user>hi")
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (num_prompt - 2, 2)
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 5)
    submitted = ENGINE.submitted[-1]
    assert bytes(submitted.prompt_ids).decode() == "<system>be brief<user>hi"
    assert (submitted.params.temperature, submitted.params.max_tokens) == (0.5, 100)


def test_streamed(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ASK) as stream:
        assert tuple(stream.text_stream) == ANSWER
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.content[0].type == "text"
    assert (final.usage.input_tokens, final.usage.output_tokens) == (6, 5)
    assert final.usage.cache_read_input_tokens == 2


def test_cut(client: anthropic.Anthropic) -> None:
    assert client.messages.create(**{**ASK, "max_tokens": 2}).stop_reason == "max_tokens"


def test_prefill(client: anthropic.Anthropic) -> None:
    client.messages.create(**{**ASK, "messages": [*HI, {"role": "assistant", "content": "Once"}]})
    assert bytes(ENGINE.submitted[-1].prompt_ids).decode() == "<user>hi<assistant>Once..."


@pytest.mark.parametrize("extra", [{}, {"system": "be brief"}])
def test_tokens_are_counted(client: anthropic.Anthropic, extra: Any) -> None:
    counted = client.messages.count_tokens(model="fake", messages=HI, **extra)
    usage = client.messages.create(**ASK, **extra).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def kind_of(error: anthropic.APIStatusError) -> str:
    body: Any = error.body
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return str(body["error"]["type"])


def test_errors_have_their_classes(server: RunningServer, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature") as bad:
        client.messages.create(**ASK, extra_body={"temperature": 3})
    assert kind_of(bad.value) == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="other") as missing:
        client.messages.create(**{**ASK, "model": "other"})
    assert kind_of(missing.value) == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        client.messages.count_tokens(model="fake", messages=[])
    with client_of(server, "wrong") as stranger:
        with pytest.raises(anthropic.AuthenticationError) as unknown:
            stranger.messages.create(**ASK)
        assert kind_of(unknown.value) == "authentication_error"
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.count_tokens(model="fake", messages=HI)
    with pytest.raises(anthropic.APIStatusError) as large:
        client.messages.create(
            **{**ASK, "messages": [{"role": "user", "content": "x" * (5 * 1024 * 1024)}]}
        )
    assert large.value.status_code == 413 and kind_of(large.value) == "request_too_large"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b'{"model":"fake"}', b'{"model":3,"messages":[]}',
        b'{"model":"fake","max_tokens":1,"messages":[null]}',
        b'{"model":"fake","max_tokens":1,"messages":[{"role":"user","content":[[]]}]}',
        b'{"model":"fake","max_tokens":1,"messages":' + b"[" * 70 + b"]" * 70 + b"}",
    ],
)  # fmt: skip
def test_malformed(server: RunningServer, path: str, body: bytes) -> None:
    headers = {"x-api-key": KEY, "Content-Type": "application/json"}
    answer = httpx.post(server.url + path, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_other_methods_and_paths_have_the_shape(server: RunningServer) -> None:
    headers = {"x-api-key": KEY}
    assert httpx.get(f"{server.url}/v1/messages", headers=headers).json()["type"] == "error"
    answer = httpx.get(f"{server.url}/v1/messages/batches", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_a_key_by_either_header(server: RunningServer) -> None:
    def status(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"{server.url}/v1/messages", json=ASK, headers=named).status_code

    assert status(x_api_key=KEY) == status(authorization=f"Bearer {KEY}") == 200
    assert status(x_api_key=KEY, anthropic_version="2023-06-01") == 200
    assert status() == status(x_api_key="wrong") == 401
    # a wrong key is not mended by another
    assert status(authorization="Bearer wrong", x_api_key=KEY) == 401


def test_whose_prompts_share_a_cache(server: RunningServer) -> None:
    salts = []
    for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
        httpx.post(f"{server.url}/v1/messages", json=ASK, headers=headers)
        salts.append(ENGINE.submitted[-1].salt)
    assert salts[0] == salts[1] != b""


def test_raw_frames(server: RunningServer) -> None:
    body = {**ASK, "stream": True}
    answer = httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": KEY})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in answer.text
    told = [frame.split("\n") for frame in answer.text.removesuffix("\n\n").split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in told]
    assert names == [
        "message_start", "content_block_start", *["content_block_delta"] * 5,
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert [json.loads(data.removeprefix("data: "))["type"] for _, data in told] == names


@pytest.mark.parametrize("kind", ["worker", "controller"])
def test_an_engine_that_fails(kind: str) -> None:
    engine = FakeEngine(error=GenerationFailed("no luck"))
    with front(kind, engine) as server, client_of(server) as client:
        with (
            pytest.raises(anthropic.APIStatusError, match="no luck") as failed,
            client.messages.stream(**ASK) as stream,
        ):
            assert "".join(stream.text_stream) == TEXT
        assert kind_of(failed.value) == "api_error"
        with pytest.raises(anthropic.InternalServerError, match="no luck"):
            client.messages.create(**ASK)
        refusals: list[tuple[ChatserveError, type[anthropic.APIStatusError], str]] = [
            (Overloaded("full"), anthropic.RateLimitError, "rate_limit_error"),
            (NoWorkerAvailable("soon"), anthropic.InternalServerError, "overloaded_error"),
        ]
        for refusal, expected, name in refusals:
            engine.refusal = refusal
            with pytest.raises(expected) as refused:
                client.messages.create(**ASK, stream=True)
            assert kind_of(refused.value) == name


def test_a_worker_that_dies_in_the_middle() -> None:
    first = b'event: message_start\ndata: {"type":"message_start","message":{"id":"m"}}\n\n'
    with (
        ScriptedWorker([STREAM_HEAD, chunked(first)]) as worker,
        controller(worker.url) as server,
        client_of(server) as client,
    ):
        with pytest.raises(anthropic.APIStatusError, match="died") as lost:
            list(client.messages.create(**ASK, stream=True))
        assert kind_of(lost.value) == "api_error"


def test_it_is_pinged_while_it_is_silent() -> None:
    engine = FakeEngine(hangs=True)
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    with (
        front("worker", engine, ping_interval_s=0.02) as server,
        httpx.stream(
            "POST", f"{server.url}/v1/messages", json={**ASK, "stream": True},
            headers={"x-api-key": KEY},
        ) as answer,
    ):  # fmt: skip
        seen = b""
        for chunk in answer.iter_raw():
            seen += chunk
            if ping in seen:
                break
        assert ping in seen
    engine.wait_for(lambda engine: bool(engine.aborted))


def test_openai_routes_keep_their_shape(server: RunningServer) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x"}])
    assert refused.value.code == "invalid_api_key"


def test_a_lenient_server_says_what_it_left_out() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with front("worker", FakeEngine(), is_lenient=True) as server:
        for path, fields in (
            ("/v1/messages", {**ASK, "thinking": thinking, "nonsense": 1}),
            ("/v1/responses", {"model": "fake", "input": "hi", "background": True, "nonsense": 1}),
        ):
            answer = httpx.post(server.url + path, json=fields, headers={"x-api-key": KEY})
            assert answer.status_code == 200
            left_out = set(answer.headers["x-chatserve-ignored-fields"].split(", "))
            assert left_out == {"nonsense", "thinking" if "thinking" in fields else "background"}
