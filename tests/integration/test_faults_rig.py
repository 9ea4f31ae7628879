"""The fault rig itself: each fault does what it says, and each invariant sees what breaks it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from chatserve.engine.sequence import Begun, SamplingParams
from tests.faults import invariants
from tests.faults.client import LoadClient, Record, Request
from tests.faults.engine import Script, ScriptedEngine
from tests.faults.history import Malformed, Reply
from tests.faults.loop_lag import STALL_S, watched
from tests.faults.planted import PLANTED
from tests.faults.proxy import (
    BYTE_BY_BYTE,
    Fault,
    FaultProxy,
    Faults,
    Plan,
    always,
    clear,
    proxying,
    scripted,
    seeded,
)
from tests.servers import STREAM_HEAD, ScriptedWorker, chunked, read_all, send_raw

WAIT_S = 20.0
DATA = bytes(range(256)) * 8


class Echo:
    """Sends `DATA` to whoever connects, and keeps what it reads and how that ended."""

    def __init__(self) -> None:
        self.read = b""
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(DATA)
        how = "eof"
        try:
            while data := await reader.read(65536):
                self.read += data
        except ConnectionResetError:
            how = "reset"
        self.ended.put_nowait(how)
        writer.close()


@contextlib.asynccontextmanager
async def echo(plan: Plan = clear) -> AsyncIterator[tuple[Echo, FaultProxy]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    async with server, FaultProxy(server.sockets[0].getsockname()[1], plan) as proxy:
        yield echo, proxy


async def received(proxy: FaultProxy, num_bytes: int = len(DATA)) -> tuple[list[bytes], str]:
    """The pieces that come until so many bytes are there or it ends, and how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    pieces: list[bytes] = []
    end = "open"
    try:
        async with asyncio.timeout(WAIT_S):
            while sum(map(len, pieces)) < num_bytes:
                piece = await reader.read(65536)
                if not piece:
                    end = "eof"
                    break
                pieces.append(piece)
    except ConnectionResetError:
        end = "reset"
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return pieces, end


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await work()

    asyncio.run(bounded())


def test_a_clear_proxy_passes_every_byte_and_the_end() -> None:
    async def work() -> None:
        async with echo() as (server, proxy):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(DATA)
            writer.write_eof()
            assert await reader.read(-1) == DATA
            assert await server.ended.get() == "eof" and server.read == DATA
            writer.close()
            await writer.wait_closed()
            assert not proxy.harmed

    run(work)


@pytest.mark.parametrize(
    ("then", "end"), [("close", "eof"), ("close half", "eof"), ("reset", "reset")]
)
def test_cut_after_so_many_bytes(then: str, end: str) -> None:
    async def work() -> None:
        fault = Fault(after=700, then=then)  # type: ignore[arg-type]
        async with echo(always(down=fault)) as (_, proxy):
            pieces, how = await received(proxy)
            # an RST may overtake what was sent before it
            assert how == end and DATA.startswith(b"".join(pieces))
            assert end == "reset" or len(b"".join(pieces)) == 700
            assert len(proxy.harmed) == 1

    run(work)


def test_stalled_connections_stay_open_and_say_nothing() -> None:
    async def work() -> None:
        async with echo(always(down=Fault(after=3, then="stall"))) as (server, proxy):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            assert await reader.readexactly(3) == DATA[:3]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
            # the other direction lives
            writer.write(b"x")
            writer.write_eof()
            assert await server.ended.get() == "eof" and server.read == b"x"
            writer.close()

    run(work)


@pytest.mark.parametrize("fault", [BYTE_BY_BYTE, Fault(seed=3), Fault(piece_bytes=7)])
def test_small_pieces_are_seen_as_such(fault: Fault) -> None:
    async def work() -> None:
        async with echo(always(down=fault)) as (_, proxy):
            pieces, _ = await received(proxy)
            assert b"".join(pieces) == DATA
            assert len(pieces) > 20

    run(work)


def test_weather_holds_for_connections_that_there_are() -> None:
    async def work() -> None:
        async with echo() as (server, proxy):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            await reader.readexactly(len(DATA))
            proxy.partition()
            writer.write(b"x" * 10)
            late = asyncio.create_task(received(proxy))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(late), 0.05)
            assert not server.read
            proxy.heal()
            assert b"".join((await late)[0]) == DATA
            proxy.weather = Fault(delay_s=0.02)
            started = time.monotonic()
            await received(proxy)
            assert time.monotonic() - started >= 0.02
            proxy.reset_all()
            assert await server.ended.get() in ("eof", "reset")
            writer.close()

    run(work)


