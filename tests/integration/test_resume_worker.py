"""A worker goes on with streams that another one has begun; the relay's part is done by hand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from chatserve.errors import ChatserveError, GenerationFailed, TokenGapTimeout
from chatserve.protocol.control import (
    GIVEN_UP,
    JOURNAL_HEADER,
    MAX_RESUME_BYTES,
    RESUME_PATH,
    bearer,
)
from chatserve.protocol.fields import MAX_BODY_BYTES
from chatserve.server.edge import AccessPolicy
from chatserve.server.model_slot import ModelSlot
from chatserve.server.worker import create_slot_app, create_worker_app
from tests.fakes import FakeAdapters, FakeEngine, FakeModel
from tests.journals import (
    HEADERS,
    TOKEN,
    Unit,
    resume,
    resume_body,
    stream,
    units_of,
    without_times,
)
from tests.servers import RunningServer, serving

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": "fake", "prompt": ["one", "two"], "stream": True, "n": 2, "max_tokens": 9}
MESSAGE = {**CHAT, "max_tokens": 100}
RESPONSE = {"model": "fake", "input": "hi", "stream": True}
POLICY = AccessPolicy.build("127.0.0.1", api_keys=(TOKEN,), control_token=TOKEN)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(
        lambda: create_worker_app(FakeEngine(), FakeModel(), policy=POLICY, control_token=TOKEN)
    ) as server:
        yield server.url


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "n": 3, "return_token_ids": True}),
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}),
    (
        "/v1/chat/completions",
        {**CHAT, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, "echo": True, "max_tokens": 0}),
    ("/v1/messages", MESSAGE),
    ("/v1/messages", {**MESSAGE, "stop_sequences": ["!"]}),
    ("/v1/responses", RESPONSE),
]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_stream_goes_on_where_it_was_cut(url: str, path: str, body: dict[str, Any]) -> None:
    whole = stream(url, path, body)
    assert whole[0].block.startswith(b":s ") and whole[-1].block == b":e\n\n"
    for place in range(1, len(whole)):
        again = resume(url, path, body, whole[:place])
        assert again[0] == (b"", whole[0].block)
        assert without_times(again[1:]) == without_times(whole[place:]), place


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {**COMPLETION, "n": 1},
    "/v1/messages": MESSAGE,
    "/v1/responses": RESPONSE,
}


@contextlib.contextmanager
def worker(
    engine: FakeEngine | None = None, model: FakeModel | None = None, **options: Any
) -> Iterator[RunningServer]:
    """Behind a controller."""
    app = {"policy": POLICY, "control_token": TOKEN, **options}
    with serving(
        lambda: create_worker_app(engine or FakeEngine(), model or FakeModel(), **app)
    ) as server:
        yield server


def post(url: str, path: str, body: Any, headers: dict[str, str] = HEADERS) -> httpx.Response:
    return httpx.post(url + path, json=body, headers=headers, timeout=60, verify=False)


# --- who has a journal ---


@pytest.mark.parametrize("path", ROUTES)
def test_without_the_header_a_stream_is_what_it_was(url: str, path: str) -> None:
    body = ROUTES[path]
    reply = post(url, path, body, dict(bearer(TOKEN)))
    assert reply.status_code == 200 and JOURNAL_HEADER not in reply.headers
    assert b"\n:" not in reply.content and not reply.content.startswith(b":")
    # but for what differs from answer to answer, the frames are those between the blocks
    frames = b"".join(unit.frames for unit in stream(url, path, body))
    assert len(frames) == len(reply.content)


@pytest.mark.parametrize("path", ROUTES)
def test_a_whole_answer_has_no_journal(url: str, path: str) -> None:
    reply = post(url, path, {**ROUTES[path], "stream": False})
    assert reply.status_code == 200 and JOURNAL_HEADER not in reply.headers


def test_scores_of_a_prompt_are_in_no_journal() -> None:
    body = {**COMPLETION, "echo": True, "logprobs": 1, "max_tokens": 0}
    with worker() as server:
        assert JOURNAL_HEADER not in post(server.url, "/v1/completions", body).headers
        units = stream(server.url, "/v1/completions", COMPLETION)
        reply = post(server.url, RESUME_PATH, resume_body("/v1/completions", body, units[:2]))
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "body"


def test_a_worker_that_is_alone_keeps_no_journal() -> None:
    """There nobody could be told from anybody who knows the header."""
    with worker(policy=None, control_token=None) as server:
        reply = post(server.url, "/v1/chat/completions", CHAT, {JOURNAL_HEADER: "1"})
        assert reply.status_code == 200 and JOURNAL_HEADER not in reply.headers
        assert b"\n:" not in reply.content
        assert post(server.url, RESUME_PATH, {}, {}).status_code == 401


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"x-api-key": "wrong"}])
def test_only_the_control_token_resumes(url: str, headers: dict[str, str]) -> None:
    units = stream(url, "/v1/chat/completions", CHAT)
    body = resume_body("/v1/chat/completions", CHAT, units[:3])
    assert post(url, RESUME_PATH, body, headers).status_code == 401


def test_a_client_of_a_worker_with_keys_gets_no_journal() -> None:
    """Whose key opens the route, but is not the control token."""
    policy = AccessPolicy.build("127.0.0.1", api_keys=("client",), control_token=TOKEN)
    with worker(policy=policy) as server:
        headers = {JOURNAL_HEADER: "1", **bearer("client")}
        reply = post(server.url, "/v1/chat/completions", CHAT, headers)
    assert reply.status_code == 200 and JOURNAL_HEADER not in reply.headers


# --- what goes on is what was begun ---


def test_the_engine_gets_what_it_had(url: str) -> None:
    first, second = FakeEngine(num_cached=3), FakeEngine()
    # a completion counts what came from the cache; a seed that nobody gave is drawn and kept
    body = {**CHAT, "stream_options": {"include_usage": True}}
    with worker(first) as one, worker(second) as other:
        whole = stream(one.url, "/v1/chat/completions", body)
        again = resume(other.url, "/v1/chat/completions", body, whole[:3])
    assert again[1:] == whole[3:]
    assert b'"cached_tokens":3' in again[-1].frames
    [was], [now] = first.submitted, second.submitted
    assert was.params.seed == 1000 and now.params == was.params
    assert now.prompt_ids == was.prompt_ids and now.begun is not None
    assert now.begun.units == ((0,), (1,)) and now.begun.num_cached_tokens == 3


def test_prompts_have_seeds_of_their_own() -> None:
    """Or the same prompt twice would have the same answer twice."""

    class Drawing(FakeEngine):
        drawn = 0

        def draw_seed(self) -> int:
            self.drawn += 1
            return self.drawn

    engine = Drawing()
    with worker(engine) as server:
        stream(server.url, "/v1/completions", COMPLETION)
        stream(server.url, "/v1/completions", {**COMPLETION, "seed": 7})
        post(server.url, "/v1/completions", {**COMPLETION, "n": 1}, dict(bearer(TOKEN)))
    assert [each.params.seed for each in engine.submitted] == [1, 1, 2, 2, 7, 7, 7, 7, None, None]


def test_the_limit_of_the_answer_is_that_of_the_first_worker() -> None:
    """Workers of the same weights may have memory for contexts of different lengths."""
    first, second = FakeEngine(), FakeEngine()
    with worker(first) as one, worker(second, FakeModel(context_length=500)) as other:
        whole = stream(one.url, "/v1/chat/completions", CHAT)
        assert resume(other.url, "/v1/chat/completions", CHAT, whole[:2])[1:] == whole[2:]
    assert first.submitted[0].params.max_tokens == second.submitted[0].params.max_tokens > 500


def test_what_has_been_said_is_not_streamed_again(url: str) -> None:
    for path, body in ROUTES.items():
        whole = stream(url, path, body)
        rest = resume(url, path, body, whole[:-1])
        assert len(rest) == 2 and rest[1].block == b":e\n\n", path
        assert without_times(rest[1:]) == without_times(whole[-1:])


# --- refusals ---

BEGUN = "/v1/chat/completions"


@pytest.fixture(scope="module")
def units(url: str) -> list[Unit]:
    return stream(url, BEGUN, CHAT)[:3]


def start_with(units: list[Unit], **changes: Any) -> list[Unit]:
    start = {**json.loads(units[0].block[3:]), **changes}
    return [Unit(b"", b":s " + json.dumps(start).encode() + b"\n\n"), *units[1:]]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (FakeModel(fingerprint="fp_other"), "the answer was begun by fp_fake"),
        (FakeModel(context_length=4), "where it began, it could be answered"),
        (FakeModel(names=("other",)), "where it began, it could be answered"),
    ],
)
def test_a_worker_that_would_go_on_otherwise_refuses(
    model: FakeModel, why: str, units: list[Unit]
) -> None:
    engine = FakeEngine()
    with worker(engine, model) as server:
        reply = post(server.url, RESUME_PATH, resume_body(BEGUN, CHAT, units))
    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "cannot_resume" and why in reply.text
    assert not engine.submitted


def test_what_is_not_offered_here_is_offered_where_it_began(url: str, units: list[Unit]) -> None:
    """As by a worker without `--lenient`, or without grammars."""
    body = {**CHAT, "response_format": {"type": "json_object"}}
    reply = post(url, RESUME_PATH, resume_body(BEGUN, body, units))
    assert reply.status_code == 409 and "where it began" in reply.text


def test_another_prompt_is_another_answer(url: str, units: list[Unit]) -> None:
    """As of a template that shows today's date."""
    other = {**CHAT, "messages": [{"role": "user", "content": "ho"}]}
    reply = post(url, RESUME_PATH, resume_body(BEGUN, other, units))
    assert reply.status_code == 409 and "another prompt" in reply.text


