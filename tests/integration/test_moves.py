"""A request goes on at another worker when its own is lost, and the client sees one answer.

Workers are scripts here, so that what they have said when they are lost is exact.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from chatserve.errors import ShuttingDown
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.protocol.sse import DONE_FRAME, PING, encode_comment, encode_event
from chatserve.server import controller, moves
from chatserve.server.leases import Worker
from chatserve.server.moves import ResumePolicy
from chatserve.server.registry import WorkerRegistry
from tests.house import CHAT, STREAM, TOKEN, House
from tests.servers import STREAM_HEAD, Script, ScriptedWorker, chunked, read_until

HEAD = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nX-Chatserve-Journal: 1\r\n\r\n")
START = b':s {"id":"x","fingerprint":"fp"}\n\n'
BEGIN = chunked(encode_event("role") + START)
LAST = chunked(encode_event("usage") + DONE_FRAME + b":e\n\n") + chunked(b"")
WHOLE = b"".join(map(encode_event, ["role", "0", "1", "2", "3", "usage"])) + DONE_FRAME
DIED = b"HTTP/1.1 200 OK\r\nContent-"
SLOW = ResumePolicy(timeout_s=30.0)


def token(i: int) -> bytes:
    return chunked(encode_event(str(i)) + b":t 0 %d\n\n" % i)


def status(fingerprint: str = "fp", state: Any = "ready", **progress: int) -> WorkerStatus:
    card = ModelCard(name="fake", created=1, description={"fingerprint": fingerprint})
    return WorkerStatus(state=state, models=[card], **progress)


FULL = [HEAD, BEGIN, *map(token, range(4)), LAST]
REST = [HEAD, chunked(START), *map(token, (2, 3)), LAST]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def house_of(stack: ExitStack, policy: ResumePolicy = SLOW, **limits: float) -> House:
    return House(stack, policy, WorkerRegistry(time.monotonic, **limits))


def add(house: House, worker_id: str, *scripts: Script) -> ScriptedWorker:
    return house.add_scripted(worker_id, *scripts, status=status())


def body_of(request: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.partition(b"\r\n\r\n")[2])
    return found


def frames_of(content: bytes) -> bytes:
    return content.replace(PING, b"")


def unchunked(answer: bytes) -> bytes:
    """The body of an answer that was read from its socket."""
    rest = answer.partition(b"\r\n\r\n")[2]
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


def last_error(content: bytes) -> dict[str, Any]:
    assert b"[DONE]" not in content
    data = content.rstrip(b"\n").rpartition(b"data: ")[2]
    found: dict[str, Any] = json.loads(data)
    return found.get("error", found)


def read_answer(sock: socket.socket) -> bytes:
    return read_until(sock, b"0\r\n\r\n")


def test_blocks_are_for_the_controller_alone(stack: ExitStack) -> None:
    house = house_of(stack)
    worker = add(house, "a", FULL)
    response = house.post()
    assert response.content == WHOLE
    assert "x-chatserve-journal" not in response.headers
    assert b"X-Chatserve-Journal: 1" in worker.requests[0]


@pytest.mark.parametrize(
    "cut",
    [
        [],
        [chunked(b"data: ha")],
        [chunked(encode_event("2"))],
        [chunked(encode_event("2") + b":t 0 2")],
        [chunked(encode_event("2")), chunked(b"")],
        [chunked(b"")],
        [b"xyz\r\n"],
        [chunked(b':x {"error":{"message":"m","type":"t","param":null,"code":"c"}}\n\n')],
    ],
    ids=str,
)
def test_another_worker_goes_on(stack: ExitStack, cut: list[bytes]) -> None:
    house = house_of(stack)
    has_come = threading.Event()
    first = add(house, "a", [HEAD, BEGIN, token(0), token(1), has_come, *cut])
    second = add(house, "b", REST)
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("1"))
        has_come.set()
        content += read_answer(sock)
    assert frames_of(unchunked(content)) == WHOLE
    assert len(first.requests) == 1
    head = second.requests[0].partition(b"\r\n\r\n")[0]
    assert head.startswith(b"POST /control/resume ")
    assert f"Authorization: Bearer {TOKEN}".encode() in head
    asked = body_of(second.requests[0])
    assert json.loads(asked.pop("body")) == STREAM
    journal = START.decode() + ":t 0 0\n\n:t 0 1\n\n"
    assert asked == {"path": "/v1/chat/completions", "journal": journal}
    house.wait_until_idle()


def test_again_and_again(stack: ExitStack) -> None:
    house = house_of(stack)
    have_come = [threading.Event() for _ in range(3)]
    add(house, "a", [HEAD, BEGIN, token(0), have_come[0]])
    for i in (1, 2):
        add(house, "ab"[i - 1] + "2", [HEAD, chunked(START), token(i), have_come[i]])
    last = add(house, "d", [HEAD, chunked(START), token(3), LAST])
    content = b""
    with closing(house.open()) as sock:
        for i, has_come in enumerate(have_come):
            content += read_until(sock, encode_event(str(i)))
            has_come.set()
        content += read_answer(sock)
    assert frames_of(unchunked(content)) == WHOLE
    journal = START.decode() + "".join(f":t 0 {i}\n\n" for i in range(3))
    assert body_of(last.requests[0])["journal"] == journal


def test_nothing_but_the_end_is_left_to_say(stack: ExitStack) -> None:
    house = house_of(stack)
    add(house, "a", FULL[:-1])
    add(house, "b", [HEAD, chunked(START), LAST])
    assert frames_of(house.post().content) == WHOLE


def test_an_end_that_is_there_is_the_end(stack: ExitStack) -> None:
    house = house_of(stack)
    # the connection breaks behind the last block
    add(house, "a", [*FULL[:-1], LAST.removesuffix(chunked(b""))])
    other = add(house, "b", [])
    assert house.post().content == WHOLE
    assert other.requests == [] and house.registry._workers["a"].num_ejections == 0


def test_switched_off(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(is_on=False))
    first = add(house, "a", [STREAM_HEAD, chunked(encode_event("0"))])
    other = add(house, "b", FULL)
    content = house.post().content
    assert content.startswith(encode_event("0")) and last_error(content)["code"] == "worker_died"
    assert other.requests == [] and b"Journal" not in first.requests[0]


@pytest.mark.parametrize(
    ("path", "begin", "event"),
    [
        ("chat/completions", encode_event("role"), {"code": "worker_died"}),
        (
            "responses",
            encode_event(
                '{"type":"response.created","response":{"id":"r"},"sequence_number":4}',
                "response.created",
            ),
            {"type": "error", "code": "worker_died", "sequence_number": 5},
        ),
        ("messages", encode_event("{}", "message_start"), {"type": "api_error"}),
    ],
)
def test_nobody_goes_on(stack: ExitStack, path: str, begin: bytes, event: dict[str, Any]) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=0.05))
    add(house, "a", [HEAD, chunked(begin + START)])
    answer = httpx.post(f"{house.url}/v1/{path}", json=STREAM | {"max_tokens": 9, "input": "x"})
    assert answer.content.startswith(begin + PING)
    found = last_error(answer.content)
    assert {name: found.get(name) for name in event} == event
    house.wait_until_idle()


def test_what_the_worker_said_is_told_when_nobody_goes_on(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=0.05))
    told = {"message": "too long", "type": "server_error", "param": None, "code": "worker_stalled"}
    said = chunked(b":x %s\n\n" % json.dumps({"error": told}).encode())
    add(house, "a", [HEAD, BEGIN, token(0), said, chunked(b"")])
    assert last_error(house.post().content) == told


def test_the_only_worker_comes_back(stack: ExitStack) -> None:
    house = house_of(stack, ResumePolicy(timeout_s=30.0, ping_s=0.01))
    die = threading.Event()
    add(house, "a", [HEAD, BEGIN, token(0), token(1), die])
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("1"))
        die.set()
        # keep-alive comments as long as it takes
        for _ in range(3):
            content += read_until(sock, PING)
        house.do(lambda: house.registry.remove("a"))
        add(house, "again", REST)
        content += read_answer(sock)
    assert [content.count(b"data: %d\n" % i) for i in range(4)] == [1, 1, 1, 1]
    assert content.count(b"data: role") == content.count(b"[DONE]") == 1
    house.wait_until_idle()


@pytest.mark.parametrize("is_guarded", [True, False])
def test_only_the_very_same_numbers_go_on(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, is_guarded: bool
) -> None:
    if not is_guarded:
        monkeypatch.setattr(Worker, "fingerprint", lambda _worker, _model: "fp")
    house = house_of(stack, ResumePolicy(timeout_s=0.05))
    add(house, "a", [HEAD, BEGIN, token(0)])
    other = house.add_scripted("b", REST, status=status("other"))
    content = house.post().content
    assert (b"worker_died" in content) == is_guarded == (other.requests == [])


def test_a_worker_that_cannot_go_on_with_this_one_is_passed_over(stack: ExitStack) -> None:
    house = house_of(stack)
    body = b'{"error":{"message":"another date","type":"x","param":null,"code":"cannot_resume"}}'
    refusal = (
        b"HTTP/1.1 409 No\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
    )
    add(house, "a", [HEAD, BEGIN, token(0), token(1)])
    unfit = add(house, "b", [refusal % (len(body), body)], FULL)
    add(house, "c", REST)
    assert frames_of(house.post().content) == WHOLE
    assert len(unfit.requests) == 1
    # it is well, and answers others
    assert house.registry._workers["b"].num_ejections == 0


def test_a_worker_that_cannot_go_on_just_now_is_asked_again(stack: ExitStack) -> None:
    house = house_of(stack)
    # kept open it might be used again while the script closes it
    head = b"HTTP/1.1 503 No\r\nConnection: close\r\nRetry-After: 0\r\n"
    busy = head + b"Content-Length: 2\r\n\r\n{}"
    add(house, "a", [HEAD, BEGIN, token(0), token(1)])
    second = add(house, "b", [busy], [busy], REST)
    assert frames_of(house.post().content) == WHOLE
    assert len(second.requests) == 3


@pytest.mark.parametrize("body", [STREAM, CHAT])
@pytest.mark.parametrize("script", [[], [DIED], [HEAD], [HEAD, chunked(encode_event("role"))]])
def test_who_has_got_nothing_is_asked_for_again(
    stack: ExitStack, body: dict[str, Any], script: list[bytes]
) -> None:
    house = house_of(stack)
    add(house, "a", script)
    second = add(house, "b", FULL)
    response = house.post(body)
    assert (response.status_code, response.content) == (200, WHOLE)
    assert second.requests[0].startswith(b"POST /v1/chat/completions ")
    assert body_of(second.requests[0]) == body


def test_a_queue_place_is_not_an_answer(stack: ExitStack) -> None:
    house = house_of(stack)
    place = encode_comment("queue 3")
    add(house, "a", [HEAD, chunked(place)])
    add(house, "b", FULL)
    assert frames_of(house.post().content) == place + WHOLE


def test_a_worker_that_goes_says_that_another_could_answer(stack: ExitStack) -> None:
    body = b'{"error":{"message":"stopping","type":"x","param":null,"code":"server_shutting_down"}}'
    gone = (
        b"HTTP/1.1 503 No\r\nContent-Type: application/json\r\nX-Chatserve-Journal: x\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    house = house_of(stack, ResumePolicy(timeout_s=0.05))
    add(house, "a", [gone])
    add(house, "b", FULL)
    assert house.post().content == WHOLE
    house.do(lambda: house.registry.remove("b"))
    house.do(lambda: house.registry.remove("a"))
    add(house, "c", [gone], [gone])
    # nobody else: the worker's own words, once the only one has been asked twice
    response = house.post()
    assert (response.status_code, response.json()["error"]["message"]) == (503, "stopping")


@pytest.mark.parametrize(
    ("limit", "num_asked", "code"), [(2, [1, 1, 0], "worker_died"), (99, [1, 1, 1], None)]
)
def test_a_request_that_kills_its_workers(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, limit: int, num_asked: list[int], code: Any
) -> None:
    monkeypatch.setattr(moves, "MAX_FAILURES", limit)
    house = house_of(stack)
    workers = [add(house, name, [DIED]) for name in "ab"]
    workers.append(add(house, "c", FULL))
    response = house.post()
    assert [len(worker.requests) for worker in workers] == num_asked
    assert (response.status_code == 502) == (code is not None)


def test_a_token_that_kills_its_workers(stack: ExitStack) -> None:
    house = house_of(stack)
    add(house, "a", [HEAD, BEGIN, token(0), token(1)])
    # what brings no token is no progress
    poisoned = [add(house, name, [HEAD, chunked(START + b":t 0\n\n")]) for name in "bc"]
    spared = add(house, "d", REST)
    assert last_error(house.post().content)["code"] == "worker_died"
    assert [len(worker.requests) for worker in (*poisoned, spared)] == [1, 1, 0]


def a_little_further_each(house: House) -> tuple[bytes, list[int]]:
    """Four workers die with a token more each, the fifth would not. The answer, and who was asked.

    What comes together with the end of a connection would be lost with it.
    """
    have_come = [threading.Event() for _ in range(4)]
    begins = [[HEAD, BEGIN], *[[HEAD, chunked(START)]] * 3]
    workers = [
        add(house, f"{i}", [*begin, token(i), has_come])
        for i, (begin, has_come) in enumerate(zip(begins, have_come, strict=True))
    ]
    workers.append(add(house, "last", [HEAD, chunked(START), LAST]))
    content = b""
    with closing(house.open()) as sock:
        for i, has_come in enumerate(have_come):
            content += read_until(sock, encode_event(str(i)))
            has_come.set()
        content += read_answer(sock)
    return frames_of(unchunked(content)), [len(worker.requests) for worker in workers]


def test_an_answer_that_kills_its_workers_each_time_a_little_further(stack: ExitStack) -> None:
    content, num_asked = a_little_further_each(house_of(stack))
    assert num_asked == [1, 1, 1, 1, 0]
    error = last_error(content)
    assert error["code"] == "worker_died" and "4 workers were lost" in error["message"]


@pytest.mark.parametrize(("name", "value"), [("MAX_LOSSES", 5), ("LOSSES_WITHIN_S", 0.0)])
def test_losses_of_long_ago_are_forgotten(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    """An answer of a whole day may outlive more workers than that."""
    monkeypatch.setattr(moves, name, value)
    assert a_little_further_each(house_of(stack)) == (WHOLE, [1] * 5)


def hanging(house: House, worker_id: str = "a", stops: threading.Event | None = None) -> Any:
    """A worker that says two tokens and then nothing, until the relay hangs up or `stops`."""
    script: list[Any] = [HEAD, BEGIN, token(0), token(1), stops]
    return add(house, worker_id, script)


def test_a_worker_whose_process_is_gone(stack: ExitStack) -> None:
    house = house_of(stack)
    lost = hanging(house)
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("1"))
        add(house, "b", REST)
        house.do(lambda: house.registry.remove("a"))
        content += read_answer(sock)
    assert b"[DONE]" in content and lost.closed_by_peer.wait(20)


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("how", ["silent", "stalled"])
def test_a_worker_that_hangs(stack: ExitStack, how: str, resumes: bool) -> None:
    limits = {"expiry_s": 0.3} if how == "silent" else {"stall_s": 0.3}
    house = house_of(stack, ResumePolicy(is_on=resumes, timeout_s=30), **limits)
    lost = hanging(house)
    if not resumes:
        # without a journal nothing is taken out
        house.do(lambda: house.registry.heartbeat("a", status(num_running=1, tick=5)))
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("1"))
        # the other worker beats
        beating = threading.Event()
        thread = threading.Thread(target=_beat, args=(house, "b", beating))
        if resumes:
            add(house, "b", REST)
            thread.start()
        content += read_answer(sock)
        beating.set()
        if resumes:
            thread.join()
    assert (b"[DONE]" in content) == resumes
    assert (b"worker_stalled" in content) != resumes
    assert lost.closed_by_peer.wait(20)
    house.wait_until_idle()


def test_without_the_watch_nobody_is_told_of_a_worker_that_hangs(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teeth of the one above."""

    async def asleep(_registry: WorkerRegistry) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(controller, "watch_workers", asleep)
    house = house_of(stack, expiry_s=0.05)
    hanging(house)
    with closing(house.open()) as sock:
        read_until(sock, encode_event("1"))
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def _beat(house: House, worker_id: str, until: threading.Event) -> None:
    while not until.wait(0.02):
        house.do(lambda: house.registry.heartbeat(worker_id, status()))


