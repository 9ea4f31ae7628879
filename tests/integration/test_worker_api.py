"""One worker over a real socket, judged by the official client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from chatserve.errors import OutOfMemory, Overloaded
from chatserve.server import edge, listener
from chatserve.server.edge import AccessPolicy
from chatserve.server.model_slot import ModelSlot
from chatserve.server.worker import create_slot_app, create_worker_app
from tests.fakes import ANSWER, FakeEngine, FakeModel, FakePrompts, FakeStats
from tests.servers import RunningServer, http_request, read_all, read_until, send_raw, serving

TEXT = "".join(ANSWER)
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "fake", "messages": MESSAGES}


@contextmanager
def worker(
    engine: FakeEngine, model: FakeModel | None = None, **options: Any
) -> Iterator[RunningServer]:
    with serving(lambda: create_worker_app(engine, model or FakeModel(), **options)) as server:
        yield server


@contextmanager
def client_of(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with worker(FakeEngine(step_s=0), FakeModel(names=("fake", "alias/with/slash"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint == "fp_fake"
    assert reply.model == "fake" and reply.created > 0
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", TEXT)
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (8, 5)


def test_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_of_a_stream(client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (8, 5)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_ends_with_length(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        *_, last = client.chat.completions.create(
            model="fake", messages=MESSAGES, max_tokens=2, stream=True
        )
        assert last.choices[0].finish_reason == "length"
        return
    reply = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=2)
    assert reply.choices[0].message.content == "Hello, "
    assert reply.choices[0].finish_reason == "length"


def test_several_choices(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=MESSAGES, n=3)
    assert [(c.index, c.message.content) for c in reply.choices] == [(i, TEXT) for i in range(3)]
    assert reply.usage is not None and reply.usage.completion_tokens == 15
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="fake", messages=MESSAGES, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [TEXT] * 3


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
def test_completion(client: openai.OpenAI, prompt: Any) -> None:
    reply = client.completions.create(model="fake", prompt=prompt)
    assert reply.id.startswith("cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in reply.choices] == [(0, TEXT, "stop")]
    assert reply.usage is not None and reply.usage.prompt_tokens == 2
    chunks = list(client.completions.create(model="fake", prompt=prompt, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="fake", prompt=["a", "b"], n=2)
    assert [(choice.index, choice.text) for choice in reply.choices] == [
        (index, TEXT) for index in range(4)
    ]


def test_async_client_with_many_streams(server: RunningServer) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(ask(client) for _ in range(16)))

    assert asyncio.run(main()) == [TEXT] * 16


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["fake", "alias/with/slash"]
    model = client.models.retrieve("alias/with/slash")
    assert model.to_dict()["chatserve"] == {
        "context_length": 1000, "device": "cpu", "fingerprint": "fp_fake",
    }  # fmt: skip
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def error_of(server: RunningServer, method: str, path: str, **options: Any) -> tuple[int, Any]:
    response = httpx.request(method, server.url + path, **options)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        ({"audio": {"voice": "a"}}, openai.BadRequestError, "audio", "unsupported_parameter"),
        ({"functions": [{"name": "f"}]},
         openai.BadRequestError, "functions", "unsupported_parameter"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature",
         "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]},
         openai.BadRequestError, None, "context_length_exceeded"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(
    client: openai.OpenAI, fields: Any, kind: Any, param: str | None, code: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**CHAT, **fields, "stream": stream})
    assert (caught.value.param, caught.value.code) == (param, code)


def test_routes_and_bodies_that_do_not_exist(server: RunningServer) -> None:
    assert error_of(server, "GET", "/v1/nope")[0] == 404
    assert error_of(server, "GET", "/v1/models/")[0] == 404
    assert error_of(server, "GET", "/docs")[0] == 404
    assert error_of(server, "GET", "/v1/chat/completions")[0] == 405
    assert error_of(server, "OPTIONS", "/v1/models")[0] == 405
    for body in (b"", b"{", b"[]", b"\xff"):
        headers = {"Content-Type": "application/json"}
        status, error = error_of(
            server, "POST", "/v1/chat/completions", content=body, headers=headers
        )
        assert (status, error["code"]) == (400, "invalid_value")
    assert error_of(server, "POST", "/v1/chat/completions", content=b"{}")[0] == 415


def test_body_over_the_limit(server: RunningServer) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * (1 << 20)

    headers = {"Content-Type": "application/json"}
    status, error = error_of(server, "POST", "/v1/completions", content=chunks(), headers=headers)
    assert (status, error["code"]) == (413, "body_too_large")
    sock = send_raw(
        server.port,
        http_request("POST", "/v1/completions", headers={
            "Content-Type": "application/json", "Content-Length": str(100 << 20),
        }),
    )  # fmt: skip
    with sock:
        assert read_until(sock, b"body_too_large").startswith(b"HTTP/1.1 413")


HALF_SENT = b"".join((
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n",
    b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
))  # fmt: skip


def wait_for_reading(server: RunningServer) -> None:
    async def is_reading() -> bool:
        return bool(server.edge._readings)

    deadline = time.monotonic() + 10
    while not server.call(is_reading()):
        assert time.monotonic() < deadline


def test_half_sent_body_gets_an_answer_in_time(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "BODY_TIMEOUT_S", 0.05)
    head, _, body = read_all(send_raw(server.port, HALF_SENT)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408") and b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == ("body_too_slow", "invalid_request_error")
    assert "0.05 s" in error["message"]


def test_half_sent_body_does_not_hold_up_a_drain() -> None:
    with worker(FakeEngine()) as server:
        sock = send_raw(server.port, HALF_SENT)
        wait_for_reading(server)
        assert server.edge.num_in_flight == 0
        server.loop.call_soon_threadsafe(server.edge.drain)
        answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 503") and b"server_shutting_down" in answer


def test_leaving_in_the_middle_of_a_body_is_no_trouble(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    sock = send_raw(server.port, HALF_SENT)
    wait_for_reading(server)
    sock.close()
    deadline = time.monotonic() + 10
    while server.edge._readings:
        assert time.monotonic() < deadline
    assert httpx.get(f"{server.url}/health/live").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_what_is_cut_at_the_end_leaves_no_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "ABORT_S", 0)
    engine = FakeEngine(["a"], hangs=True)
    with worker(engine) as server:
        sock = send_raw(server.port, http_request("POST", "/v1/chat/completions", CHAT))
        engine.wait_for(lambda e: bool(e.num_events))
    sock.close()
    assert engine.aborted
    assert any("Cancel 1 running task" in record.message for record in caplog.records)
    assert not [record for record in caplog.records if record.exc_info]


def test_strange_host(server: RunningServer) -> None:
    status, error = error_of(server, "GET", "/health/live", headers={"Host": "evil.example"})
    assert (status, error["code"]) == (403, "host_not_allowed")


def test_headers_of_a_stream_keep_proxies_from_buffering(server: RunningServer) -> None:
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}
    ) as r:
        assert r.headers["content-type"].startswith("text/event-stream")
        assert r.headers["x-accel-buffering"] == "no"
        assert r.headers["cache-control"] == "no-store"
        assert r.read().endswith(b"data: [DONE]\n\n")


def test_first_chunk_comes_before_the_first_token_and_pings_keep_the_line_awake() -> None:
    engine = FakeEngine([], hangs=True)
    with (
        worker(engine, ping_interval_s=0.02) as server,
        send_raw(server.port, http_request("POST", "/v1/chat/completions", CHAT | {"stream": True}))
        as sock,
    ):  # fmt: skip
        data = read_until(sock, b": ping\n\n")
        assert data.index(b'"role":"assistant"') < data.index(b": ping\n\n")


def test_tokens_are_not_held_back() -> None:
    engine = FakeEngine(["one", "two"], hangs=True)
    with (
        worker(engine) as server,
        send_raw(server.port, http_request("POST", "/v1/chat/completions", CHAT | {"stream": True}))
        as sock,
    ):  # fmt: skip
        assert b'"content":"two"' in read_until(sock, b'"two"')


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_a_status(stream: bool) -> None:
    engine = FakeEngine(refusal=Overloaded("64 are waiting; try again", retry_after_s=4))
    with worker(engine) as server, client_of(server) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="fake", messages=MESSAGES, stream=stream)
        assert caught.value.response.headers["retry-after"] == "4"
        assert caught.value.code == "rate_limit_exceeded"


def test_error_in_the_middle() -> None:
    engine = FakeEngine(["a"], error=OutOfMemory("no room for this one"))
    with worker(engine) as server, client_of(server) as client:
        seen = []
        with pytest.raises(openai.APIError, match="no room") as caught:
            for chunk in client.chat.completions.create(
                model="fake", messages=MESSAGES, stream=True
            ):
                seen.append(chunk.choices[0].delta.content)
        assert seen == ["", "a"] and caught.value.code == "out_of_memory"
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="fake", messages=MESSAGES)


def test_stream_that_fails_has_a_proper_end_without_done() -> None:
    engine = FakeEngine(["a"], error=OutOfMemory("no room"))
    with worker(engine) as server:
        data = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"stream": True}).text
    assert data.endswith("\n\n") and "[DONE]" not in data
    assert json.loads(data.strip().rpartition("data: ")[2])["error"]["code"] == "out_of_memory"


def leave(server: RunningServer, body: dict[str, Any], after: bytes) -> None:
    """Send a request, read until `after`, and close the connection."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    with send_raw(server.port, http_request("POST", path, body)) as sock:
        if after:
            assert after in read_until(sock, after)