def test_an_adapter_counts(units: list[Unit]) -> None:
    """Of the same name, but with other numbers."""
    body = {**CHAT, "model": "fake:sql"}
    one, other = FakeModel(adapters=FakeAdapters("sql")), FakeModel(adapters=FakeAdapters("sql"))
    other.adapters.load_below("sql", "other/numbers", replace=True)
    with worker(model=one) as first, worker(model=other) as second:
        whole = stream(first.url, BEGUN, body)
        assert resume(first.url, BEGUN, body, whole[:2])[1:] == whole[2:]
        reply = post(second.url, RESUME_PATH, resume_body(BEGUN, body, whole[:2]))
        assert reply.status_code == 409 and "fp_" in reply.text
        gone = resume_body(BEGUN, {**CHAT, "model": "fake:law"}, whole[:2])
        assert post(second.url, RESUME_PATH, gone).status_code == 409


MALFORMED = [
    b"",
    b":t 0 1\n\n",
    b":s {}\n\n",
    b":s {\n\n",
    b":s []\n\n",
    b"START:t 0 1",
    b"START:t 0 1\n",
    b"START:t 0 x\n\n",
    b"START:t 0  1\n\n",
    b"START:t 0 -1\n\n",
    b"START:t -1 1\n\n",
    b"START:t 99999 1\n\n",
    b"START:t 1 1\n\n",
    b"START:x {}\n\n",
    b"START:e\n\n",
    b"STARTSTART",
    b"START\n\n",
    b"START: ping\n\n",
    b"START:f 0 0\n\n:t 0 1\n\n",
    b"START:t 0 \xd9\xa1\n\n",
    b'START:t 0 0 {"logprobs":1}\n\n',
    b'START:t 0 0 {"logprobs":[[0]]}\n\n',
    b'START:t 0 0 1 {"logprobs":[[0,[]]]}\n\n',
    b'START:t 0 0 {"logprobs":[["a",[]]]}\n\n',
    b'START:t 0 0 {"logprobs":[[0,[[1]]]]}\n\n',
    b'START:t 0 0 {"cached":"x"}\n\n',
    b'START:t 0 0 {"cached":-1}\n\n',
    b"START:t 0 0 {]}\n\n",
]


