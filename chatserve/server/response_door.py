"""/v1/responses where clients come in: the controller, or a worker that is alone.

Keeps responses, expands `previous_response_id` before a request goes on, and serves what is kept.
How a response is made it leaves to others. Knows no model, no torch, and of a stream only its first
and its last event.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, TypeVarTuple

import orjson
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chatserve.errors import (
    BodyTooLarge,
    InvalidRequest,
    PreviousResponseNotFound,
    ResponseNotFound,
    StorageFailed,
    UnsupportedParameter,
)
from chatserve.protocol.fields import MAX_BODY_BYTES, read_object
from chatserve.protocol.response_items import input_items
from chatserve.protocol.responses import RESPONSES_PATH
from chatserve.server.cache_salt import given_key
from chatserve.server.caught_event import CaughtEvent
from chatserve.server.disconnect import nobody_listens
from chatserve.server.error_response import no_route
from chatserve.server.item_pages import page_of
from chatserve.server.json_response import JSON_TYPE, json_response
from chatserve.server.own_items import OwnItems
from chatserve.server.response_store import KeptResponse, ResponseStore

logger = logging.getLogger(__name__)

# parsing a larger body takes longer than a stream should wait for its next token
MAX_INLINE_BODY_BYTES = 64 * 1024
_FIRST = re.compile(rb"^event: ?response\.created\r?\n", re.MULTILINE)
_LAST = re.compile(rb"^event: ?response\.(?:completed|incomplete|failed)\r?\n", re.MULTILINE)
_ABSENT = ("compact", "input_tokens")
"""Routes of OpenAI's that are not here."""
_OWNER = b"chatserve responses of "

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class Backend(Protocol):
    """Who makes responses."""

    async def respond(self, request: Request, body: bytes, model: object) -> Response: ...

    async def cancel(self, request: Request, response_id: str, stream: Response) -> Response:
        """End `stream`, which `respond` has returned."""
        ...


@dataclass(frozen=True)
class _Asked:
    """What of a request concerns whoever keeps responses. `items` None: it is not to be kept."""

    body: bytes
    model: object
    items: list[Any] | None
    own: OwnItems = field(default_factory=OwnItems)


class _Running:
    """A stream on its way out: whose, the items that it answers, and how it began, as JSON."""

    def __init__(self, owner: bytes, items: list[Any] | None, stream: Response) -> None:
        self.owner = owner
        self.items = items
        self.stream = stream
        self.id = ""
        self.response = b""