@pytest.mark.parametrize(
    ("pieces", "after"), [((), b'"role"'), (("a",), b'"content":"a"'), (("a", "b"), b'"b"')]
)
@pytest.mark.parametrize("num_choices", [1, 3])
def test_leaving_a_stream_aborts_its_sequences(
    pieces: Sequence[str], after: bytes, num_choices: int
) -> None:
    engine = FakeEngine(pieces, hangs=True, step_s=0)
    with worker(engine) as server:
        leave(server, CHAT | {"stream": True, "n": num_choices}, after)
        engine.wait_for(lambda e: len(e.aborted) == num_choices)
    assert not engine.running and not engine.finished


@pytest.mark.parametrize("body", [CHAT, CHAT | {"n": 3}, {"model": "fake", "prompt": ["a", "b"]}])
def test_leaving_a_whole_answer_aborts_its_sequences(body: dict[str, Any]) -> None:
    engine = FakeEngine(["a"], hangs=True)
    num_sequences = body.get("n", len(body.get("prompt", "x")))
    with worker(engine) as server:
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        with send_raw(server.port, http_request("POST", path, body)):
            engine.wait_for(lambda e: len(e.running) == num_sequences)
        engine.wait_for(lambda e: len(e.aborted) == num_sequences)
    assert not engine.running


