"""More than a server can do: who is refused, who waits, and who learns what of it."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chatserve.engine.admission import Admission
from chatserve.engine.prompt import PromptBuilder
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.door import Door
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.fakes import FakeEngine, FakeModel
from tests.faults.client import LoadClient, Record, Request
from tests.servers import RunningServer, http_request, read_until, reset, send_raw, serving
from tests.turnstile import House, read_tokens, wait_for

DOORS = ["worker", "controller"]
NUM_RUNNING, NUM_WAITING = 4, 8
KEYS = ("key-a", "key-b")
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    return folder


@pytest.fixture(scope="module", params=DOORS)
def open_house(request: pytest.FixtureRequest, folder: Path) -> Iterator[House]:
    with ExitStack() as stack:
        yield House(
            stack, folder, keys=KEYS, is_behind=request.param == "controller",
            max_num_seqs=NUM_RUNNING, max_num_waiting=NUM_WAITING,
        )  # fmt: skip


@pytest.fixture
def house(open_house: House) -> Iterator[House]:
    open_house.close_turnstile()
    yield open_house
    open_house.turnstile.open()
    wait_for(open_house.is_free)
    open_house.wait_until_servers_are_done()
    assert open_house.engine.admission.num_waiting == open_house.engine.admission._total == 0


def asked(house: House, key: str = KEYS[0], **options: Any) -> Request:
    body = {**house.body(), "max_tokens": TOKENS, **options}
    return Request(body, headers={"Authorization": f"Bearer {key}"})


def status(record: Record) -> int:
    return int(record.raw.split(b" ", 2)[1]) if record.raw else 0


def head(record: Record) -> dict[str, str]:
    lines = record.raw.partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")[1:]
    return dict(line.split(": ", 1) for line in lines)


def body(record: Record) -> Any:
    return json.loads(record.raw.partition(b"\r\n\r\n")[2])


def open_when(house: House, num_ended: int, load: LoadClient) -> threading.Thread:
    """Let the engine go once so many requests have ended without it."""

    def watch() -> None:
        try:
            wait_for(lambda: sum(each.end is not None for each in load.records) >= num_ended)
        finally:
            house.turnstile.open()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_exactly_as_many_are_served_as_there_are_places(
    house: House, stream: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_requests = 500 if stream else 60
    chat, num_prompts = PromptBuilder.chat, Counter[str]()

    def counted(self: PromptBuilder, *arguments: Any, **options: Any) -> list[int]:
        num_prompts["chat"] += 1
        return chat(self, *arguments, **options)

    monkeypatch.setattr(PromptBuilder, "chat", counted)
    load = LoadClient(house.front.port, timeout_s=60)
    num_served = NUM_RUNNING + NUM_WAITING
    opener = open_when(house, num_requests - num_served, load)
    requests = [asked(house, stream=stream) for _ in range(num_requests)]
    # this process has PyTorch's objects, too, and no controller would look for garbage in those
    gc.freeze()
    try:
        records = asyncio.run(load.send_all(requests, at_once=num_requests))
    finally:
        gc.unfreeze()
    opener.join()
    assert Counter(map(status, records)) == {200: num_served, 429: num_requests - num_served}
    refused = [each for each in records if status(each) == 429]
    for record in refused:
        assert int(head(record)["retry-after"]) >= 1
        assert body(record)["error"]["code"] == "rate_limit_exceeded"
        assert body(record)["error"]["type"] == "rate_limit_error"
    for record in records:
        if status(record) == 200:
            assert (b"[DONE]" in record.raw) is stream and record.end == "closed"
    # who was refused was not read
    assert num_prompts["chat"] == num_served
    waits = sorted(each.ended_at - each.asked_at for each in refused)
    with capsys.disabled():
        print(f"\n{num_requests} at once: {num_served} served, {len(refused)} refused, of which "
              f"99 % after {waits[int(len(waits) * 0.99)] * 1e3:.0f} ms at most")  # fmt: skip


def test_without_the_door_prompts_are_rendered_in_vain(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teeth of the test above: the engine refuses, too, but only what has been prepared."""
    chat, num_prompts = PromptBuilder.chat, Counter[str]()

    def counted(self: PromptBuilder, *arguments: Any, **options: Any) -> list[int]:
        num_prompts["chat"] += 1
        return chat(self, *arguments, **options)

    monkeypatch.setattr(PromptBuilder, "chat", counted)
    monkeypatch.setattr(Door, "_engine_for", lambda self, scope: None)
    monkeypatch.setattr(WorkerRegistry, "check_room", lambda self, model=None: None)
    load = LoadClient(house.front.port, timeout_s=60)
    num_served = NUM_RUNNING + NUM_WAITING
    opener = open_when(house, 20 - num_served, load)
    records = asyncio.run(load.send_all([asked(house) for _ in range(20)], at_once=20))
    opener.join()
    assert Counter(map(status, records)) == {200: num_served, 429: 20 - num_served}
    assert num_prompts["chat"] == 20