@pytest.mark.parametrize("journal", MALFORMED)
def test_a_malformed_journal_is_refused(url: str, units: list[Unit], journal: bytes) -> None:
    text = journal.replace(b"START", units[0].block).decode()
    body = {**resume_body(BEGUN, CHAT, units), "journal": text}
    reply = post(url, RESUME_PATH, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "a b"},
        {"id": ""},
        {"created": -1},
        {"created": "1"},
        {"seeds": [2**64]},
        {"seeds": []},
        {"seeds": [1, 2]},
        {"max_tokens": []},
        {"max_tokens": [-1]},
        {"prompts": "x"},
        {"fingerprint": None},
        {"more": 1},
    ],
)
def test_a_start_that_no_worker_writes_is_refused(
    url: str, units: list[Unit], changes: dict[str, Any]
) -> None:
    body = resume_body(BEGUN, CHAT, start_with(units, **changes))
    assert post(url, RESUME_PATH, body).status_code == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "/v1/embeddings"},
        {"path": "/control/resume"},
        {"path": 1},
        {"body": "{"},
        {"body": json.dumps({**CHAT, "stream": False})},
        {"body": json.dumps({**CHAT, "temperature": 9})},
        {"journal": 1},
        {"more": 1},
    ],
)
def test_a_request_that_is_none_is_refused(
    url: str, units: list[Unit], changes: dict[str, Any]
) -> None:
    reply = post(url, RESUME_PATH, {**resume_body(BEGUN, CHAT, units), **changes})
    assert reply.status_code == 400 and reply.json()["error"]["code"], reply.text