def test_a_request_without_a_stream_leaves_a_worker_that_hangs(stack: ExitStack) -> None:
    house = house_of(stack)
    lost = add(house, "a", [None])
    with closing(house.open(CHAT)) as sock:
        house.wait_for(lambda: bool(lost.requests))
        add(house, "b", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"])
        house.do(lambda: house.registry.remove("a"))
        assert read_until(sock, b"{}").endswith(b"{}")
    assert lost.closed_by_peer.wait(20)


@pytest.mark.parametrize("goes", ["drains", "leaves", "refuses"])
def test_a_worker_that_goes_is_left_as_soon_as_there_is_another(
    stack: ExitStack, goes: str
) -> None:
    house = house_of(stack)
    lost = hanging(house)
    registry = house.registry
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("1"))
        if goes == "drains":
            house.do(lambda: registry.heartbeat("a", status(state="draining")))
        elif goes == "leaves":
            house.do(lambda: registry.leave("a"))
        else:
            house.do(lambda: registry.eject("a", is_refusing=True))
        # it finishes what it has begun as long as there is nobody else
        assert not lost.closed_by_peer.is_set()
        add(house, "b", REST)
        content += read_answer(sock)
    assert [content.count(b"data: %d\n" % i) for i in range(4)] == [1, 1, 1, 1]
    assert lost.closed_by_peer.wait(20)