class ResponseDoor:
    """`store` None: nothing is kept, and nothing can be gone on from."""

    def __init__(self, store: ResponseStore | None, backend: Backend) -> None:
        self._store = store
        self._backend = backend
        self._running: dict[str, _Running] = {}

    def add_to(self, app: FastAPI) -> None:
        one = RESPONSES_PATH + "/{response_id}"
        app.add_api_route(RESPONSES_PATH, self.create, methods=["POST"])
        for name in _ABSENT:
            # else they would be taken for ids, and a client be told of another method
            app.add_route(f"{RESPONSES_PATH}/{name}", _no_route, methods=["POST"])
        app.add_api_route(one, self.get, methods=["GET"])
        app.add_api_route(one, self.delete, methods=["DELETE"])
        app.add_api_route(one + "/cancel", self.cancel, methods=["POST"])
        app.add_api_route(one + "/input_items", self.list_items, methods=["GET"])

    async def create(self, request: Request) -> Response:
        owner = owner_of(request.headers)
        try:
            body = await request.body()
            asked = await self._read_beside(body, owner)
            with asked.own.in_errors():
                answered = await self._backend.respond(request, asked.body, asked.model)
        except ClientDisconnect:
            return nobody_listens(request)
        asked.own.in_headers(answered)
        if answered.headers.get("content-type", "").startswith("text/event-stream"):
            return _WatchedStream(self, _Running(owner, asked.items, answered))
        if answered.status_code == 200:
            await self._keep(owner, asked.items, bytes(answered.body))
        return asked.own.in_answer(answered)

    async def get(self, request: Request, response_id: str) -> Response:
        _check_query(request, {"include", "include[]", "include_obfuscation", "stream"})
        if request.query_params.get("stream", "false") != "false":
            raise UnsupportedParameter(
                "stream is not supported for a response that is kept; leave it out", param="stream"
            )
        owner = owner_of(request.headers)
        running = self._running.get(response_id)
        if running is not None and running.owner == owner:
            return Response(running.response, media_type=JSON_TYPE)
        return json_response((await self._find(owner, response_id)).response)

    async def delete(self, request: Request, response_id: str) -> Response:
        owner = owner_of(request.headers)
        if self._store is None or not await _in_thread(self._store.delete, owner, response_id):
            raise _not_found(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request, response_id: str) -> Response:
        """End a response that is being streamed."""
        owner = owner_of(request.headers)
        running = self._running.get(response_id)
        if running is None or running.owner != owner:
            kept = await self._find(owner, response_id)
            raise InvalidRequest(
                f"response {response_id[:100]} has ended already, as "
                f"{kept.response.get('status')}; only one that is being streamed can be cancelled",
                param="response_id",
            )
        try:
            cancelled = await self._backend.cancel(request, response_id, running.stream)
        except ClientDisconnect:
            return nobody_listens(request)
        if cancelled.status_code == 200:
            await self._keep(owner, running.items, bytes(cancelled.body))
            # its stream ends when its reader has read so far, and is not kept once more
            running.items = None
            self.forget(running)
        return cancelled

    async def list_items(self, request: Request, response_id: str) -> Response:
        _check_query(request, {"after", "limit", "order", "include", "include[]"})
        kept = await self._find(owner_of(request.headers), response_id)
        return json_response(page_of(kept.items, request.query_params))

    async def _find(self, owner: bytes, response_id: str) -> KeptResponse:
        """Raises `ResponseNotFound`."""
        store = self._store
        kept = None if store is None else await _in_thread(store.find, owner, response_id)
        if kept is None:
            raise _not_found(response_id)
        return kept

    async def _read_beside(self, body: bytes, owner: bytes) -> _Asked:
        """The same as `_read`, but neither a large body nor a file is read on the loop."""
        if len(body) > MAX_INLINE_BODY_BYTES:
            return await asyncio.to_thread(lambda: self._read(read_object(body), body, owner))
        payload = read_object(body)
        if payload.get("previous_response_id") is None:
            return self._read(payload, body, owner)
        return await asyncio.to_thread(self._read, payload, body, owner)

    def _read(self, payload: Mapping[str, Any], body: bytes, owner: bytes) -> _Asked:
        """The request with what it goes on from in its input, less what a worker need not see.

        What is wrong with it otherwise its maker will say.
        """
        is_kept = self._store is not None and payload.get("store") is not False
        if payload.get("store") is True and self._store is None:
            raise UnsupportedParameter(
                "store: true is not supported, this server keeps no responses; leave it out",
                param="store",
            )
        if self._store is None:
            body = orjson.dumps({**payload, "store": False})
        previous = payload.get("previous_response_id")
        try:
            items = input_items(payload.get("input"))
        except InvalidRequest:
            return _Asked(body, payload.get("model"), None)
        own = OwnItems()
        if isinstance(previous, str):
            before = self._items_before(previous, owner)
            own = OwnItems(len(before))
            items = [*before, *items]
            body = orjson.dumps({**payload, "input": items})
            if len(body) > MAX_BODY_BYTES:
                raise BodyTooLarge(
                    f"with the conversation before it the request has {len(body):,} bytes, the "
                    f"limit is {MAX_BODY_BYTES:,}; start a new one"
                )
        return _Asked(body, payload.get("model"), items if is_kept else None, own)

    def _items_before(self, previous: str, owner: bytes) -> list[Any]:
        kept = None if self._store is None else self._store.find(owner, previous)
        if kept is None:
            reason = "is not kept here" if self._store else "is not known: no responses are kept"
            raise PreviousResponseNotFound(
                f"previous_response_id {previous[:100]!r} {reason}; send its items as input",
                param="previous_response_id",
            )
        items = [*kept.items, *kept.response["output"]]
        return [item for item in items if not _is_cut_call(item)]

    async def _keep(self, owner: bytes, items: list[Any] | None, body: bytes) -> None:
        """A response that cannot be kept is answered all the same."""
        if self._store is None or items is None:
            return
        try:
            await _in_thread(_add, self._store, owner, items, body)
        except StorageFailed as error:
            logger.warning("a response is not kept: %s", error)

    async def begin(self, running: _Running, body: bytes) -> None:
        with _cut_short():
            # it has the request's instructions and tools, which may be megabytes
            is_short = len(body) <= MAX_INLINE_BODY_BYTES
            running.id, running.response = (
                _response_in(body) if is_short else await _in_thread(_response_in, body)
            )
            self._running[running.id] = running

    async def end(self, running: _Running, body: bytes) -> None:
        with _cut_short():
            _, response = await _in_thread(_response_in, body)
            await self._keep(running.owner, running.items, response)
        self.forget(running)

    def forget(self, running: _Running) -> None:
        self._running.pop(running.id, None)