def steps_until_all_are_answered(house: House, load: LoadClient, requests: list[Request]) -> int:
    """In how many steps of the engine, counted from when they ask."""
    before = house.engine.stats().tick
    records = asyncio.run(load.send_all(requests, at_once=len(requests)))
    assert Counter(map(status, records)) == {200: len(requests)}
    return house.engine.stats().tick - before


def flood(house: House, load: LoadClient, count: int) -> threading.Thread:
    """Key A asks so many times, and the house is full of that when this returns."""
    requests = [asked(house) for _ in range(count)]
    thread = threading.Thread(
        target=lambda: asyncio.run(load.send_all(requests, at_once=len(requests)))
    )
    thread.start()
    num_refused = count - NUM_RUNNING - NUM_WAITING
    wait_for(lambda: sum(each.end is not None for each in load.records) >= num_refused)
    return thread


NUM_FEW = 4
"""Of key B: what a full house of 4 + 8 places takes on beyond them."""


def test_a_flood_of_one_key_keeps_no_other_waiting_for_long(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    load = LoadClient(house.front.port, timeout_s=60)
    house.turnstile.open()
    few = [asked(house, KEYS[1]) for _ in range(NUM_FEW)]
    alone = steps_until_all_are_answered(house, load, few)
    house.close_turnstile()
    other = LoadClient(house.front.port, timeout_s=60)
    flooding = flood(house, other, 200)
    opener = threading.Thread(target=lambda: open_when_waiting(house))
    opener.start()
    few = [asked(house, KEYS[1]) for _ in range(NUM_FEW)]
    beside = steps_until_all_are_answered(house, load, few)
    opener.join()
    flooding.join()
    # those of key A that were taken on before have not been turned out
    assert Counter(map(status, other.records)) == {200: NUM_RUNNING + NUM_WAITING, 429: 188}
    assert beside <= 6 * alone
    with capsys.disabled():
        print(f"\nkey B: {NUM_FEW}/{NUM_FEW}, {beside / alone:.1f} times as long as alone")


def open_when_waiting(house: House) -> None:
    places = NUM_RUNNING + NUM_WAITING + NUM_FEW
    wait_for(lambda: house.engine.admission._total >= places)
    house.turnstile.open()


def test_with_one_key_for_all_the_flood_keeps_everybody_out(house: House) -> None:
    """The teeth of the test above."""
    other = LoadClient(house.front.port, timeout_s=60)
    flooding = flood(house, other, 40)
    load = LoadClient(house.front.port, timeout_s=60)
    records = asyncio.run(load.send_all([asked(house) for _ in range(5)], at_once=5))
    assert Counter(map(status, records)) == {429: 5}
    house.turnstile.open()
    flooding.join()


@contextmanager
def crawling(house: House) -> Iterator[None]:
    """The engine makes a step now and then, so that answers take as long as the test wants."""
    stopped = threading.Event()

    def crawl() -> None:
        while not stopped.wait(0.05):
            house.turnstile.admit(1)

    thread = threading.Thread(target=crawl)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def wait_until_in_engine(house: House, num_sequences: int) -> None:
    """So many have been prepared and submitted, in the order in which they came."""

    def is_so() -> bool:
        stats = house.engine.stats()
        return stats.num_running + stats.num_waiting == num_sequences

    wait_for(is_so)


def open_stream(house: House, key: str = KEYS[0], **options: Any) -> socket.socket:
    request = {**house.body(), "stream": True, "max_tokens": 400, **options}
    headers = {"Authorization": f"Bearer {key}"}
    return send_raw(
        house.front.port, http_request("POST", "/v1/chat/completions", request, headers=headers)
    )


def test_who_waits_is_told_the_place_in_the_queue(house: House) -> None:
    with ExitStack() as stack:
        running = [open_stream(house) for _ in range(NUM_RUNNING)]
        wait_until_in_engine(house, NUM_RUNNING)
        first = open_stream(house)
        wait_until_in_engine(house, NUM_RUNNING + 1)
        second = open_stream(house, priority="batch")
        wait_until_in_engine(house, NUM_RUNNING + 2)
        third = open_stream(house)
        for each in (*running, first, second, third):
            stack.callback(each.close)
        with crawling(house):
            # the last one that came is before the one that can wait
            for place, each in ((1, first), (2, third), (3, second)):
                said = read_until(each, b": queue %d\n\n" % place)
                assert b": queue %d\n\n" % place in said and b'"content":"A"' not in said
            reset(first)
            assert b": queue 1\n\n" in read_until(third, b": queue 1\n\n")
            assert b": queue 2\n\n" in read_until(second, b": queue 2\n\n")
            for each in running:
                read_tokens(each, 1)
                reset(each)
            # they have their turn, and say no more of places
            for each in (third, second):
                rest = read_until(each, b'"content":"A"')
                assert b'"content":"A"' in rest and b": queue" not in rest.partition(b'"A"')[2]
                reset(each)


def test_a_place_is_told_when_it_changes_and_once_a_second_at_most(house: House) -> None:
    with ExitStack() as stack:
        running = [open_stream(house) for _ in range(NUM_RUNNING)]
        wait_until_in_engine(house, NUM_RUNNING)
        waiting = open_stream(house)
        for each in (*running, waiting):
            stack.callback(each.close)
        with crawling(house):
            read_until(waiting, b": queue 1\n\n")
            started_at, said = time.monotonic(), b""
            waiting.settimeout(1.5)
            with pytest.raises(TimeoutError):
                while True:
                    said += waiting.recv(65536)
            assert said == b"" and time.monotonic() - started_at > 1
        for each in (*running, waiting):
            reset(each)


def test_batch_leaves_room_and_priority_is_one_of_two_words(house: House) -> None:
    load = LoadClient(house.front.port, timeout_s=60)
    num_batch = NUM_RUNNING + NUM_WAITING * 3 // 4
    opener = open_when(house, 40 - num_batch, load)
    requests = [asked(house, priority="batch") for _ in range(40)]
    records = asyncio.run(load.send_all(requests, at_once=40))
    opener.join()
    assert Counter(map(status, records)) == {200: num_batch, 429: 40 - num_batch}
    for wrong in ("urgent", 0, True, ["batch"]):
        [record] = asyncio.run(load.send_all([asked(house, priority=wrong)], at_once=1))
        assert status(record) == 400 and body(record)["error"]["param"] == "priority"


def full_engine(mean_answer: int) -> FakeEngine:
    """One that has no place, and says a token a second."""
    engine = FakeEngine()
    engine.admission = Admission(1, 2)
    for _ in range(3):
        engine.admission.add(b"")
    engine.admission.pace.mean_answer = mean_answer
    engine.admission.pace.note_step(1, 1.0)
    return engine


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def controller_of(stack: ExitStack, *engines: FakeEngine) -> RunningServer:
    registry = WorkerRegistry(time.monotonic, expiry_s=1000)
    policy = AccessPolicy.build("127.0.0.1", api_keys=("token",))
    for index, engine in enumerate(engines):

        def build(engine: FakeEngine = engine) -> Edge:
            return create_worker_app(engine, FakeModel(), policy=policy, control_token="token")

        worker = stack.enter_context(serving(build))
        card = ModelCard(name="fake", created=1)
        # the first is the one that seems to have the least to do
        said = WorkerStatus(state="ready", models=[card], num_waiting=index)
        registry.register(f"w{index}", worker.url, said)
    return stack.enter_context(
        serving(lambda: create_controller_app(registry, control_token="token"))
    )


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_one_full_worker_does_not_speak_for_the_others(stack: ExitStack, stream: bool) -> None:
    engines = [full_engine(1), full_engine(1), FakeEngine()]
    load = LoadClient(controller_of(stack, *engines).port, timeout_s=60)
    question = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    record = asyncio.run(load.send(Request(question)))
    assert status(record) == 200
    assert [len(engine.submitted) for engine in engines] == [0, 0, 1]


def test_when_all_are_full_the_earliest_time_to_come_back_is_told(stack: ExitStack) -> None:
    engines = [full_engine(20), full_engine(3), full_engine(9)]
    load = LoadClient(controller_of(stack, *engines).port, timeout_s=60)
    question = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    record = asyncio.run(load.send(Request(question)))
    # two wait there, for three tokens each
    assert (status(record), head(record)["retry-after"]) == (429, "6")
    assert body(record)["error"]["code"] == "rate_limit_exceeded"
    assert not any(engine.submitted for engine in engines)


STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/v1/responses": {"input": "hi", "store": False},
}


@pytest.mark.parametrize("path", STREAMS)
def test_the_place_goes_through_on_each_route(stack: ExitStack, path: str) -> None:
    engine = FakeEngine([], hangs=True)
    engine.place = 3
    front = controller_of(stack, engine)
    question = {"model": "fake", "stream": True, **STREAMS[path]}
    sock = send_raw(front.port, http_request("POST", path, question))
    stack.callback(sock.close)
    assert b": queue 3\n\n" in read_until(sock, b": queue 3\n\n")
    engine.place = 1
    assert b": queue 1\n\n" in read_until(sock, b": queue 1\n\n")
    reset(sock)
    engine.wait_for(lambda engine: bool(engine.aborted))