def test_plans_repeat_themselves() -> None:
    assert [seeded(5)(n) for n in range(50)] == [seeded(5)(n) for n in range(50)]
    assert [seeded(5)(n) for n in range(50)] != [seeded(6)(n) for n in range(50)]
    assert [scripted(Faults(up=BYTE_BY_BYTE))(n).up.piece_bytes for n in range(2)] == [1, None]


def test_a_proxy_in_a_thread() -> None:
    frames = b'data: {"x":1}\n\n'
    script = [STREAM_HEAD, chunked(frames), chunked(b"")]
    with (
        ScriptedWorker(script) as worker,
        proxying(worker.port, always(down=BYTE_BY_BYTE)) as proxy,
    ):
        assert read_all(send_raw(proxy.port, b"GET / HTTP/1.1\r\n\r\n")).endswith(chunked(b""))
        proxy.do(FaultProxy.partition)
        assert len(proxy.proxy.harmed) in (0, 1)


# What the fake worker is ------------------------------------------------------------------------


def test_the_fake_worker_never_imports_torch() -> None:
    code = "import sys, tests.faults.worker, tests.fake_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_script_is_found_in_a_prompt_and_its_text_is_known() -> None:
    script = Script("r7", say=3)
    assert Script.of(list(f"<system>x<user>{script.prompt}...".encode())) == script
    assert Script.of(list(b"no script")) == Script()
    assert script.text() == "r7.0 r7.1 r7.2 " and script.text(most=1) == "r7.0 "
    garbage = Script("g", say=400, is_garbage=True)
    assert garbage.text() != garbage.text(choice=1) and len(garbage.text().encode()) > 300


def test_a_script_goes_on_behind_any_of_its_events_also_the_last() -> None:
    asyncio.run(_from_every_cut(Script("r7", say=3, step_s=0), SamplingParams(max_tokens=9)))
    asyncio.run(_from_every_cut(Script("r7", say=9, step_s=0), SamplingParams(max_tokens=3)))


async def _from_every_cut(script: Script, params: SamplingParams) -> None:
    async def said(begun: Begun | None = None) -> list[tuple[str, tuple[int, ...], str | None]]:
        stream = ScriptedEngine().submit("r", list(script.prompt.encode()), params, begun=begun)
        return [(each.text, each.token_ids, each.finish_reason) async for each in stream]

    whole = await said()
    assert [reason for _, _, reason in whole[:-1]] == [None] * 3 and whole[-1][2] is not None
    for cut in range(len(whole) + 1):
        units = tuple(ids for _, ids, _ in whole[:cut])
        begun = Begun(units, ((),) * cut, has_ended=cut == len(whole))
        assert await said(begun) == whole, cut


def test_every_bug_can_still_be_planted() -> None:
    code = "from tests.faults.planted import plant; plant()"
    for name in ("leak", "block", "double", "keep slots", "cut"):
        environment = {**os.environ, PLANTED: name}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


# What the invariants see ------------------------------------------------------------------------

GOOD = (
    b'data: {"id":"a","choices":[{"index":0,"delta":{"role":"assistant","content":""},'
    b'"finish_reason":null}]}\n\n'
    b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"x "},"finish_reason":null}]}\n\n'
    b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"y "},"finish_reason":null}]}\n\n'
    b'data: {"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"a","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,'
    b'"total_tokens":5}}\n\n'
)
X, Y = (
    b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"%s "},"finish_reason":null}]}\n\n'
    % letter
    for letter in (b"x", b"y")
)
END = b'data: {"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"m","type":"t","param":null,"code":"worker_died"}}\n\n'


def stream(body: bytes) -> bytes:
    return STREAM_HEAD + chunked(body) + chunked(b"")


