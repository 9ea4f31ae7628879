"""A controller in front of workers: bytes through, deaths told, nobody left waiting."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from chatserve.errors import OutOfMemory, Overloaded
from chatserve.protocol.sse import PING, encode_event
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.moves import ResumePolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.fakes import ANSWER, FakeEngine, FakeModel
from tests.house import CHAT, READY, STREAM, TOKEN, House
from tests.servers import (
    STREAM_HEAD,
    Script,
    ScriptedWorker,
    chunked,
    read_until,
    serving,
)

TEXT = "".join(ANSWER)
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
FRAMES = b"".join([encode_event('{"a":"你好 🙂"}'), PING, encode_event("x\ny"), encode_event("z")])


@pytest.fixture
def house() -> Iterator[House]:
    with ExitStack() as stack:
        # no answer outlives its worker here: that is test_moves.py's business
        yield House(stack, ResumePolicy(is_on=False))


@contextmanager
def client_of(house: House) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_whole_and_streamed_answers(house: House) -> None:
    house.add("w", FakeEngine())
    with client_of(house) as client:
        reply = client.chat.completions.create(model="fake", messages=MESSAGES)
        assert reply.choices[0].message.content == TEXT
        chunks = list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
        assert client.completions.create(model="fake", prompt="x").choices[0].text == TEXT
    house.wait_until_idle()


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_stream_is_relayed_byte_for_byte(house: House, newline: bytes) -> None:
    frames = FRAMES.replace(b"\n", newline)
    for cut in range(1, len(frames), 7):
        worker = house.add_scripted(
            "w", [STREAM_HEAD, chunked(frames[:cut]), chunked(frames[cut:]), chunked(b"")]
        )
        response = house.post()
        assert response.content == frames
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-accel-buffering"] == "no"
        assert b"[DONE]" not in response.content
        head, _, body = worker.requests[0].partition(b"\r\n\r\n")
        assert json.loads(body) == STREAM
        assert f"Authorization: Bearer {TOKEN}".encode() in head
        house.do(lambda: house.registry.leave("w"))


def test_request_body_is_relayed_byte_for_byte(house: House) -> None:
    worker = house.add_scripted("w", [STREAM_HEAD, chunked(FRAMES), chunked(b"")])
    body = b'{ "model" : "fake",\t"x":1.50, "y":"\\u00e9\xc3\xa9" }'
    headers = {"Content-Type": "application/json", "Authorization": "Bearer of-the-client"}
    httpx.post(f"{house.url}/v1/completions", content=body, headers=headers)
    head, _, sent = worker.requests[0].partition(b"\r\n\r\n")
    assert sent == body and head.startswith(b"POST /v1/completions ")
    assert b"of-the-client" not in head and b"Accept-Encoding: identity" in head


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_the_id_of_a_request_goes_to_the_worker_and_back(
    house: House, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = house.add("w", FakeEngine())
    caplog.set_level("INFO", "chatserve")
    body = STREAM if path != "responses" else {"model": "fake", "input": "hi", "stream": True}
    headers = {"x-request-id": "mine"}
    answer = httpx.post(f"{house.url}/v1/{path}", json=body, headers=headers)
    assert answer.headers.get_list("x-request-id") == ["mine"]
    unnamed = httpx.post(f"{house.url}/v1/{path}", json=body).headers["x-request-id"]
    # an answer is there before the line about it
    served.wait_until_idle()
    found = [line for line in caplog.messages if "completion_tokens" in line]
    assert all(
        f" request={each} " in line for each, line in zip(("mine", unnamed), found, strict=True)
    )
    house.do(lambda: house.registry.leave("w"))
    lost = httpx.post(f"{house.url}/v1/{path}", json=body, headers=headers)
    assert (lost.status_code, lost.headers["x-request-id"]) == (404, "mine")


def test_tokens_are_not_held_back(house: House) -> None:
    house.add("w", FakeEngine(["one", "two"], hangs=True))
    with closing(house.open()) as sock:
        assert b'"two"' in read_until(sock, b'"two"')


def test_workers_statuses_are_passed_on(house: House) -> None:
    house.add("w", FakeEngine(refusal=Overloaded("full", retry_after_s=9)))
    response = house.post()
    assert error_of(response) == (429, "rate_limit_exceeded")
    assert response.headers["retry-after"] == "9"
    assert error_of(house.post(STREAM | {"temperature": 5})) == (400, "invalid_value")
    house.wait_until_idle()


def test_error_event_is_passed_on(house: House) -> None:
    house.add("w", FakeEngine(["a"], error=OutOfMemory("no room")))
    with client_of(house) as client, pytest.raises(openai.APIError, match="no room"):
        list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True))


def test_models(house: House) -> None:
    with client_of(house) as client:
        assert list(client.models.list()) == []
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("fake")
        house.list("w", "http://127.0.0.1:1")
        assert [model.id for model in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").id == "fake"


def test_unknown_model_and_missing_worker(house: House) -> None:
    house.list("w", "http://127.0.0.1:1")
    response = house.post(CHAT | {"model": "other"})
    assert error_of(response) == (404, "model_not_found")
    assert "fake" in response.json()["error"]["message"]
    house.do(lambda: house.registry.remove("w"))
    assert error_of(house.post()) == (503, "no_worker_available")


@pytest.mark.parametrize("body", [b"{}", b"[]", b"{", b'{"model":5}'])
def test_bodies_without_a_model(house: House, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{house.url}/v1/chat/completions", content=body, headers=headers)
    assert error_of(response) == (400, "invalid_value")


def test_large_body(house: House) -> None:
    worker = house.add_scripted("w", [STREAM_HEAD, chunked(FRAMES), chunked(b"")])
    house.post(CHAT | {"messages": [{"role": "user", "content": "x" * 3_000_000}]})
    assert len(worker.requests[0]) > 3_000_000


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def test_worker_that_cannot_be_reached_is_ejected_and_another_answers(house: House) -> None:
    house.list("dead", f"http://127.0.0.1:{free_port()}")
    house.add("live", FakeEngine())
    for _ in range(5):
        assert house.post(CHAT).status_code == 200
    assert house.registry._workers["dead"].num_ejections == 1


def test_only_worker_cannot_be_reached(house: House) -> None:
    house.list("dead", f"http://127.0.0.1:{free_port()}")
    assert error_of(house.post()) == (503, "no_worker_available")
    house.wait_until_idle()


@pytest.mark.parametrize(
    "script",
    [
        [],
        [b"HTTP/1.1 200 OK\r\nContent-"],
        [STREAM_HEAD],
        [STREAM_HEAD, chunked(b'data: {"half"')],
        [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"],
        [b"garbage\r\n\r\n"],
    ],
)
def test_death_before_the_first_byte_is_a_status(house: House, script: Script) -> None:
    house.add_scripted("w", script)
    assert error_of(house.post()) == (502, "worker_died")
    house.wait_until_idle()
    assert error_of(house.post()) == (503, "no_worker_available")


@pytest.mark.parametrize(
    "last", [[], [chunked(b'data: {"half')], [b"5\r\nda"], [b"xyz\r\n"]], ids=str
)
def test_death_in_the_middle_is_one_error_event(house: House, last: list[bytes]) -> None:
    has_begun = threading.Event()
    house.add_scripted("w", [STREAM_HEAD, chunked(FRAMES), has_begun, *last])
    with httpx.stream("POST", f"{house.url}/v1/chat/completions", json=STREAM) as response:
        assert response.status_code == 200
        chunks = response.iter_raw()
        begin = b""
        while len(begin) < len(FRAMES):
            begin += next(chunks)
        has_begun.set()
        rest = b"".join(chunks)
    assert begin == FRAMES
    assert rest.startswith(b"data: {") and rest.count(b"\n\n") == 1
    error = json.loads(rest[len(b"data: ") :])["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == "worker_died"
    house.wait_until_idle()
    assert error_of(house.post()) == (503, "no_worker_available")


def test_a_very_long_frame_costs_no_worker_its_place(house: House) -> None:
    stream = encode_event(b"x" * (6 << 20)) + encode_event("z")
    house.add_scripted("w", [STREAM_HEAD, chunked(stream), b"0\r\n\r\n"])
    assert house.post().content == stream
    assert len(house.registry.cards()) == 1


def test_death_in_a_very_long_frame(house: House) -> None:
    house.add_scripted("w", [STREAM_HEAD, chunked(PING + b"data: " + b"x" * (6 << 20))])
    *_, last, rest = house.post().content.split(b"\n\n")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "worker_died" and not rest


def test_the_official_client_raises_when_the_worker_dies(house: House) -> None:
    chunk = b'{"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}'
    has_begun = threading.Event()
    house.add_scripted("w", [STREAM_HEAD, chunked(encode_event(chunk)), has_begun])
    with client_of(house) as client, pytest.raises(openai.APIError) as caught:
        for _ in client.chat.completions.create(model="fake", messages=MESSAGES, stream=True):
            has_begun.set()
    assert caught.value.code == "worker_died"


def test_redirects_are_not_followed(house: House) -> None:
    with ScriptedWorker([]) as target:
        head = f"HTTP/1.1 307 Away\r\nLocation: {target.url}/v1\r\nContent-Length: 0\r\n\r\n"
        house.add_scripted("w", [head.encode()])
        assert house.post().status_code == 307
        assert target.requests == []


@pytest.mark.parametrize("body", [STREAM, CHAT, STREAM | {"n": 3}])
def test_leaving_aborts_on_the_worker(house: House, body: dict[str, Any]) -> None:
    engine = FakeEngine(["a"], hangs=True)
    house.add("w", engine)
    num_sequences = int(body.get("n", 1))
    with closing(house.open(body)) as sock:
        if "stream" in body:
            read_until(sock, b'"content":"a"')
        engine.wait_for(lambda e: len(e.running) == num_sequences)
    engine.wait_for(lambda e: len(e.aborted) == num_sequences)


def test_leaving_before_the_worker_says_anything(house: House) -> None:
    worker = house.add_scripted("w", [None])
    with closing(house.open()) as sock:
        while not worker.requests:
            time.sleep(0.001)
        sock.shutdown(socket.SHUT_RDWR)
    assert worker.closed_by_peer.wait(20)


def test_leaving_in_the_middle_closes_the_workers_connection(house: House) -> None:
    worker = house.add_scripted("w", [STREAM_HEAD, chunked(FRAMES), None])
    with closing(house.open()) as sock:
        read_until(sock, b"data: z\n\n")
    assert worker.closed_by_peer.wait(20)


def test_who_leaves_does_not_cost_the_worker_its_place(house: House) -> None:
    engine = FakeEngine(["a"], hangs=True)
    house.add("w", engine)
    for _ in range(3):
        with closing(house.open()) as sock:
            read_until(sock, b'"content":"a"')
    engine.wait_for(lambda e: len(e.aborted) == 3)
    assert house.registry._workers["w"].num_ejections == 0


def test_slots_are_counted_while_streams_run(house: House) -> None:
    engine = FakeEngine(["a"], hangs=True)
    house.add("w", engine)
    with ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(closing(house.open()))
            read_until(sock, b'"content":"a"')
        assert house.num_in_flight() == 4
        assert house.controller.edge.num_in_flight == 4
    engine.wait_for(lambda e: not e.running)
    house.wait_until_idle()


def test_requests_are_spread_over_the_workers(house: House) -> None:
    engines = [FakeEngine(["a"], hangs=True) for _ in range(2)]
    for i, engine in enumerate(engines):
        house.add(f"w{i}", engine)
    with ExitStack() as stack:
        for _ in range(6):
            sock = stack.enter_context(closing(house.open()))
            read_until(sock, b'"content":"a"')
        assert [len(engine.running) for engine in engines] == [3, 3]


def test_draining_controller(house: House) -> None:
    engine = FakeEngine(["a"], hangs=True)
    house.add("w", engine)
    assert httpx.get(f"{house.url}/health/ready").status_code == 200
    with closing(house.open()) as sock:
        read_until(sock, b'"content":"a"')
        house.controller.loop.call_soon_threadsafe(house.controller.edge.drain)
        response = house.post()
        assert error_of(response) == (503, "server_shutting_down")
        assert "retry-after" in response.headers
        ready = httpx.get(f"{house.url}/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert len(engine.running) == 1


def test_clients_of_different_keys_share_no_cache() -> None:
    registry = WorkerRegistry(time.monotonic)
    engine = FakeEngine()
    of_worker = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])
    of_controller = AccessPolicy.build(
        "127.0.0.1", api_keys=["key-a", "key-b"], control_token=TOKEN
    )
    with (
        serving(
            lambda: create_worker_app(engine, FakeModel(), policy=of_worker, control_token=TOKEN)
        ) as worker,
        serving(
            lambda: create_controller_app(registry, control_token=TOKEN, policy=of_controller)
        ) as controller,
    ):
        registry.register("w", worker.url, READY)
        for key in ("key-a", "key-a", "key-b"):
            answer = httpx.post(
                f"{controller.url}/v1/chat/completions", json=CHAT,
                headers={"Authorization": f"Bearer {key}", "X-Chatserve-Cache-Salt": "0" * 64},
            )  # fmt: skip
            assert answer.status_code == 200
    first, again, other = (item.salt for item in engine.submitted)
    assert first == again != other
    assert b"" not in (first, other) and bytes(32) not in (first, other)