@pytest.mark.parametrize("goes", ["drains", "leaves"])
def test_a_worker_that_goes_finishes_what_nobody_else_can(stack: ExitStack, goes: str) -> None:
    house = house_of(stack)
    go_on = threading.Event()
    add(house, "a", [HEAD, BEGIN, token(0), go_on, token(1), token(2), token(3), LAST])
    with closing(house.open()) as sock:
        content = read_until(sock, encode_event("0"))
        if goes == "drains":
            house.do(lambda: house.registry.heartbeat("a", status(state="draining")))
        else:
            house.do(lambda: house.registry.leave("a"))
        house.list("b", "http://127.0.0.1:1", status("other"))
        go_on.set()
        content += read_answer(sock)
    assert b"[DONE]" in content and PING not in content


def test_who_leaves_while_there_is_no_worker(stack: ExitStack) -> None:
    house = house_of(stack)
    add(house, "a", [HEAD, BEGIN, token(0)])
    with closing(house.open()) as sock:
        read_until(sock, PING)
        sock.shutdown(socket.SHUT_RDWR)
    house.wait_until_idle()
    other = add(house, "b", REST)
    assert other.requests == []


def test_who_leaves_while_another_worker_is_asked(stack: ExitStack) -> None:
    house = house_of(stack)
    add(house, "a", [HEAD, BEGIN, token(0)])
    asked = add(house, "b", [None])
    with closing(house.open()) as sock:
        house.wait_for(lambda: bool(asked.requests))
        sock.shutdown(socket.SHUT_RDWR)
    assert asked.closed_by_peer.wait(20)
    house.wait_until_idle()