def test_many_clients_that_leave_free_every_slot() -> None:
    engine = FakeEngine(["a"] * 5, hangs=True, step_s=0.001)
    with worker(engine) as server:
        for i in range(50):
            leave(server, CHAT | {"stream": True}, (b"", b'"role"', b'"content":"a"')[i % 3])
        engine.wait_for(lambda e: not e.running and len(e.submitted) == len(e.aborted))
        server.wait_until_idle()


def test_one_that_leaves_does_not_take_its_neighbour_along() -> None:
    engine = FakeEngine(["a"], hangs=True)
    with worker(engine) as server:
        request = http_request("POST", "/v1/chat/completions", CHAT | {"stream": True})
        with closing(send_raw(server.port, request)) as stays:
            read_until(stays, b'"content":"a"')
            [seq_id] = engine.running
            for _ in range(5):
                leave(server, CHAT | {"stream": True}, b'"content":"a"')
            engine.wait_for(lambda e: len(e.aborted) == 5)
            assert engine.running == {seq_id}


class SlowPrompts(FakePrompts):
    """A tokenizer that takes as long as the test wants."""

    entered = threading.Event()
    release = threading.Event()

    def chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        self.entered.set()
        assert self.release.wait(20)
        return super().chat(messages, **options)


class SlowModel(FakeModel):
    @property
    def prompts(self) -> FakePrompts:
        return SlowPrompts(1000)


