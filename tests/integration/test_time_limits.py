"""The four limits as clients of each API see them, and what health says of an engine that hangs.

A real engine behind a real server; its network hangs when the test says so.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.deadlines import NO_LIMITS
from chatserve.engine.engine import Engine
from chatserve.options import TimeLimits
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.model_slot import ModelSlot
from chatserve.server.worker import create_slot_app
from tests import tiny
from tests.fakes import FakeModel
from tests.servers import RunningServer, http_request, read_until, send_raw, serving
from tests.unit.engine.scripted import NUM_KV_TOKENS, ByteTokenizer
from tests.unit.engine.test_deadlines import Hanging

WAIT_S = 30.0
LIMIT_S = 0.3
CHUNKED_END = b"0\r\n\r\n"
FIRST_TOKEN = {
    "/v1/chat/completions": b'"content":"', "/v1/completions": b'"text":"',
    "/v1/responses": b"output_text.delta", "/v1/messages": b"text_delta",
}  # fmt: skip
PATHS = list(FIRST_TOKEN)


class Clinic:
    """A worker whose engine can be made to hang, with one limit."""

    def __init__(self, stack: ExitStack, limits: TimeLimits) -> None:
        self.network = Hanging()
        self.network.step_s = 0.005
        engine = Engine(
            self.network, ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS, max_num_seqs=len(PATHS)
        )
        self.engine = AsyncEngine(engine, max_num_seqs=len(PATHS), limits=limits)

        def build() -> Edge:
            self.engine.start()
            slot = ModelSlot(["fake"], stall_s=LIMIT_S)
            slot.fill(self.engine, FakeModel(vocab_size=tiny.VOCAB_SIZE, context_length=5000))
            return create_slot_app(slot, policy=AccessPolicy())

        self.server: RunningServer = stack.enter_context(serving(build))
        stack.callback(lambda: self.server.call(self.engine.stop()))
        stack.callback(self.go_on)

    def hang(self) -> None:
        self.network.gate.clear()
        self.network.hangs_at = 0

    def go_on(self) -> None:
        self.network.hangs_at = None
        self.network.gate.set()
        deadline = time.monotonic() + WAIT_S
        while (stats := self.engine.stats()).num_running or stats.num_waiting:
            assert time.monotonic() < deadline, "a sequence that was given up goes on"
            time.sleep(0.001)
        assert stats.free_kv_tokens == NUM_KV_TOKENS

    def body(self, path: str, *, stream: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {"model": "fake", "stream": stream, "max_tokens": 2000}
        if path == "/v1/responses":
            body = {"model": "fake", "stream": stream, "input": "hi", "max_output_tokens": 2000}
        elif path == "/v1/completions":
            body["prompt"] = "hi"
        else:
            body["messages"] = [{"role": "user", "content": "hi"}]
        # a sampled end would give its turn to who waits
        return body | {"temperature": 0}

    def ask(self, path: str) -> httpx.Response:
        return httpx.post(self.server.url + path, json=self.body(path), timeout=WAIT_S)

    def ask_everywhere(self) -> dict[str, httpx.Response]:
        """On all paths at once."""
        with ThreadPoolExecutor(len(PATHS)) as pool:
            return dict(zip(PATHS, pool.map(self.ask, PATHS), strict=True))

    def open(self, path: str) -> closing[socket.socket]:
        """A stream that is not read yet."""
        request = http_request("POST", path, self.body(path, stream=True))
        return closing(send_raw(self.server.port, request))

    def stream_everywhere(self, *, hangs_after_first: bool) -> dict[str, bytes]:
        """All that streams on all paths say, to the end."""
        if not hangs_after_first:
            self.hang()
        with ExitStack() as stack:
            socks = {path: stack.enter_context(self.open(path)) for path in PATHS}
            begun = dict.fromkeys(PATHS, b"")
            if hangs_after_first:
                begun = {path: read_until(socks[path], FIRST_TOKEN[path]) for path in PATHS}
                self.hang()
            return {path: begun[path] + read_until(socks[path], CHUNKED_END) for path in PATHS}


Clinics = Callable[[str], Clinic]


@pytest.fixture(scope="module")
def open_clinics() -> Iterator[Clinics]:
    with ExitStack() as stack:
        clinics: dict[str, Clinic] = {}

        def clinic_with(limit: str) -> Clinic:
            if limit not in clinics:
                clinics[limit] = Clinic(stack, replace(NO_LIMITS, **{limit: LIMIT_S}))
            return clinics[limit]

        yield clinic_with


@pytest.fixture
def clinic_with(open_clinics: Clinics) -> Iterator[Clinics]:
    """One of those that are open, healthy at the end."""
    used: list[Clinic] = []

    def clinic_with(limit: str) -> Clinic:
        used.append(open_clinics(limit))
        return used[-1]

    yield clinic_with
    for clinic in used:
        clinic.go_on()


def message_in(path: str, data: bytes) -> str:
    """Of the error event that ends a stream, in the words of its API."""
    assert data.endswith(CHUNKED_END) and b"[DONE]" not in data
    assert b"message_stop" not in data and b"response.completed" not in data
    event = json.loads(data[data.rindex(b"data: {") + 6 :].partition(b"\n\n")[0])
    if path == "/v1/responses":
        assert event["type"] == "response.failed"
        event = event["response"]
    return str(event["error"]["message"])


@pytest.mark.parametrize(
    ("limit", "hangs_after_first", "words"),
    [
        ("first_token_timeout_s", False, "no token has come"),
        ("token_gap_timeout_s", False, "the engine has made no step"),
        ("token_gap_timeout_s", True, "no further token has come"),
        ("request_timeout_s", True, "the answer has taken"),
    ],
)
def test_a_stream_ends_with_the_limit_that_it_met(
    clinic_with: Clinics, limit: str, hangs_after_first: bool, words: str
) -> None:
    streams = clinic_with(limit).stream_everywhere(hangs_after_first=hangs_after_first)
    for path, data in streams.items():
        assert words in message_in(path, data), path


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ("first_token_timeout_s", "first_token_timeout"),
        ("token_gap_timeout_s", "worker_stalled"),
        ("request_timeout_s", "request_timeout"),
    ],
)
def test_a_whole_answer_is_refused_with_the_limit_that_it_met(
    clinic_with: Clinics, limit: str, code: str
) -> None:
    clinic = clinic_with(limit)
    clinic.hang()
    for path, response in clinic.ask_everywhere().items():
        assert response.status_code == 504
        error = response.json()["error"]
        assert f"{LIMIT_S:g} s" in error["message"] and "limit" in error["message"]
        if path != "/v1/messages":
            assert (error["code"], error["type"]) == (code, "server_error")


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_too_long_for_its_turn(clinic_with: Clinics, stream: bool) -> None:
    clinic = clinic_with("queue_timeout_s")
    path = PATHS[0]
    with ExitStack() as stack:
        for _ in PATHS:
            first = stack.enter_context(clinic.open(path))
            read_until(first, FIRST_TOKEN[path])
        if stream:
            late = stack.enter_context(clinic.open(path))
            assert "for its turn" in message_in(path, read_until(late, CHUNKED_END))
        else:
            response = clinic.ask(path)
            assert (response.status_code, response.json()["error"]["code"]) == (
                504, "queue_timeout",
            )  # fmt: skip
        # those who have a turn keep it
        assert FIRST_TOKEN[path] in read_until(first, FIRST_TOKEN[path])


def test_the_official_client_raises(clinic_with: Clinics) -> None:
    clinic = clinic_with("token_gap_timeout_s")
    base_url = f"{clinic.server.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], stream=True, max_tokens=2000
        )
        with pytest.raises(openai.APIError) as caught:
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    clinic.hang()
    assert caught.value.code == "token_gap_timeout"


def test_health_tells_of_an_engine_that_hangs_also_when_nobody_waits(clinic_with: Clinics) -> None:
    clinic = clinic_with("token_gap_timeout_s")
    url = clinic.server.url

    def statuses() -> set[tuple[int, str]]:
        answers = [httpx.get(f"{url}/health/{each}") for each in ("ready", "decode")]
        assert httpx.get(f"{url}/health/live").status_code == 200
        return {(each.status_code, each.json()["status"]) for each in answers}

    assert statuses() == {(200, "ready"), (200, "decoding")}
    clinic.hang()
    assert clinic.ask(PATHS[0]).json()["error"]["code"] == "worker_stalled"
    assert statuses() == {(503, "stalled")}
    # who comes now need not wait for the limit
    assert clinic.ask(PATHS[0]).json()["error"]["code"] == "worker_stalled"
    clinic.go_on()
    assert statuses() == {(200, "ready"), (200, "decoding")}