def whole(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def record(raw: bytes, *, is_bad: bool = False, end: str | None = "closed") -> Record:
    made = Record(1, Request({}, text="x y ", num_tokens=2, is_bad=is_bad), 0.0, [(1.0, raw)])
    made.end = end  # type: ignore[assignment]
    return made


def test_good_histories_are_good() -> None:
    for made in (
        record(stream(GOOD + DONE)),
        record(stream(GOOD[: GOOD.index(END)] + ERROR)),
        record(stream(b": ping\n\n" + GOOD + DONE)),
        record(stream(GOOD)[:-30], end="cancelled"),
        record(b"", end="cancelled"),
        record(whole(b"503 x", ERROR[6:].strip())),
        record(whole(b"400 x", ERROR[6:].strip()), is_bad=True),
    ):
        assert invariants.check([made]) == []


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (stream(GOOD), "ends without a word"),
        (stream(GOOD)[:-5], "it was cut"),
        (b"", "it was cut"),
        (stream(GOOD + DONE + X), "1 frames behind the end"),
        (stream(GOOD + ERROR + DONE), "it ends 2 times"),
        (stream(GOOD.replace(END, END + X) + DONE), "goes on behind its end"),
        (stream(GOOD.replace(END, END + END) + DONE), "finishes 2 times"),
        (stream(GOOD.replace(END, b"") + DONE), "no finish reason"),
        (stream(GOOD.replace(X, X + X) + DONE), "is not the text"),
        (stream(GOOD.replace(X, b"") + DONE), "is not the text"),
        (stream(GOOD.replace(X, Y).replace(END, b"") + ERROR), "is not the text"),
        (stream(GOOD.replace(Y, Y.replace(b'"a"', b'"b"')) + DONE), "it has the ids"),
        (stream(GOOD[: GOOD.index(X)] + GOOD + DONE), "begins 2 times"),
        (stream(GOOD.replace(b'completion_tokens":2', b'completion_tokens":3') + DONE), "add up"),
        (stream(GOOD.replace(b'_tokens":2,"total_tokens":5', b'_tokens":3,"total_tokens":6')
                + DONE), "were to be said"),
        (stream(GOOD + ERROR.replace(b'"code"', b'"kode"')), "a bad error"),
        (whole(b"500 x", b"{}"), "without an error"),
        (whole(b"400 x", ERROR[6:].strip()), "a good request got 400"),
        (stream(GOOD + b"data: {\n\n" + DONE), "no JSON"),
        (stream(GOOD + b"data: \xff\n\n" + DONE), "no UTF-8"),
        (stream(GOOD + DONE + b"data: x"), "is no frame"),
        (stream(GOOD + DONE) + b"HTTP/1.1 200 OK\r\n\r\n", "bytes behind the end"),
        (b"SSH-2.0\r\n\r\n", "no answer of HTTP"),
        (STREAM_HEAD + b"zz\r\n", "no size of a chunk"),
        (STREAM_HEAD + b"2\r\nabcd\r\n", "longer than its size"),
    ],
)  # fmt: skip
def test_bad_histories_are_seen(raw: bytes, said: str) -> None:
    found = invariants.check([record(raw)])
    assert any(said in each for each in found), found


def test_hangs_and_missing_ends_are_seen() -> None:
    assert "hangs" in invariants.check([record(stream(GOOD), end="timeout")])[0]
    assert invariants.check([record(stream(GOOD + DONE), end=None)]) == ["request 1: it has no end"]
    assert "bad request got 200" in invariants.check([record(stream(GOOD + DONE), is_bad=True)])[0]


def test_who_was_cut_by_the_proxy_may_miss_the_end_but_gets_nothing_wrong() -> None:
    made = record(stream(GOOD)[:-30])
    made.port = 5
    assert invariants.check([made]) and not invariants.check([made], harmed=[5])
    made = record(stream(GOOD.replace(X, X + X))[:-30])
    made.port = 5
    assert "is not the text" in invariants.check([made], harmed=[5])[0]


def test_frames_have_the_times_of_their_last_bytes() -> None:
    made = record(b"")
    raw = stream(GOOD + DONE)
    made.pieces = [(float(i), raw[i : i + 1]) for i in range(len(raw))]
    frames = Reply(made).frames
    ends = [raw.index(DONE), raw.index(DONE) + len(DONE)]
    assert [frames[-2].at, frames[-1].at] == [end - 1.0 for end in ends]
    with pytest.raises(Malformed):
        _ = Reply(record(stream(b"data: 5\n\n"))).frames[0].json


def test_the_client_leaves_when_it_is_told_to() -> None:
    async def work() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            client = LoadClient(server.sockets[0].getsockname()[1])
            records = await client.send_all(
                [Request({}, cancel_after=n) for n in (0, 2, None)], at_once=2
            )
            assert [r.end for r in sorted(records, key=lambda r: r.number)] == [
                "cancelled", "cancelled", "closed",
            ]  # fmt: skip

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(stream(GOOD + DONE))
            await writer.drain()
        writer.close()

    run(work)
    client = LoadClient(_closed_port())
    asyncio.run(client.send(Request({})))
    assert client.records[0].end == "not connected"


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


# How late a loop is -----------------------------------------------------------------------------


def test_a_blocked_loop_is_seen() -> None:
    async def block() -> None:
        async with watched():
            await asyncio.sleep(0.05)
            time.sleep(STALL_S + 0.05)
            await asyncio.sleep(0.05)

    with pytest.raises(AssertionError, match="was blocked for 0"):
        asyncio.run(block())


def test_work_beside_the_loop_is_not() -> None:
    async def work() -> None:
        async with watched():
            await asyncio.to_thread(threading.Event().wait, 2 * STALL_S)

    asyncio.run(work())
