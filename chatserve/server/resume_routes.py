"""POST /control/resume: go on with a stream that another worker has begun."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from chatserve.errors import (
    CannotResume,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    UnsupportedParameter,
)
from chatserve.protocol.control import RESUME_PATH, ResumeRequest, parse
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.resumption import Resumption, read_journal

GoOn = Callable[[Request, bytes, Resumption], Awaitable[Response]]
"""Answers the body of a request, from where a journal of its stream ends."""


class ResumeRoutes:
    """`routes` are those whose streams have journals, by their paths."""

    def __init__(self, routes: Mapping[str, GoOn], pool: PreparationPool) -> None:
        self._routes = routes
        self._pool = pool

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(RESUME_PATH, self.resume, methods=["POST"])

    async def resume(self, request: Request) -> Response:
        """Raises `CannotResume` where another worker could go on and this one cannot."""
        asked, resumption = await self._pool.run(_read, await request.body())
        go_on = self._routes.get(asked.path)
        if go_on is None:
            raise InvalidRequest(
                f"streams of {asked.path!r} have no journal; {', '.join(self._routes)} have",
                param="path",
            )
        try:
            return await go_on(request, asked.body.encode(), resumption)
        except (ContextLengthExceeded, ModelNotFound, UnsupportedParameter) as error:
            # it was no fault of the request where it began
            raise CannotResume(f"{error.message} (where it began, it could be answered)") from error


def _read(body: bytes) -> tuple[ResumeRequest, Resumption]:
    """Raises `InvalidRequest`."""
    asked = parse(ResumeRequest, body)
    return asked, read_journal(asked.journal)