class _WatchedStream(Response):
    """The same stream; the door sees its first and its last event before the client does."""

    def __init__(self, door: ResponseDoor, running: _Running) -> None:
        self.status_code = running.stream.status_code
        self.background = None
        self.raw_headers = running.stream.raw_headers
        self._door = door
        self._running = running
        self._first = CaughtEvent(_FIRST)
        self._last = CaughtEvent(_LAST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            data = message.get("body")
            if data:
                if (first := self._first.feed(data)) is not None:
                    await self._door.begin(self._running, first)
                if (last := self._last.feed(data)) is not None:
                    await self._door.end(self._running, last)
            await send(message)

        try:
            await self._running.stream(scope, receive, watched)
        finally:
            self._door.forget(self._running)


@contextlib.contextmanager
def _cut_short() -> Iterator[None]:
    """A worker that dies inside an event leaves half of it: there is nothing to keep then."""
    try:
        yield
    except orjson.JSONDecodeError:
        logger.warning("a response ended inside an event; it is not kept")


def _response_in(event: bytes) -> tuple[str, bytes]:
    """Its id, and all of it as JSON."""
    response = orjson.loads(event)["response"]
    return response["id"], orjson.dumps(response)


def _add(store: ResponseStore, owner: bytes, items: Iterable[Any], body: bytes) -> None:
    store.add(owner, KeptResponse(orjson.loads(body), [_named(item) for item in items]))


def _is_cut_call(item: Mapping[str, Any]) -> bool:
    """Whether its arguments ended for want of room, or because nobody wanted them any more."""
    return item.get("type") == "function_call" and item.get("status") == "incomplete"


def _named(item: Any) -> Any:
    """Each item has an id to be found by."""
    kind = item.get("type") or "message"
    prefix = {"message": "msg", "function_call": "fc"}.get(kind, "fco")
    return {
        **item,
        "type": kind,
        "id": item.get("id") or f"{prefix}_{uuid.uuid4().hex}",
        "status": item.get("status") or "completed",
    }


def owner_of(headers: Mapping[str, str]) -> bytes:
    """Whose responses these are: those of the same API key, or of all who have none."""
    key = given_key(headers)
    return b"" if key is None else hashlib.sha256(_OWNER + key).digest()


async def _in_thread(work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
    return await asyncio.to_thread(work, *arguments)


async def _no_route(request: Request) -> Response:
    raise no_route(request)


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(
        f"response {response_id[:100]!r} is not kept here; it may be too old, or another key's",
        param="response_id",
    )


def _check_query(request: Request, known: set[str]) -> None:
    for name in request.query_params:
        if name not in known:
            raise UnsupportedParameter(
                f"{name[:64]!r} is not a known parameter; leave it out", param=name[:64]
            )