def test_who_leaves_a_stream_that_has_moved(stack: ExitStack) -> None:
    house = house_of(stack)
    add(house, "a", [HEAD, BEGIN, token(0), token(1)])
    second = add(house, "b", [HEAD, chunked(START), token(2), None])
    with closing(house.open()) as sock:
        read_until(sock, encode_event("2"))
        sock.shutdown(socket.SHUT_RDWR)
    assert second.closed_by_peer.wait(20)
    house.wait_until_idle()
    assert house.registry._workers["b"].num_ejections == 0


def test_who_leaves_before_an_answer_while_there_is_no_worker(stack: ExitStack) -> None:
    house = house_of(stack)
    add(house, "a", [])
    with closing(house.open()) as sock:
        house.wait_for(lambda: house.registry._workers["a"].num_ejections == 1)
        assert house.controller.edge.num_in_flight == 1
        sock.shutdown(socket.SHUT_RDWR)
    house.wait_until_idle()


def test_a_drain_waits_for_nobody(stack: ExitStack) -> None:
    house = house_of(stack)
    add(house, "a", [HEAD, BEGIN, token(0)])
    with closing(house.open()) as sock:
        content = read_until(sock, PING)
        house.do(house.registry.close)
        content += read_answer(sock)
    assert b"worker_died" in content
    # and yet who is there goes on
    add(house, "c", [HEAD, BEGIN, token(0), token(1)])
    add(house, "d", REST)
    assert frames_of(house.post().content) == WHOLE