def test_a_long_request_with_a_long_journal_fits(url: str, units: list[Unit]) -> None:
    body = resume_body(BEGUN, CHAT, units)
    longest = {**body, "body": body["body"].ljust(MAX_BODY_BYTES)}
    assert post(url, RESUME_PATH, longest).status_code == 200
    too_long = {**body, "body": " " * MAX_RESUME_BYTES}
    assert post(url, RESUME_PATH, too_long).status_code == 413
    # all others are as short as they were
    assert post(url, BEGUN, {**CHAT, "user": " " * MAX_BODY_BYTES}).status_code == 413


def test_a_worker_without_a_model_goes_on_with_nothing(units: list[Unit]) -> None:
    slot = ModelSlot(("fake",))
    with serving(lambda: create_slot_app(slot, policy=POLICY, control_token=TOKEN)) as server:
        reply = post(server.url, RESUME_PATH, resume_body(BEGUN, CHAT, units))
    assert reply.status_code == 503 and reply.headers[JOURNAL_HEADER] == GIVEN_UP


def test_a_worker_that_drains_goes_on_with_nothing(units: list[Unit]) -> None:
    engine = FakeEngine(["a", "b", "c"], hangs=True)
    with worker(engine) as server:
        begun = start_with(units[:1])
        with httpx.stream(
            "POST", server.url + RESUME_PATH, json=resume_body(BEGUN, CHAT, begun), headers=HEADERS
        ) as held:
            assert held.status_code == 200
            # what goes on is under way, and is waited for
            assert server.edge.num_in_flight == 1
            server.edge.drain()
            reply = post(server.url, RESUME_PATH, resume_body(BEGUN, CHAT, units))
            assert reply.status_code == 503
            assert reply.headers[JOURNAL_HEADER] == GIVEN_UP and reply.headers["retry-after"]


# --- how streams end ---


def ended(path: str, engine: FakeEngine, *, stops: bool) -> list[Unit]:
    """A stream of two tokens a choice, and what ended it."""
    body = ROUTES[path]
    with (
        worker(engine) as server,
        httpx.stream("POST", server.url + path, json=body, headers=HEADERS, timeout=60) as reply,
    ):
        data, chunks = b"", reply.iter_raw()
        if stops:
            while data.count(b"\n:t ") < 2 * len(body.get("prompt", ["one"])):
                data += next(chunks)
            server.call(engine.stop())
        return units_of(data + b"".join(chunks))