def test_tokenising_does_not_hold_up_the_other_streams() -> None:
    with (
        worker(FakeEngine(), SlowModel()) as server,
        closing(send_raw(server.port, http_request("POST", "/v1/chat/completions", CHAT))) as slow,
    ):
        assert SlowPrompts.entered.wait(20)
        with client_of(server) as client:
            text = client.completions.create(model="fake", prompt="x").choices[0].text
        assert text == TEXT
        SlowPrompts.release.set()
        assert b"200 OK" in read_until(slow, b"}")


def test_health() -> None:
    engine = FakeEngine()
    with worker(engine) as server:

        def status(path: str) -> int:
            return httpx.get(f"{server.url}/health/{path}").status_code

        assert [status(path) for path in ("live", "ready", "decode")] == [200, 200, 200]
        engine.current = FakeStats(tick=9, last_token_age_s=31, num_running=1)
        assert [status(path) for path in ("live", "ready", "decode")] == [200, 503, 503]
        engine.current = FakeStats(is_alive=False)
        assert status("decode") == 503


def test_while_the_model_loads() -> None:
    slot = ModelSlot(["fake"])
    slot.progress(25, 100)
    with serving(lambda: create_slot_app(slot)) as server:
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert httpx.get(f"{server.url}/health/decode").status_code == 503
        ready = httpx.get(f"{server.url}/health/ready")
        assert ready.status_code == 503
        assert ready.json() == {
            "status": "loading",
            "models": [
                {"name": "fake", "state": "loading", "loaded_bytes": 25, "total_bytes": 100}
            ],
        }
        status, error = error_of(server, "POST", "/v1/chat/completions", json=CHAT)
        assert (status, error["code"]) == (503, "no_worker_available")
        assert "25 %" in error["message"]
        slot.fill(FakeEngine(), FakeModel())
        assert httpx.get(f"{server.url}/health/ready").status_code == 200


def test_behind_a_controller_only_its_token_opens() -> None:
    policy = AccessPolicy.build("127.0.0.1", api_keys=["token"])
    with worker(FakeEngine(), policy=policy, control_token="token") as server:
        assert error_of(server, "POST", "/v1/chat/completions", json=CHAT)[0] == 401
        assert error_of(server, "GET", "/v1/models")[0] == 401
        headers = {"Authorization": "Bearer token"}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == 200


@pytest.mark.parametrize(("number", "words"), [(1, "1 request to"), (2, "2 requests to")])
def test_a_drain_says_for_what_and_how_long_it_waits(
    number: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "chatserve")
    engine = FakeEngine(["a"], hangs=True)
    with worker(engine) as server:
        request = http_request("POST", "/v1/chat/completions", CHAT)
        socks = [send_raw(server.port, request) for _ in range(number)]
        engine.wait_for(lambda e: len(e.num_events) == number)
        drained = listener.Listener(server.edge)

        async def drain() -> None:
            hurry = asyncio.Event()
            asyncio.get_running_loop().call_soon(hurry.set)
            await drained.drain(seconds=30, hurry=hurry, abort=engine.stop)

        server.call(drain())
        for sock in socks:
            assert b"HTTP/1.1 503" in read_all(sock)
    told = [record.message for record in caplog.records if "waiting" in record.message]
    assert told == [f"waiting up to 30 s for {words} finish; Ctrl-C once more stops at once"]


def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    engine = FakeEngine(["a"], hangs=True)
    with worker(engine) as server:
        request = http_request("POST", "/v1/chat/completions", CHAT | {"stream": True})
        with closing(send_raw(server.port, request)) as sock:
            read_until(sock, b'"content":"a"')
            server.loop.call_soon_threadsafe(server.edge.drain)
            refused = read_all(
                send_raw(
                    server.port,
                    http_request(
                        "POST", "/v1/chat/completions", CHAT, headers={"Connection": "close"}
                    ),
                )
            )
            assert refused.startswith(b"HTTP/1.1 503") and b"retry-after" in refused.lower()
            assert len(engine.running) == 1