def test_an_abort_ends_everything(stack: ExitStack) -> None:
    house = house_of(stack)
    hanging(house)
    waiting = add(house, "b", [None])
    add(house, "c", FULL)
    with closing(house.open()) as stream, closing(house.open(CHAT)) as whole:
        content = read_until(stream, encode_event("1"))
        house.wait_for(lambda: bool(waiting.requests))
        house.do(lambda: house.registry.abort(ShuttingDown("the server stops")))
        content += read_answer(stream)
        assert b"server_shutting_down" in content and b"[DONE]" not in content
        assert b"503" in read_until(whole, b"server_shutting_down").partition(b"\r\n")[0]
    house.wait_until_idle()


def test_what_is_too_large_to_keep_ends_with_its_worker(stack: ExitStack) -> None:
    house = house_of(stack)
    long = chunked(encode_event("y" * (2 << 20)) + b":t 0 1\n\n")
    add(house, "a", [HEAD, BEGIN, long, token(2)])
    other = add(house, "b", REST)
    content = house.post().content
    assert b"data: 2\n\n" in content and last_error(content)["code"] == "worker_died"
    assert other.requests == []


def test_a_response_is_cancelled_where_it_has_moved(stack: ExitStack) -> None:
    house = house_of(stack)
    begin = encode_event(
        '{"type":"response.created","response":{"id":"resp_1"},"sequence_number":0}',
        "response.created",
    )
    gone = threading.Event()
    add(house, "a", [HEAD, chunked(begin + START), token(0), gone])
    url = f"{house.url}/v1/responses"
    asked = {"model": "fake", "input": "hi", "stream": True}
    with closing(house.open(asked, "/v1/responses")) as sock:
        read_until(sock, encode_event("0"))
        gone.set()
        read_until(sock, PING)
        waiting = httpx.post(f"{url}/resp_1/cancel", json={})
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (
            503, "no_worker_available",
        )  # fmt: skip
        reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        arrived = threading.Event()
        second = ForkedWorker([HEAD, chunked(START), token(1), arrived, LAST], [reply])
        with second:
            house.list("b", second.url, status())
            read_until(sock, encode_event("1"))
            assert httpx.post(f"{url}/resp_1/cancel", json={}).json() == {}
            arrived.set()
            read_answer(sock)
        assert second.requests[1].startswith(b"POST /v1/responses/resp_1/cancel ")


class ForkedWorker(ScriptedWorker):
    """Answers its requests side by side."""

    def answer(self, connection: socket.socket, script: Script) -> None:
        threading.Thread(target=super().answer, args=(connection, script)).start()
