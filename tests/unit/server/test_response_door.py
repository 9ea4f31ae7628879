"""Who may do what at the door of responses, whatever stands behind it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from chatserve.protocol.fields import MAX_BODY_BYTES
from chatserve.server import response_door
from chatserve.server.edge import AccessPolicy
from chatserve.server.error_response import install_error_handlers
from chatserve.server.json_response import json_response
from chatserve.server.response_door import ResponseDoor, owner_of
from chatserve.server.response_store import KeptResponse, ResponseStore
from chatserve.server.truncation import MESSAGES_HEADER, TOKENS_HEADER
from chatserve.server.worker import create_worker_app
from tests.asgi import RunningApp, running
from tests.fakes import FakeEngine, FakeModel

ID = "resp_1"
ME = (("authorization", "Bearer me"), ("content-type", "application/json"))
YOU = (("authorization", "Bearer you"), ("content-type", "application/json"))


def frame(name: str, status: str, **fields: Any) -> bytes:
    response = {"id": ID, "status": status, "output": [], **fields}
    event = {"type": f"response.{name}", "response": response}
    return f"event: response.{name}\ndata: {json.dumps(event)}\n\n".encode()


class Stream(Response):
    """Begins, and goes on when it is `released`."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, last: bytes, piece_size: int, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self.begun = asyncio.Event()
        self.released = asyncio.Event()
        self._first = first
        self._last = last
        self._piece_size = piece_size

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def say(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        start: MutableMapping[str, Any] = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": self.raw_headers})
        await say(b": ping\n\n")
        await say(self._first)
        self.begun.set()
        await self.released.wait()
        for place in range(0, len(self._last), self._piece_size):
            await say(self._last[place : place + self._piece_size])
        await say(b"", more=False)


class Backend:
    """Answers with `stream`; notes what it is asked."""

    def __init__(self) -> None:
        self.first = frame("created", "in_progress")
        self.last = frame("completed", "completed")
        self.headers: dict[str, str] = {}
        self.piece_size = 1 << 30
        self.is_asked = asyncio.Event()
        self.streams: list[Stream] = []
        self.cancelled: list[str] = []
        self.bodies: list[Any] = []

    async def respond(self, request: Request, body: bytes, model: object) -> Response:
        self.bodies.append(json.loads(body))
        self.streams.append(Stream(self.first, self.last, self.piece_size, self.headers))
        self.is_asked.set()
        return self.streams[-1]

    async def cancel(self, request: Request, response_id: str, stream: Response) -> Response:
        self.cancelled.append(response_id)
        return json_response({"id": ID, "status": "cancelled", "output": []})


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def store(tmp_path: Path) -> ResponseStore:
    return ResponseStore(tmp_path / "responses.db")


@pytest.fixture
def app(backend: Backend, store: ResponseStore) -> Iterator[tuple[RunningApp, asyncio.Runner]]:
    app = FastAPI()
    ResponseDoor(store, backend).add_to(app)
    install_error_handlers(app)
    with running(app) as api:
        yield api, api.runner


def stream_of(api: RunningApp, runner: asyncio.Runner, backend: Backend) -> asyncio.Task[Any]:
    """A response of mine that has begun."""
    body = b'{"model":"fake","input":"hi","stream":true}'

    async def begin() -> asyncio.Task[Any]:
        task = asyncio.ensure_future(api.call("POST", "/v1/responses", body, headers=ME))
        await backend.is_asked.wait()
        await backend.streams[-1].begun.wait()
        return task

    return runner.run(begin())


def release(task: asyncio.Task[Any], runner: asyncio.Runner, backend: Backend) -> Any:
    async def end() -> Any:
        backend.streams[-1].released.set()
        return await task

    return runner.run(end())


def test_what_is_streamed_is_its_owner_s_alone(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend, store: ResponseStore
) -> None:
    api, runner = app
    task = stream_of(api, runner, backend)
    path = f"/v1/responses/{ID}"
    assert json.loads(api.request("GET", path, headers=ME).body)["status"] == "in_progress"
    assert api.request("GET", path, headers=YOU).status == 404
    assert api.request("POST", f"{path}/cancel", b"{}", headers=YOU).status == 404
    assert not backend.cancelled
    answer = release(task, runner, backend)
    assert answer.body.endswith(backend.last)
    kept = store.find(owner_of(dict(ME)), ID)
    assert kept is not None and kept.response["status"] == "completed"
    assert api.request("POST", f"{path}/cancel", b"{}", headers=ME).status == 400


def test_a_cancelled_response_is_kept_before_its_stream_has_ended(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend, store: ResponseStore
) -> None:
    api, runner = app
    task = stream_of(api, runner, backend)
    answer = api.request("POST", f"/v1/responses/{ID}/cancel", b"{}", headers=ME)
    assert answer.status == 200 and backend.cancelled == [ID]
    kept = store.find(owner_of(dict(ME)), ID)
    assert kept is not None and kept.response["status"] == "cancelled"
    # whoever deletes it then does not find it again when its reader has read on
    assert api.request("DELETE", f"/v1/responses/{ID}", headers=ME).status == 200
    release(task, runner, backend)
    assert store.find(owner_of(dict(ME)), ID) is None


def test_an_event_that_a_dying_worker_cut_is_passed_on_and_not_kept(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend, store: ResponseStore
) -> None:
    api, runner = app
    error = b'\n\nevent: error\ndata: {"type":"error"}\n\n'
    backend.last = frame("completed", "completed")[:60] + error
    answer = release(stream_of(api, runner, backend), runner, backend)
    assert answer.body.endswith(error)
    assert store.find(owner_of(dict(ME)), ID) is None
    assert api.request("GET", f"/v1/responses/{ID}", headers=ME).status == 404


def test_an_error_is_passed_on_and_not_kept(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend, store: ResponseStore
) -> None:
    api, runner = app
    backend.last = b'event: error\ndata: {"type":"error"}\n\n'
    answer = release(stream_of(api, runner, backend), runner, backend)
    assert answer.body.endswith(backend.last)
    assert store.find(owner_of(dict(ME)), ID) is None
    assert api.request("GET", f"/v1/responses/{ID}", headers=ME).status == 404


@pytest.mark.parametrize("name", ["compact", "input_tokens"])
def test_a_route_that_is_not_here_is_no_id(
    app: tuple[RunningApp, asyncio.Runner], name: str
) -> None:
    answer = app[0].request("POST", f"/v1/responses/{name}", b"{}", headers=ME)
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert f"no route POST /v1/responses/{name}" in answer.error["message"]


def test_words_of_an_answer_are_no_event(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend, store: ResponseStore
) -> None:
    api, runner = app
    said = "x\nevent: response.completed\ndata: {}\n\n"
    event = json.dumps({"type": "response.output_text.delta", "delta": said})
    backend.last = f"event: response.output_text.delta\ndata: {event}\n\n".encode()
    release(stream_of(api, runner, backend), runner, backend)
    assert store.find(owner_of(dict(ME)), ID) is None


@pytest.mark.parametrize("size", [100, 1 << 20])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_last_event_that_comes_in_pieces_is_kept(
    app: tuple[RunningApp, asyncio.Runner],
    backend: Backend,
    store: ResponseStore,
    size: int,
    newline: str,
) -> None:
    """A relay passes on a very long one as it comes."""
    api, runner = app
    output = ["x" * (3 * size)]
    event = {"type": "response.completed", "response": {"id": ID, "output": output}}
    text = f"event: response.completed\ndata: {json.dumps(event)}\n\n"
    backend.last = text.replace("\n", newline).encode()
    backend.piece_size = size
    answer = release(stream_of(api, runner, backend), runner, backend)
    assert answer.body.endswith(backend.last)
    kept = store.find(owner_of(dict(ME)), ID)
    assert kept is not None and kept.response["output"] == output


def test_files_are_read_beside_the_loop(backend: Backend, store: ResponseStore) -> None:
    """However the name of the field is spelled."""
    threads: list[threading.Thread] = []

    class Noting(ResponseStore):
        def find(self, owner: bytes, response_id: str) -> KeptResponse | None:
            threads.append(threading.current_thread())
            return None

    app = FastAPI()
    ResponseDoor(Noting(Path("none")), backend).add_to(app)
    install_error_handlers(app)
    with running(app) as api:
        body = b'{"model":"m","previous\\u005fresponse_id":"r","input":"x"}'
        assert api.request("POST", "/v1/responses", body, headers=ME).status == 400
    [thread] = threads
    assert thread is not threading.current_thread()


@pytest.mark.parametrize(("num_bytes", "is_inline"), [(60_000, True), (70_000, False)])
def test_a_large_first_event_is_read_beside_the_loop(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend, monkeypatch: pytest.MonkeyPatch,
    num_bytes: int, is_inline: bool,
) -> None:  # fmt: skip
    """It repeats the instructions and the tools of the request."""
    threads: list[threading.Thread] = []
    read = response_door._response_in

    def noting(event: bytes) -> Any:
        threads.append(threading.current_thread())
        return read(event)

    monkeypatch.setattr(response_door, "_response_in", noting)
    backend.first = frame("created", "in_progress", instructions="x" * num_bytes)
    api, runner = app
    task = stream_of(api, runner, backend)
    assert (threads == [threading.current_thread()]) == is_inline and len(threads) == 1
    told = json.loads(api.request("GET", f"/v1/responses/{ID}", headers=ME).body)
    assert (told["status"], len(told["instructions"])) == ("in_progress", num_bytes)
    answer = release(task, runner, backend)
    assert backend.first + backend.last in answer.body
    assert threads[1] is not threading.current_thread()


@pytest.mark.parametrize(
    ("dropped", "told"),
    [("0-4,6", "0-1,3"), ("0-2", None), ("3", "0"), ("2-5", "0-2"), (None, None)],
)
def test_what_gave_way_is_told_by_the_client_s_own_places(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend, store: ResponseStore,
    dropped: str | None, told: str | None,
) -> None:  # fmt: skip
    kept = KeptResponse({"id": "resp_0", "output": [{"type": "message"}]}, [{}, {}])
    store.add(owner_of(dict(ME)), kept)
    backend.headers = {} if dropped is None else {MESSAGES_HEADER: dropped, TOKENS_HEADER: "9"}
    api, runner = app
    for previous, expected in (("resp_0", told), (None, dropped)):
        body = {"model": "fake", "input": "hi", "previous_response_id": previous}

        async def ask(body: bytes) -> Any:
            task = asyncio.ensure_future(api.call("POST", "/v1/responses", body, headers=ME))
            await backend.is_asked.wait()
            backend.streams[-1].released.set()
            return await task

        backend.is_asked.clear()
        answer = runner.run(ask(json.dumps(body).encode()))
        assert answer.headers.get(MESSAGES_HEADER) == expected
        assert answer.headers.get(TOKENS_HEADER) == backend.headers.get(TOKENS_HEADER)


def test_owners() -> None:
    assert owner_of({}) == b""
    key = owner_of({"authorization": "Bearer me"})
    assert key == owner_of({"authorization": "bearer  me "}) == owner_of({"x-api-key": "me"})
    assert key != owner_of({"x-api-key": "you"}) and b"me" not in key and len(key) == 32


def test_a_large_body_goes_on_as_it_came(
    app: tuple[RunningApp, asyncio.Runner], backend: Backend
) -> None:
    api, runner = app
    backend.last = frame("completed", "completed")
    body = {"model": "fake", "input": "x" * (MAX_BODY_BYTES // 8), "stream": True}

    async def ask() -> Any:
        task = asyncio.ensure_future(
            api.call("POST", "/v1/responses", json.dumps(body).encode(), headers=ME)
        )
        await backend.is_asked.wait()
        backend.streams[-1].released.set()
        return await task

    assert runner.run(ask()).status == 200
    assert backend.bodies == [body]


class HangingEngine(FakeEngine):
    def __init__(self) -> None:
        super().__init__(hangs=True)
        self.has_begun = asyncio.Event()

    def note_event(self, seq_id: str) -> None:
        super().note_event(seq_id)
        self.has_begun.set()


def test_a_worker_s_own_lock() -> None:
    """Behind a controller the salt says whose a stream is."""
    token = "control-token"
    engine = HangingEngine()
    policy = AccessPolicy.build("127.0.0.1", api_keys=[token])
    edge = create_worker_app(engine, FakeModel(), policy=policy, control_token=token)
    mine, yours = ("a" * 64, "b" * 64)

    def headers(salt: str) -> list[tuple[str, str]]:
        return [
            ("authorization", f"Bearer {token}"),
            ("x-chatserve-cache-salt", salt),
            ("content-type", "application/json"),
        ]

    with running(edge) as api:
        runner = api.runner

        async def begin() -> asyncio.Task[Any]:
            body = b'{"model":"fake","input":"hi","stream":true}'
            task = asyncio.ensure_future(
                api.call("POST", "/v1/responses", body, headers=headers(mine))
            )
            await engine.has_begun.wait()
            return task

        task = runner.run(begin())
        response_id = engine.submitted[0].seq_id.removesuffix("-0")
        path = f"/v1/responses/{response_id}/cancel"
        assert api.request("POST", path, b"{}", headers=headers(yours)).status == 404
        assert not task.done()
        answer = api.request("POST", path, b"{}", headers=headers(mine))
        assert json.loads(answer.body)["status"] == "cancelled"
        assert b"event: response.incomplete" in runner.run(_result(task)).body
        assert api.request("POST", path, b"{}", headers=headers(mine)).status == 404


def test_a_reader_who_stalls_keeps_no_engine_busy(store: ResponseStore) -> None:
    engine = FakeEngine(hangs=True)
    edge = create_worker_app(engine, FakeModel(), response_store=store)
    path = "/v1/responses"

    async def stalling(scope: Any, receive: Any, send: Any) -> None:
        async def send_some(message: Any) -> None:
            await send(message)
            if b"response.output_text.delta" in message.get("body", b""):
                has_stalled.set()
                await reads_on.wait()

        await edge(scope, receive, send_some if scope.get("path") == path else send)

    with running(stalling) as api:
        has_stalled, reads_on = asyncio.Event(), asyncio.Event()

        async def cancel() -> Any:
            body = b'{"model":"fake","input":"hi","stream":true}'
            kind = [("content-type", "application/json")]
            stream = asyncio.ensure_future(api.call("POST", path, body, headers=kind))
            await has_stalled.wait()
            one = f"{path}/{engine.submitted[0].seq_id.removesuffix('-0')}"
            async with asyncio.timeout(20):
                cancelled = await api.call("POST", f"{one}/cancel", b"{}", headers=kind)
            assert engine.aborted == [engine.submitted[0].seq_id]
            kept = await api.call("GET", one, headers=kind)
            reads_on.set()
            return json.loads(cancelled.body), json.loads(kept.body), (await stream).body

        cancelled, kept, stream = api.runner.run(cancel())
    assert cancelled == kept and cancelled["status"] == "cancelled"
    *_, last, rest = stream.split(b"\n\n")
    name, _, data = last.partition(b"\ndata: ")
    assert name == b"event: response.incomplete" and not rest
    assert json.loads(data)["response"] == cancelled


async def _result(task: asyncio.Task[Any]) -> Any:
    return await task
