"""The door of a worker: who has no place in the queue is told so before a word of it is read.

Pure ASGI, between the edge and the app. A place is held while a request is parsed and its prompt
encoded; then its sequences have places of their own. Knows paths and keys, no fields.
"""

from __future__ import annotations

from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from chatserve.engine.admission import Place
from chatserve.errors import Overloaded
from chatserve.server.cache_salt import salt_of
from chatserve.server.contract import Engine
from chatserve.server.controller_door import takes_place
from chatserve.server.error_response import error_response
from chatserve.server.model_slot import ModelSlot

_place: ContextVar[Place | None] = ContextVar("place", default=None)


def hand_over() -> None:
    """The request that is under way has sequences now, which are counted themselves: call it right
    before they are submitted, and nobody can come in between."""
    if (place := _place.get()) is not None:
        place.release()


class Door:
    """Of the engine in `slot`."""

    def __init__(self, slot: ModelSlot, control_token: str | None) -> None:
        self._slot = slot
        self._control_token = control_token

    def check(self, scope: Scope) -> None:
        """Before the body has come. Raises `Overloaded`."""
        if (engine := self._engine_for(scope)) is not None:
            engine.admission.check(self._share(scope))

    def enter(self, scope: Scope) -> Place | None:
        """A place for a request, if it is one that takes any. Raises `Overloaded`."""
        if (engine := self._engine_for(scope)) is None:
            return None
        return engine.admission.enter(self._share(scope))

    def _engine_for(self, scope: Scope) -> Engine | None:
        return self._slot.engine if takes_place(scope) else None

    def _share(self, scope: Scope) -> bytes:
        return salt_of(Headers(scope=scope), self._control_token)


class BehindDoor:
    """`app`, where each request has come through `door`."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            place = self._door.enter(scope)
        except Overloaded as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if place is None:
            await self._app(scope, receive, send)
            return
        token = _place.set(place)
        try:
            with place:
                await self._app(scope, receive, send)
        finally:
            _place.reset(token)
