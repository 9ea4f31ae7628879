"""The controller's side of adapters: a change goes to every worker of the base, and to new ones.

Knows workers and HTTP, no folder: paths are read on the workers' machines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

import aiohttp
import orjson
from starlette.requests import Request
from starlette.responses import Response

from chatserve.config import adapted_name
from chatserve.errors import AdapterRefused, InvalidRequest, ModelNotLoaded, WorkerLost
from chatserve.protocol.adapters import (
    MAX_LORA_NAME_LEN,
    SETTLE_PATH,
    STAGE_PATH,
    UNLOAD_PATH,
    LoadAdapter,
    SettleAdapter,
    UnloadAdapter,
    parse,
)
from chatserve.protocol.control import ADAPTER_KEY, WorkerStatus, bearer
from chatserve.server.adapter_beliefs import AdapterBeliefs, Belief, Key, base_of
from chatserve.server.error_response import error_response, status_of
from chatserve.server.json_response import JSON_TYPE
from chatserve.server.leases import Worker
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker_client import WorkerClient

logger = logging.getLogger(__name__)

TIMEOUT_S = 300.0
"""For a large adapter from a slow disk, of a worker that goes on beating; one that is lost, ejected
or stalled is not waited for."""
LOOK_S = 0.5
"""How often that is looked at."""
MAX_REPLY_BYTES = 1 << 20

Replies = Mapping[str, Response]
"""By worker id."""


class AdapterDispatch:
    """Loads and unloads adapters on all workers of a base, one change after the other.

    A worker that could not be asked, as it was ejected or has just started, is put right as soon as
    it is ready; until then no request reaches what it should not serve.
    """

    def __init__(self, registry: WorkerRegistry, client: WorkerClient, control_token: str) -> None:
        self._registry = registry
        self._client = client
        self._headers = {"Content-Type": "application/json", **bearer(control_token)}
        self._beliefs = AdapterBeliefs()
        self._changing = asyncio.Lock()
        self._restoring: dict[str, asyncio.Task[None]] = {}

    async def load(self, request: Request) -> Response:
        """Loaded by every worker of the base, or by none of them."""
        asked = parse(LoadAdapter, await request.body())
        base, name = key = self._split(asked.lora_name)
        asked = asked.model_copy(update={"lora_name": adapted_name(base, name)})
        async with self._changing:
            workers = self._workers(base)
            staged = await self._ask(workers, STAGE_PATH, asked.to_json())
            refusal = _refusal(workers, staged) or _disagreement(asked, staged)
            if refusal is not None:
                await self._ask(_done(workers, staged), SETTLE_PATH, _settled(asked, False))
                return refusal
            fingerprint = _fingerprint(next(iter(staged.values())))
            with self._beliefs.incoming(key, fingerprint):
                replies = await self._ask(workers, SETTLE_PATH, _settled(asked, True))
                done = _done(workers, replies)
                if done:
                    told = [worker.worker_id for worker in done]
                    self._beliefs.loaded(key, asked, fingerprint, told)
        return replies[done[0].worker_id] if done else next(iter(replies.values()))

    async def unload(self, request: Request) -> Response:
        """Unloaded by whoever has it; what one worker may still have is not."""
        asked = parse(UnloadAdapter, await request.body())
        base, name = key = self._split(asked.lora_name)
        asked = UnloadAdapter(lora_name=adapted_name(base, name))
        async with self._changing:
            replies = await self._ask(self._workers(base), UNLOAD_PATH, asked.to_json())
            gone = [id for id, reply in replies.items() if reply.status_code in (200, 404)]
            self._beliefs.unloaded(key, gone)
        failed = [reply for id, reply in replies.items() if id not in gone]
        return failed[0] if failed else min(replies.values(), key=lambda each: each.status_code)

    def hear(
        self, worker_id: str, status: WorkerStatus, *, registers: bool = False
    ) -> WorkerStatus:
        """What of a worker's `status` may be dispatched to; `restore` is to follow."""
        if registers:
            self._beliefs.forget(worker_id)
        return self._beliefs.hear(worker_id, status)

    def restore(self, worker_id: str) -> None:
        """Tell a worker that is ready what it has missed."""
        self._beliefs.keep(self._registry.worker_ids())
        if worker_id not in self._restoring and self._next_difference(worker_id) is not None:
            task = asyncio.create_task(self._restore(worker_id))
            self._restoring[worker_id] = task
            task.add_done_callback(lambda _: self._restoring.pop(worker_id))

    def is_wanted(self, model: str) -> bool:
        """Whether `model` is an adapter that a request has loaded."""
        return self._beliefs.is_wanted(self._known_as(model))

    async def until_served(self, model: str) -> None:
        """A base that has come back is told of its adapters; who asks for one waits meanwhile.

        Raises `ModelNotLoaded` in a worker's words where none of them can serve it any more, and
        what `pick` raises where there is no worker.
        """
        base, _ = key = self._known_as(model)
        with self._registry.changes() as change:
            while self._beliefs.is_wanted(key) and not self._registry.ready(model):
                said = [self._beliefs.said(each.worker_id, key) for each in self._workers(base)]
                if None not in said:
                    refusals = [each for each in said if each]
                    if refusals:
                        raise ModelNotLoaded(
                            f"{model} cannot be loaded: {refusals[0]}; load it again",
                            retry_after_s=5,
                        )
                    return
                change.clear()
                waiter = asyncio.ensure_future(change.wait())
                try:
                    await asyncio.wait(
                        {waiter, *self._restoring.values()},
                        timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED,
                    )  # fmt: skip
                finally:
                    waiter.cancel()

    async def aclose(self) -> None:
        tasks = list(self._restoring.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _restore(self, worker_id: str) -> None:
        # one change at a time: this must not be the last word on what is being unloaded
        async with self._changing:
            while difference := self._next_difference(worker_id):
                worker, key, belief = difference
                reply = await self._put_right(worker, key, belief)
                if reply.status_code == status_of(WorkerLost(""))[0]:
                    return  # it is told at its next heartbeat
                served = adapted_name(*key)
                is_gone = belief.asked is None and reply.status_code == 404
                if reply.status_code == 200 or is_gone:
                    self._beliefs.tell(worker_id, belief)
                    logger.info("%s: %s is as the others have it", worker.base_url, served)
                else:
                    reason = _message(reply)[:500]
                    self._beliefs.tell(worker_id, belief, _without_path(reason, belief))
                    logger.warning("%s does not serve %s: %s", worker.base_url, served, reason)
                    self._registry.forget(served)

    def _next_difference(self, worker_id: str) -> tuple[Worker, Key, Belief] | None:
        for key, belief in self._beliefs.differences(worker_id):
            for worker in self._registry.ready(key[0]):
                if worker.worker_id == worker_id:
                    return worker, key, belief
        return None

    async def _put_right(self, worker: Worker, key: Key, belief: Belief) -> Response:
        """What the worker says to its loading, replacing or unloading one adapter."""
        if belief.asked is None:
            gone = UnloadAdapter(lora_name=adapted_name(*key))
            return await self._ask_one(worker, UNLOAD_PATH, gone.to_json())
        asked = belief.asked.model_copy(update={"load_inplace": True})
        staged = await self._ask_one(worker, STAGE_PATH, asked.to_json())
        if staged.status_code != 200:
            return staged
        if _fingerprint(staged) == belief.fingerprint:
            return await self._ask_one(worker, SETTLE_PATH, _settled(asked, True))
        await self._ask_one(worker, SETTLE_PATH, _settled(asked, False))
        return error_response(
            AdapterRefused(
                f"{asked.lora_path} has changed since the others loaded it; load it again"
            )
        )

    def _split(self, lora_name: str) -> Key:
        """Base and adapter of NAME or BASE:NAME. Raises `InvalidRequest` where NAME is vague."""
        names = [card.name for card in self._registry.cards() if card.parent is None]
        base, _, name = lora_name.rpartition(":")
        if base:
            return _key(self._first_name(base), name)
        bases = list(dict.fromkeys(map(self._first_name, names)))
        if len(bases) == 1:
            return _key(bases[0], name)
        there = f"this server has {', '.join(bases)}" if bases else "no model is ready yet"
        raise InvalidRequest(
            f"lora_name: which base is {name[:80]!r} for? {there}; write BASE:{name[:80]}",
            param="lora_name",
        )

    def _known_as(self, model: str) -> Key:
        base, _, name = model.rpartition(":")
        return self._first_name(base), name

    def _first_name(self, base: str) -> str:
        """One name for the model that several may name."""
        for worker in self._registry.ready(base):
            return base_of(worker.status)
        return base

    def _workers(self, base: str) -> list[Worker]:
        """All that are ready. Raises as `pick` does where none is."""
        workers = self._registry.ready(base)
        if not workers:
            self._registry.pick(base).release()
        return workers

    async def _ask(self, workers: Iterable[Worker], path: str, body: bytes) -> Replies:
        workers = list(workers)
        replies = await asyncio.gather(*(self._ask_one(each, path, body) for each in workers))
        return {each.worker_id: reply for each, reply in zip(workers, replies, strict=True)}

    async def _ask_one(self, worker: Worker, path: str, body: bytes) -> Response:
        """What `worker` says for as long as it is there: a silent one must hold up no others."""
        telling = asyncio.create_task(self._tell(worker.base_url, path, body))
        try:
            while not telling.done():
                await asyncio.wait({telling}, timeout=LOOK_S)
                if not telling.done() and not self._is_there(worker):
                    return _lost("it was lost meanwhile")
            return await telling
        finally:
            telling.cancel()

    def _is_there(self, worker: Worker) -> bool:
        return worker in self._registry.ready(base_of(worker.status))

    async def _tell(self, base_url: str, path: str, body: bytes) -> Response:
        """What the worker at `base_url` says; that it says nothing is an answer, too."""
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                self._client.post(base_url, path, data=body, headers=self._headers) as reply,
            ):
                content = await reply.content.read(MAX_REPLY_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return _lost(str(error) or type(error).__name__)
        return Response(content, reply.status, media_type=JSON_TYPE)


def _without_path(reason: str, belief: Belief) -> str:
    """Where it lies is for whoever has loaded it."""
    if belief.asked is None:
        return reason
    return reason.replace(belief.asked.lora_path, belief.asked.lora_name)


def _lost(why: str) -> Response:
    return error_response(WorkerLost(f"a worker did not answer ({why}); send the request again"))


def _settled(asked: LoadAdapter, is_wanted: bool) -> bytes:
    return SettleAdapter(lora_name=asked.lora_name, is_wanted=is_wanted).to_json()


def _done(workers: Iterable[Worker], replies: Replies) -> list[Worker]:
    return [worker for worker in workers if replies[worker.worker_id].status_code == 200]


def _refusal(workers: list[Worker], staged: Replies) -> Response | None:
    """The first worker's that cannot load it, in its own words."""
    for worker in workers:
        reply = staged[worker.worker_id]
        if reply.status_code != 200:
            return _said_by(worker, reply) if len(workers) > 1 else reply
    return None


def _key(base: str, name: str) -> Key:
    """Raises `InvalidRequest` where no worker could be told of it."""
    length = len(adapted_name(base, name))
    if length > MAX_LORA_NAME_LEN:
        raise InvalidRequest(
            f"lora_name: with its base it has {length} characters, the limit is "
            f"{MAX_LORA_NAME_LEN}; choose a shorter one",
            param="lora_name",
        )
    return base, name


def _said_by(worker: Worker, reply: Response) -> Response:
    """`reply` with the worker's address: of several only this one may have to be looked at."""
    try:
        body = orjson.loads(bytes(reply.body))
        body["error"]["message"] += f" (said by {worker.base_url}; no worker has changed anything)"
    except (ValueError, KeyError, TypeError):
        return reply  # no error of ours
    return Response(orjson.dumps(body), reply.status_code, media_type=JSON_TYPE)


def _disagreement(asked: LoadAdapter, staged: Replies) -> Response | None:
    found = {_fingerprint(reply) for reply in staged.values()}
    if len(found) == 1:
        return None
    return error_response(
        AdapterRefused(
            f"{asked.lora_path} is another adapter on another worker's machine "
            f"({', '.join(sorted(found))}); copy the same folder to all of them",
            param="lora_path",
        )
    )


def _fingerprint(staged: Response) -> str:
    return str(_json(staged).get(ADAPTER_KEY, ""))


def _message(reply: Response) -> str:
    error = _json(reply).get("error")
    text = error.get("message") if isinstance(error, dict) else None
    return str(text or bytes(reply.body).decode("utf-8", "replace"))


def _json(reply: Response) -> Mapping[str, object]:
    try:
        body = orjson.loads(bytes(reply.body))
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