@pytest.mark.parametrize("path", ROUTES)
def test_an_engine_that_stops_leaves_the_stream_to_others(path: str) -> None:
    *_, last = ended(path, FakeEngine(["a", "b"], hangs=True), stops=True)
    assert last.block.startswith(b":x ") and not last.frames
    error = json.loads(last.block[3:])["error"]
    assert error["code"] == "engine_stopped" and error["message"]


@pytest.mark.parametrize(
    ("error", "mark"),
    [(TokenGapTimeout("no token came"), b":x"), (GenerationFailed("no finite logits"), b":e")],
)
@pytest.mark.parametrize("path", ROUTES)
def test_an_error_is_the_requests_own_or_the_workers(
    path: str, error: ChatserveError, mark: bytes
) -> None:
    *_, last = ended(path, FakeEngine(["a", "b"], error=error), stops=False)
    assert last.block.startswith(mark)
    assert bool(last.frames) == (mark == b":e")
    assert error.message.encode() in last.frames + last.block


@pytest.mark.parametrize("path", ROUTES)
def test_before_a_stream_begins_the_status_says_who_could(path: str) -> None:
    engine = FakeEngine()
    with worker(engine) as server:
        server.call(engine.stop())
        whole = post(server.url, path, {**ROUTES[path], "stream": False})
        engine.refusal = GenerationFailed("no")
        own = post(server.url, path, ROUTES[path])
    assert whole.status_code == 503 and whole.headers[JOURNAL_HEADER] == GIVEN_UP
    assert own.status_code == 500 and JOURNAL_HEADER not in own.headers


def test_a_ping_that_is_a_frame_belongs_to_no_event() -> None:
    engine = FakeEngine(["a"], hangs=True)
    with (
        worker(engine, ping_interval_s=0.01) as server,
        httpx.stream(
            "POST", server.url + "/v1/messages", json=MESSAGE, headers=HEADERS, timeout=60
        ) as reply,
    ):
        data = b""
        for chunk in reply.iter_raw():
            data += chunk
            if data.count(b"event: ping") >= 3:
                break
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    whole = data[: data.rindex(b":p\n\n") + 4]
    assert whole.count(ping) == whole.count(ping + b":p\n\n") >= 2
    start = data.index(b":s ")
    # and between a journal's other blocks they leave no trace
    assert units_of(data[:start] + data[start : data.index(b"\n\n", start) + 2])


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_response_goes_on_where_it_still_is(
    leaves_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first stream is lost, and not known to be: the second is the one to be cancelled."""
    engine = FakeEngine(["a", "b"], hangs=True)
    with worker(engine) as server:

        def begin(path: str, body: Any) -> tuple[httpx.Response, Iterator[bytes]]:
            stack = contexts.pop()
            reply = stack.enter_context(
                httpx.stream("POST", server.url + path, json=body, headers=HEADERS, timeout=60)
            )
            return reply, reply.iter_raw()

        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            contexts = [second, first]
            data, (_, chunks) = b"", begin("/v1/responses", RESPONSE)
            while data.count(b"\n:t ") < 2:
                data += next(chunks)
            begun = units_of(data)
            response_id = json.loads(begun[0].block[3:])["id"]
            _, more = begin(RESUME_PATH, resume_body("/v1/responses", RESPONSE, begun))
            assert next(more).startswith(b":s ")
            if leaves_first:
                first.close()
                engine.wait_for(lambda e: len(e.aborted) == 1)
                # whatever follows the end of the first has happened
                assert post(server.url, "/v1/responses", {**RESPONSE, "input": 5}).is_client_error
            path = f"/v1/responses/{response_id}/cancel"
            cancelled = post(server.url, path, {}, dict(bearer(TOKEN)))
            assert cancelled.json()["status"] == "cancelled"
            *_, last = units_of(b"".join(more))
        assert last.block == b":e\n\n" and b"response.incomplete" in last.frames
        engine.wait_for(lambda e: len(e.aborted) == 2)
        gone = post(server.url, path, {}, dict(bearer(TOKEN)))
        assert gone.status_code == 404
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
