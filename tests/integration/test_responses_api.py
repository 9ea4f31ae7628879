"""/v1/responses over real sockets, judged by the official client: alone and behind a controller."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from chatserve.errors import GenerationFailed, Overloaded
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.protocol.responses import LOGPROBS
from chatserve.protocol.sse import SSEDecoder
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy
from chatserve.server.preparation import MAX_SCORES
from chatserve.server.registry import WorkerRegistry
from chatserve.server.response_door import owner_of
from chatserve.server.response_store import KeptResponse, ResponseStore
from chatserve.server.units import MAX_HELD_BYTES
from chatserve.server.worker import create_worker_app
from tests.fakes import ANSWER, FakeClock, FakeEngine, FakeModel
from tests.servers import (
    STREAM_HEAD,
    TIMEOUT_S,
    RunningServer,
    ScriptedWorker,
    chunked,
    http_request,
    send_raw,
    serving,
)

TOKEN = "control-token"
ME, YOU = "my-key", "your-key"
TEXT = "".join(ANSWER)
FRONTS = ("worker", "controller")


def status_of() -> WorkerStatus:
    return WorkerStatus(state="ready", models=[ModelCard(name="fake", created=1)])


@contextmanager
def controller(worker_url: str, path: Path | None) -> Iterator[RunningServer]:
    registry = WorkerRegistry(FakeClock())
    policy = AccessPolicy.build("127.0.0.1", api_keys=[ME, YOU], control_token=TOKEN)
    store = None if path is None else ResponseStore(path)
    with serving(
        lambda: create_controller_app(
            registry, control_token=TOKEN, policy=policy, response_store=store
        )
    ) as server:
        registry.register("w", worker_url, status_of())
        yield server


@contextmanager
def front(
    kind: str, path: Path | None, engine: FakeEngine, **model: Any
) -> Iterator[RunningServer]:
    """Where clients come in, with this engine behind it."""
    with ExitStack() as stack:
        if kind == "worker":
            policy = AccessPolicy.build("127.0.0.1", api_keys=[ME, YOU])
            store = None if path is None else ResponseStore(path)
            yield stack.enter_context(
                serving(
                    lambda: create_worker_app(
                        engine, FakeModel(**model), policy=policy, response_store=store
                    )
                )
            )
            return
        policy = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])
        worker = stack.enter_context(
            serving(
                lambda: create_worker_app(
                    engine, FakeModel(**model), policy=policy, control_token=TOKEN
                )
            )
        )
        yield stack.enter_context(controller(worker.url, path))


@contextmanager
def client_of(url: str, key: str = ME) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        yield client


ENGINE = FakeEngine(step_s=0, num_cached=2)


@pytest.fixture(scope="module", params=FRONTS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("store") / "responses.db"
    with front(request.param, path, ENGINE) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server.url) as client:
        yield client


def last_prompt() -> str:
    return bytes(ENGINE.submitted[-1].prompt_ids).decode()


def test_whole(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="fake", input="hi", instructions="be brief", temperature=0.5, metadata={"a": "b"}
    )
    assert response.id.startswith("resp_") and response.status == "completed"
    assert response.output_text == TEXT and response.error is None
    assert (response.instructions, response.temperature) == ("be brief", 0.5)
    assert response.metadata == {"a": "b"} and response.model == "fake"
    usage = response.usage
    assert usage is not None and usage.input_tokens_details.cached_tokens == 2
    assert (usage.output_tokens, usage.total_tokens) == (5, usage.input_tokens + 5)
    assert last_prompt() == "<system>be brief<user>hi"


def test_streamed(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake", input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert tuple(deltas) == ANSWER and final.output_text == TEXT
    assert client.responses.retrieve(final.id).output_text == TEXT


def test_cut(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="hi", max_output_tokens=2)
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    events = list(
        client.responses.create(model="fake", input="hi", max_output_tokens=2, stream=True)
    )
    assert events[-1].type == "response.incomplete"


def test_a_chain(client: openai.OpenAI) -> None:
    first = client.responses.create(model="fake", input="one", instructions="be brief")
    second = client.responses.create(model="fake", input="two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert last_prompt() == f"<user>one<assistant>{TEXT}<user>two", "without its instructions"
    with client.responses.stream(
        model="fake", input=[{"role": "user", "content": "three"}], previous_response_id=second.id
    ) as stream:
        third = stream.get_final_response()
    assert last_prompt() == f"<user>one<assistant>{TEXT}<user>two<assistant>{TEXT}<user>three"
    client.responses.delete(first.id)
    client.responses.create(model="fake", input="x", previous_response_id=third.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(model="fake", input="x", previous_response_id=first.id)
    assert (gone.value.param, gone.value.code) == (
        "previous_response_id", "previous_response_not_found",
    )  # fmt: skip


def test_items_of_a_chain(client: openai.OpenAI) -> None:
    first = client.responses.create(model="fake", input="one")
    second = client.responses.create(model="fake", input="two", previous_response_id=first.id)
    items = [item.to_dict() for item in client.responses.input_items.list(second.id, order="asc")]
    assert [item["role"] for item in items] == ["user", "assistant", "user"]
    assert items[1] == first.output[0].to_dict()
    assert len({item["id"] for item in items}) == 3
    newest = list(client.responses.input_items.list(second.id, limit=2))
    assert [item.id for item in newest] == [item["id"] for item in reversed(items)]
    page = client.responses.input_items.list(second.id, limit=2)
    assert page.has_more and len(page.data) == 2
    rest = client.responses.input_items.list(second.id, after=page.data[-1].id)
    assert [item.id for item in rest.data] == [items[0]["id"]]


def test_deleted(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="hi")
    client.responses.delete(response.id)
    for use in (
        client.responses.retrieve, client.responses.delete, client.responses.cancel,
        client.responses.input_items.list,
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as gone:
            use(response.id)
        assert gone.value.code == "response_not_found"


def test_nobody_sees_another_one_s(server: RunningServer, client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="hi")
    with client_of(server.url, YOU) as other:
        for use in (
            other.responses.retrieve, other.responses.delete, other.responses.cancel,
            other.responses.input_items.list,
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                use(response.id)
        with pytest.raises(openai.BadRequestError):
            other.responses.create(model="fake", input="x", previous_response_id=response.id)
    assert client.responses.retrieve(response.id).id == response.id
    by_header = httpx.get(f"{server.url}/v1/responses/{response.id}", headers={"x-api-key": ME})
    assert by_header.json()["id"] == response.id, "the same key, sent otherwise"


def test_what_is_not_to_be_kept_is_not(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="fake", input="hi", store=False)
    *_, last = client.responses.create(model="fake", input="hi", store=False, stream=True)
    assert last.type == "response.completed"
    for response in (whole, last.response):
        assert response.to_dict()["store"] is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_errors_before_the_first_event_have_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="fake", input="hi", background=True, stream=True)
    assert refused.value.param == "background"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="hi")
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model="fake", input="x" * 2000)
    assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?stream=true", "stream"), ("?starting_after=3", "starting_after"),
        ("/input_items?order=up", "order"), ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"), ("/input_items?limit=x", "limit"),
        ("/input_items?after=nothing", "after"), ("/input_items?before=x", "before"),
    ],
)  # fmt: skip
def test_bad_queries(client: openai.OpenAI, server: RunningServer, query: str, param: str) -> None:
    response = client.responses.create(model="fake", input="hi")
    headers = {"Authorization": f"Bearer {ME}"}
    answer = httpx.get(f"{server.url}/v1/responses/{response.id}{query}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b'{"model":"fake"}', b'{"model":3,"input":"x"}', b'{"input":"x"}',
        b'{"model":"fake","input":[{"type":"function_call"}]}',
        b'{"model":"fake","input":"x","previous_response_id":{}}',
        b'{"model":"fake","input":3,"previous_response_id":"resp_x"}',
        b'{"model":"fake","input":"x","previous_response_id":"resp_x"}',
        b'{"model":"fake","input":' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"model":"fake","input":[null]}',
    ],
)  # fmt: skip
def test_malformed(server: RunningServer, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {ME}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/responses", content=body, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_turns_that_give_way(server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {ME}"}
    items = [{"role": "user", "content": "x" * 990}, {"role": "user", "content": "short"}]
    body = {"model": "fake", "input": items, "truncation": "auto", "instructions": "s"}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, headers=headers)
    usage = answer.json()["usage"]
    # the instructions are no item: they count as none
    assert usage["input_items_dropped"] == [0] and usage["input_tokens_dropped"] > 990
    assert answer.headers["x-chatserve-messages-dropped"] == "0"


@pytest.mark.parametrize("kind", FRONTS)
def test_a_chain_over_a_restart(kind: str, tmp_path: Path) -> None:
    engine, path = FakeEngine(), tmp_path / "responses.db"
    with front(kind, path, engine) as server, client_of(server.url) as client:
        first = client.responses.create(model="fake", input="one")
    with front(kind, path, engine) as server, client_of(server.url) as client:
        client.responses.create(model="fake", input="two", previous_response_id=first.id)
    prompt = bytes(engine.submitted[-1].prompt_ids).decode()
    assert prompt == f"<user>one<assistant>{TEXT}<user>two"


@pytest.mark.parametrize("kind", FRONTS)
def test_without_a_store(kind: str) -> None:
    with front(kind, None, FakeEngine()) as server, client_of(server.url) as client:
        response = client.responses.create(model="fake", input="one")
        assert response.to_dict()["store"] is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError, match="no responses are kept"):
            client.responses.create(model="fake", input="x", previous_response_id=response.id)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="fake", input="x", store=True)
        assert refused.value.param == "store"


@pytest.mark.parametrize("kind", FRONTS)
def test_cancelled_while_it_is_streamed(kind: str, tmp_path: Path) -> None:
    engine = FakeEngine(hangs=True)
    with front(kind, tmp_path / "r.db", engine) as server, client_of(server.url) as client:
        stream = client.responses.create(model="fake", input="hi", stream=True)
        events = [next(stream)]
        [created] = events
        assert created.type == "response.created"
        while events[-1].type != "response.output_text.delta":
            events.append(next(stream))
        assert client.responses.retrieve(created.response.id).status == "in_progress"
        with client_of(server.url, YOU) as other:
            for use in (other.responses.cancel, other.responses.retrieve):
                with pytest.raises(openai.NotFoundError):
                    use(created.response.id)
        cancelled = client.responses.cancel(created.response.id)
        assert cancelled.status == "cancelled" and cancelled.output_text == TEXT
        *_, last = stream
        assert last.type == "response.incomplete" and last.response.status == "cancelled"
        assert last.response.to_dict() == cancelled.to_dict()
        engine.wait_for(lambda engine: bool(engine.aborted))
        assert client.responses.retrieve(created.response.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="has ended already, as cancelled"):
            client.responses.cancel(created.response.id)


@pytest.mark.parametrize("kind", FRONTS)
def test_a_client_that_leaves_ends_its_response(kind: str, tmp_path: Path) -> None:
    engine = FakeEngine(hangs=True)
    with front(kind, tmp_path / "r.db", engine) as server, client_of(server.url) as client:
        with client.responses.create(model="fake", input="hi", stream=True) as stream:
            created = next(stream)
            assert created.type == "response.created"
        engine.wait_for(lambda engine: bool(engine.aborted))
        server.wait_until_idle()
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(created.response.id)


@pytest.mark.parametrize("kind", FRONTS)
def test_an_engine_that_fails(kind: str, tmp_path: Path) -> None:
    engine = FakeEngine(error=GenerationFailed("no luck"))
    with front(kind, tmp_path / "r.db", engine) as server, client_of(server.url) as client:
        *_, last = client.responses.create(model="fake", input="hi", stream=True)
        assert last.type == "response.failed" and last.response.error is not None
        assert last.response.error.message == "no luck"
        assert client.responses.retrieve(last.response.id).status == "failed"
        with pytest.raises(openai.InternalServerError, match="no luck"):
            client.responses.create(model="fake", input="hi")
        engine.refusal = Overloaded("full")
        with pytest.raises(openai.RateLimitError):
            client.responses.create(model="fake", input="hi", stream=True)


def test_a_worker_that_dies_in_the_middle() -> None:
    frame = b'event: response.created\ndata: {"type":"response.created","response":{"id":"r"},'
    first = frame + b'"sequence_number":7}\n\n'
    with (
        ScriptedWorker([STREAM_HEAD, chunked(first)]) as worker,
        controller(worker.url, None) as server,
        client_of(server.url) as client,
    ):
        *_, last = client.responses.create(model="fake", input="hi", stream=True)
        assert last.type == "error" and last.code == "worker_died"
        assert last.sequence_number == 8


def test_a_worker_that_dies_inside_a_long_event() -> None:
    """The beginning of the event is out; what follows counts on from the one before it."""
    first = b'event: response.created\ndata: {"type":"response.created","response":{"id":"r"},'
    first += b'"sequence_number":7}\n\n'
    cut = b'event: response.completed\ndata: {"type":"response.completed","x":"'
    long = chunked(cut + b"x" * (MAX_HELD_BYTES + 1))
    is_read = threading.Event()
    with (
        ScriptedWorker([STREAM_HEAD, chunked(first), long, is_read]) as worker,
        controller(worker.url, None) as server,
    ):
        body = {"model": "fake", "input": "hi", "stream": True}
        headers = {"Authorization": f"Bearer {ME}"}
        data = b""
        with httpx.stream(
            "POST", f"{server.url}/v1/responses", json=body, headers=headers, timeout=30
        ) as answer:
            for chunk in answer.iter_raw():
                data += chunk
                if len(data) > MAX_HELD_BYTES:
                    is_read.set()
    assert data.startswith(first + cut)
    *_, last = SSEDecoder().feed(data[-1000:])
    assert last.event == "error"
    assert json.loads(last.data).items() >= {"code": "worker_died", "sequence_number": 8}.items()


def test_a_conversation_that_grows_too_large(tmp_path: Path) -> None:
    engine = FakeEngine(pieces=["x"])
    long = "x" * 2_100_000
    with (
        front("worker", tmp_path / "r.db", engine, context_length=5_000_000) as server,
        client_of(server.url) as client,
    ):
        first = client.responses.create(model="fake", input=long)
        with pytest.raises(openai.APIStatusError, match="start a new one") as refused:
            client.responses.create(model="fake", input=long, previous_response_id=first.id)
        assert refused.value.status_code == 413


@pytest.mark.parametrize("kind", FRONTS)
def test_a_chain_is_refused_by_the_client_s_own_items(kind: str, tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "r.db")
    user = {"role": "user", "content": "hi"}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    kept = KeptResponse({"id": "resp_1", "output": [call]}, [user])
    store.add(owner_of({"authorization": f"Bearer {ME}"}), kept)
    image = {"role": "user", "content": [{"type": "input_image"}]}
    output = {"type": "function_call_output", "call_id": "c", "output": "1"}
    with front(kind, tmp_path / "r.db", FakeEngine()) as server:
        for own, param in (
            ([output, user, image], "input[2].content[0]"),
            ([output, user, user | {"role": 3}], "input[2].role"),
            ([output, call, user], "input[1].call_id"),
            # the call that has no output is the earlier response's
            ([user], "previous_response_id"),
        ):
            body = {"model": "fake", "input": own, "previous_response_id": "resp_1"}
            answer = httpx.post(
                f"{server.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {ME}"}
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param)
            assert error["message"].startswith(param)


@pytest.mark.parametrize("kind", FRONTS)
def test_a_call_that_was_cut_is_no_part_of_what_goes_on(kind: str, tmp_path: Path) -> None:
    store, engine = ResponseStore(tmp_path / "r.db"), FakeEngine()
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a'}
    output = [{"role": "assistant", "content": "so:"}, call | {"status": "incomplete"}]
    kept = KeptResponse({"id": "resp_1", "output": output}, [{"role": "user", "content": "hi"}])
    store.add(owner_of({"authorization": f"Bearer {ME}"}), kept)
    with front(kind, tmp_path / "r.db", engine) as server, client_of(server.url) as client:
        told = client.responses.create(model="fake", input="go on", previous_response_id="resp_1")
        items = [item.type for item in client.responses.input_items.list(told.id)]
    assert items == ["message"] * 3


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs_that_would_make_events_too_large(is_stream: bool) -> None:
    with front("worker", None, FakeEngine(), context_length=200_000) as server:
        url, headers = f"{server.url}/v1/responses", {"Authorization": f"Bearer {ME}"}
        body: dict[str, Any] = {
            "model": "fake", "input": "hi", "include": [LOGPROBS], "top_logprobs": 20,
            "max_output_tokens": MAX_SCORES // 21, "stream": is_stream,
        }  # fmt: skip
        assert httpx.post(url, json=body, headers=headers).status_code == 200
        for more in (MAX_SCORES // 21 + 1, None):
            refused = httpx.post(url, json=body | {"max_output_tokens": more}, headers=headers)
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, "max_output_tokens")
            assert "at most 49,932" in error["message"]


def test_a_store_that_fails_costs_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    path.write_bytes(b"no database" * 1000)
    path.chmod(0o600)
    with front("worker", path, FakeEngine()) as server, client_of(server.url) as client:
        response = client.responses.create(model="fake", input="hi")
        assert response.output_text == TEXT
        with pytest.raises(openai.InternalServerError) as failed:
            client.responses.retrieve(response.id)
        assert failed.value.code == "storage_failed"


def test_raw_frames(server: RunningServer) -> None:
    headers = {"Authorization": f"Bearer {ME}"}
    body = {"model": "fake", "input": "hi", "stream": True}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in answer.text
    told = [frame.split("\n") for frame in answer.text.removesuffix("\n\n").split("\n\n")]
    for number, (name, data) in enumerate(told):
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number


def test_a_cancel_needs_no_body(server: RunningServer) -> None:
    request = http_request(
        "POST", "/v1/responses/resp_x/cancel",
        headers={"Authorization": f"Bearer {ME}", "Connection": "close", "Content-Length": "0"},
    )  # fmt: skip
    with send_raw(server.port, request) as sock:
        sock.settimeout(TIMEOUT_S)
        assert sock.recv(100).startswith(b"HTTP/1.1 404")
