"""A worker on a socket of the file system: reached, proved and cut like one on a port."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from chatserve.errors import CannotBind
from chatserve.protocol.control import (
    REGISTER_PATH,
    SOCKET_SCHEME,
    ModelCard,
    Registration,
    WorkerStatus,
    bearer,
)
from chatserve.server.controller import create_controller_app
from chatserve.server.listener import Listener, bind, bind_path, port_of, url_of
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from chatserve.server.worker_client import WorkerClient
from tests.fakes import ANSWER, FakeEngine, FakeModel
from tests.servers import ScriptedWorker

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no sockets with files there")
TOKEN = "control-token"
READY = WorkerStatus(state="ready", models=[ModelCard(name="fake", created=1)])
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "0.sock"


@asynccontextmanager
async def worker_at(path: Path, token: str = TOKEN) -> AsyncIterator[None]:
    listener = Listener(
        create_worker_app(FakeEngine(), FakeModel(), control_token=token), bind_path(path)
    )
    await listener.start()
    try:
        yield
    finally:
        await listener.close()


@asynccontextmanager
async def controller_with(sockets: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    registry = WorkerRegistry(time.monotonic)
    edge = create_controller_app(registry, control_token=TOKEN, sockets=sockets)
    door = bind("127.0.0.1", 0)
    listener = Listener(edge, door)
    await listener.start()
    try:
        async with httpx.AsyncClient(base_url=url_of("127.0.0.1", door), timeout=30) as client:
            yield client
    finally:
        await listener.close()


async def register(client: httpx.AsyncClient, worker_id: str, port: int | None) -> httpx.Response:
    message = Registration(worker_id=worker_id, port=port, status=READY)
    headers = {"Content-Type": "application/json", **bearer(TOKEN)}
    return await client.post(REGISTER_PATH, content=message.to_json(), headers=headers)


def test_it_answers_and_streams_through_the_controller(path: Path) -> None:
    async def main() -> None:
        async with worker_at(path), controller_with({"w": f"{SOCKET_SCHEME}{path}"}) as client:
            # the port that it names counts for nothing
            reply = await register(client, "w", 1)
            assert reply.status_code == 200, reply.text
            whole = await client.post("/v1/chat/completions", json=CHAT)
            assert whole.json()["choices"][0]["message"]["content"] == "".join(ANSWER)
            stream = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
            assert stream.text.endswith("data: [DONE]\n\n")

    asyncio.run(main())


def test_one_that_was_not_told_where_to_listen_names_a_port(path: Path) -> None:
    async def main() -> None:
        async with worker_at(path), controller_with({"w": f"{SOCKET_SCHEME}{path}"}) as client:
            reply = await register(client, "x", None)
            assert reply.status_code == 403 and "no port" in reply.text

    asyncio.run(main())


def test_whoever_listens_there_proves_the_token(path: Path) -> None:
    async def main() -> None:
        async with (
            worker_at(path, "another token"),
            controller_with({"w": f"{SOCKET_SCHEME}{path}"}) as client,
        ):
            reply = await register(client, "w", None)
            assert reply.status_code == 403 and "control token" in reply.text

    asyncio.run(main())


def test_nobody_listens_there(path: Path) -> None:
    async def main() -> None:
        async with controller_with({"w": f"{SOCKET_SCHEME}{path}"}) as client:
            reply = await register(client, "w", None)
            assert reply.status_code == 403 and "cannot reach" in reply.text

    asyncio.run(main())


def test_the_next_worker_takes_the_socket_of_one_that_died(path: Path) -> None:
    bind_path(path).close()
    assert path.exists()
    door = bind_path(path)
    assert port_of(door) is None and url_of("127.0.0.1", door) == f"{SOCKET_SCHEME}{path}"
    door.close()


def test_a_path_that_cannot_be(path: Path) -> None:
    with pytest.raises(CannotBind, match="cannot listen on"):
        bind_path(path.parent / "missing" / "0.sock")


@pytest.mark.parametrize("method", ["get", "post"])
def test_a_redirect_is_not_followed(method: str) -> None:
    """The token goes nowhere else."""

    async def main() -> int:
        async with (
            WorkerClient() as client,
            getattr(client, method)(target.url, "/x") as reply,
        ):
            return int(reply.status)

    head = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with ScriptedWorker([head]) as target:
        assert asyncio.run(main()) == 302
