"""The controller's side of adapters: a change goes to every worker of the base, and to new ones.

Knows workers and HTTP, no folder: paths are read on the workers' machines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import aiohttp
from starlette.requests import Request
from starlette.responses import Response

from chatserve.config import adapted_name
from chatserve.errors import InvalidRequest, WorkerLost
from chatserve.protocol.adapters import (
    LOAD_PATH,
    UNLOAD_PATH,
    LoadAdapter,
    UnloadAdapter,
    parse,
)
from chatserve.protocol.control import bearer
from chatserve.server.error_response import error_response
from chatserve.server.json_response import JSON_TYPE
from chatserve.server.registry import Worker, WorkerRegistry

logger = logging.getLogger(__name__)

TIMEOUT_S = 300.0  # a large adapter from a slow disk
MAX_REPLY_BYTES = 1 << 20


class AdapterDispatch:
    """Adapters that clients have asked for, by base and name.

    A worker that starts anew has only those of its own command line: the others are sent to it
    again, once.
    """

    def __init__(
        self, registry: WorkerRegistry, session: aiohttp.ClientSession, control_token: str
    ) -> None:
        self._registry = registry
        self._session = session
        self._headers = {"Content-Type": "application/json", **bearer(control_token)}
        self._wanted: dict[tuple[str, str], LoadAdapter] = {}
        self._told: set[tuple[str, str, str]] = set()  # worker, base, adapter
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, request: Request) -> Response:
        """Loaded by every worker of the base, or by none of them."""
        asked = parse(LoadAdapter, await request.body())
        base, name = self._split(asked.lora_name)
        asked = asked.model_copy(update={"lora_name": adapted_name(base, name)})
        async with self._changing:
            replies = await self._tell_all(base, name, LOAD_PATH, asked.to_json())
            refusals = [reply for reply in replies.values() if reply.status_code != 200]
            if refusals:
                done = [worker for worker, reply in replies.items() if reply not in refusals]
                await self._undo(done, base, name)
                return refusals[0]
            self._wanted[base, name] = asked
        return next(iter(replies.values()))

    async def unload(self, request: Request) -> Response:
        """Unloaded by whoever has it; what one worker may still have is not."""
        asked = parse(UnloadAdapter, await request.body())
        base, name = self._split(asked.lora_name)
        asked = UnloadAdapter(lora_name=adapted_name(base, name))
        async with self._changing:
            self._wanted.pop((base, name), None)
            replies = (await self._tell_all(base, name, UNLOAD_PATH, asked.to_json())).values()
        failed = [reply for reply in replies if reply.status_code not in (200, 404)]
        return failed[0] if failed else min(replies, key=lambda reply: reply.status_code)

    def restore(self, worker_id: str) -> None:
        """Tell a worker that has just become ready what the others of its base have been told."""
        for (base, name), asked in self._wanted.items():
            worker = next((w for w in self._registry.ready(base) if w.worker_id == worker_id), None)
            if worker is None or (worker_id, base, name) in self._told:
                continue
            self._told.add((worker_id, base, name))
            if not worker.serves(asked.lora_name):
                task = asyncio.create_task(self._restore(worker, base, name))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _restore(self, worker: Worker, base: str, name: str) -> None:
        """One change at a time, so that this is not the last word on what is being unloaded."""
        async with self._changing:
            asked = self._wanted.get((base, name))
            if asked is None or worker.serves(asked.lora_name):
                return
            reply = await self._tell(worker.base_url, LOAD_PATH, asked.to_json())
        if reply.status_code == 200:
            logger.info("%s is served by the new worker, too", asked.lora_name)
            return
        reason = bytes(reply.body).decode("utf-8", "replace")
        logger.warning("%s is not served by the new worker: %s", asked.lora_name, reason[:500])
        self._registry.forget(asked.lora_name)

    def _split(self, lora_name: str) -> tuple[str, str]:
        """(base, adapter) of NAME or BASE:NAME. Raises `InvalidRequest` where NAME is vague."""
        bases = [card.name for card in self._registry.cards() if card.parent is None]
        base, _, name = lora_name.rpartition(":")
        if base:
            return base, name
        if len(bases) == 1:
            return bases[0], name
        there = f"this server has {', '.join(bases)}" if bases else "no model is ready yet"
        raise InvalidRequest(
            f"lora_name: which base is {name[:80]!r} for? {there}; write BASE:{name[:80]}",
            param="lora_name",
        )

    async def _tell_all(self, base: str, name: str, path: str, body: bytes) -> dict[str, Response]:
        """What each worker of the base says, by its URL. Raises as `pick` does where none is."""
        workers = self._registry.ready(base)
        if not workers:
            self._registry.pick(base).release()
        self._told.update((worker.worker_id, base, name) for worker in workers)
        urls = [worker.base_url for worker in workers]
        replies = await asyncio.gather(*(self._tell(url, path, body) for url in urls))
        return dict(zip(urls, replies, strict=True))

    async def _undo(self, urls: Sequence[str], base: str, name: str) -> None:
        """Put back what was there before a load that some workers have refused."""
        before = self._wanted.get((base, name))
        if before is not None:
            before = before.model_copy(update={"load_inplace": True})
            path, body = LOAD_PATH, before.to_json()
        else:
            path, body = UNLOAD_PATH, UnloadAdapter(lora_name=adapted_name(base, name)).to_json()
        for url in urls:
            reply = await self._tell(url, path, body)
            if reply.status_code != 200:
                logger.warning("%s cannot go back to the adapter %s of before", url, name)

    async def _tell(self, url: str, path: str, body: bytes) -> Response:
        """What the worker at `url` says; that it says nothing is an answer, too."""
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._session.post(
                    url + path, data=body, headers=self._headers, allow_redirects=False
                ) as reply,
            ):
                content = await reply.content.read(MAX_REPLY_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return error_response(
                WorkerLost(
                    f"a worker did not answer ({str(error) or type(error).__name__}); send the "
                    "request again"
                )
            )
        return Response(content, reply.status, media_type=JSON_TYPE)
