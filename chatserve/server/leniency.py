"""`--lenient`: fields that would be refused are left out, and a header of the answer lists them."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserve.protocol.leniency import HEADER, noting


class Lenient:
    """Wraps an app whose readers of fields note what they ignore."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with noting() as ignored:

            async def tell(message: Message) -> None:
                if ignored and message["type"] == "http.response.start":
                    header = (HEADER.encode(), str(ignored).encode())
                    message = {**message, "headers": [*message["headers"], header]}
                await send(message)

            await self._app(scope, receive, tell)
