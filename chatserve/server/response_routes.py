"""A worker's side of /v1/responses: makes responses and cancels them, keeps none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatserve.errors import InvalidRequest, ResponseNotFound
from chatserve.protocol.responses import RESPONSES_PATH, AskedResponse, parse_response
from chatserve.server.adapted import fingerprint_of
from chatserve.server.answer_events import (
    Event,
    choice_of,
    fold_answer,
    replay,
    stream_answer,
)
from chatserve.server.cache_salt import salt_of
from chatserve.server.cancellation import Cancellation
from chatserve.server.contract import ServedModel
from chatserve.server.disconnect import nobody_listens, until_disconnect
from chatserve.server.event_stream import EventStream
from chatserve.server.generation import Generation
from chatserve.server.json_response import json_response
from chatserve.server.model_slot import ModelSlot
from chatserve.server.opening import open_answer
from chatserve.server.preparation import MAX_SCORES, Prepared, prepare_chat_request
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.response_events import ResponseEncoder
from chatserve.server.response_object import head_of, items_of, usage_of
from chatserve.server.resumption import Resumption
from chatserve.server.truncation import dropped_headers


@dataclass(frozen=True)
class _Running:
    """A response on its way out, and whose it is."""

    salt: bytes
    generation: Generation
    encoder: ResponseEncoder
    cancellation: Cancellation[Event] = field(default_factory=Cancellation)

    async def cancel(self) -> None:
        """Now, whether or not anybody reads the stream: its last events wait for who does."""
        if not self.encoder.has_ended:
            self.cancellation.ask([*self.encoder.cancel()])
        await self.generation.aclose()


class ResponseRoutes:
    def __init__(
        self,
        slot: ModelSlot,
        pool: PreparationPool,
        control_token: str | None,
        ping_interval_s: float,
    ) -> None:
        self._slot = slot
        self._pool = pool
        self._control_token = control_token
        self._ping_interval_s = ping_interval_s
        self._running: dict[str, _Running] = {}

    def add_to(self, app: FastAPI) -> None:
        """For a worker behind a controller, where the door is."""
        app.add_api_route(RESPONSES_PATH, self.create, methods=["POST"])
        app.add_api_route(
            RESPONSES_PATH + "/{response_id}/cancel", self.cancel_here, methods=["POST"]
        )

    async def create(self, request: Request) -> Response:
        return await self.go_on(request, await request.body())

    async def cancel_here(self, request: Request, response_id: str) -> Response:
        return await self.cancel(request, response_id, None)

    async def respond(self, request: Request, body: bytes, _model: object) -> Response:
        """Answer `body`, in which an earlier response is expanded already."""
        return await self.go_on(request, body)

    async def go_on(
        self, request: Request, body: bytes, resumption: Resumption | None = None
    ) -> Response:
        engine, model = self._slot.served()
        asked, prepared = await self._pool.run(_prepare, body, model)
        opening = open_answer(
            "resp_", prepared, fingerprint_of(model, prepared.adapter), engine, request.headers,
            self._control_token, resumption,
        )  # fmt: skip
        response_id, prepared = opening.request_id, opening.prepared
        salt = salt_of(request.headers, self._control_token)
        with asked.names.in_errors():
            generation = await Generation.submit(
                engine, response_id, prepared, salt, request.receive, resumption
            )
        encoder = ResponseEncoder(
            head_of(asked, prepared, response_id, opening.created, opening.fingerprint),
            partial(usage_of, generation, asked.places),
            shows_logprobs=prepared.shows_logprobs,
        )
        headers = _dropped(asked, prepared)
        choice = choice_of(generation, model.tokenizer)
        if prepared.is_stream:
            await replay(generation, choice, encoder, resumption)
            running = self._running[response_id] = _Running(salt, generation, encoder)
            frames = stream_answer(
                generation, choice, encoder, running.cancellation, opening.journal
            )
            stream = _Stream(generation, frames, self._ping_interval_s)
            stream.headers.update({**headers, **opening.journal.headers})
            stream.on_end = partial(self._forget, response_id, running)
            return stream
        try:
            await until_disconnect(request.receive, fold_answer(generation, choice, encoder))
            response = json_response(encoder.response)
            response.headers.update(headers)
            return response
        except ClientDisconnect:
            return nobody_listens(request)
        finally:
            await generation.aclose()
            generation.log_summary()

    async def cancel(
        self, request: Request, response_id: str, _stream: Response | None
    ) -> Response:
        """End a stream of the same key; what it has become. Raises `ResponseNotFound`."""
        running = self._running.get(response_id)
        if running is None or running.salt != salt_of(request.headers, self._control_token):
            raise ResponseNotFound(
                f"response {response_id[:100]!r} is not being streamed here", param="response_id"
            )
        await running.cancel()
        return json_response(running.encoder.response)

    def _forget(self, response_id: str, running: _Running) -> None:
        # what was cut off may have gone on here, before this was noticed
        if self._running.get(response_id) is running:
            del self._running[response_id]


class _Stream(EventStream):
    """`on_end` is called when nothing more will be sent."""

    on_end: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


def _prepare(body: bytes, model: ServedModel) -> tuple[AskedResponse, Prepared]:
    """Raises `InvalidRequest` and its children, `ModelNotFound`."""
    asked = parse_response(body)
    with asked.names.in_errors():
        prepared = prepare_chat_request(asked.chat, model, rolling="auto")
        _check_num_logprobs(prepared)
        return asked, prepared


def _check_num_logprobs(prepared: Prepared) -> None:
    """The last events of a stream, and what is kept, have those of all tokens at once."""
    [prompt] = prepared.prompts
    if prompt.params.logprobs is None:
        return
    num_tokens, num_each = prompt.params.max_tokens, 1 + prompt.params.logprobs
    if num_tokens * num_each > MAX_SCORES:
        raise InvalidRequest(
            f"max_tokens: {num_each} logprobs of up to {num_tokens:,} tokens are "
            f"{num_tokens * num_each:,} numbers, the limit is {MAX_SCORES:,}; give a number of at "
            f"most {MAX_SCORES // num_each:,}, or lower top_logprobs",
            param="max_tokens",
        )


def _dropped(asked: AskedResponse, prepared: Prepared) -> Mapping[str, str]:
    """In headers, items are counted as they came."""
    rolled = prepared.rolled
    if rolled is None:
        return {}
    items = tuple(items_of(rolled.messages_dropped, asked.places))
    return dropped_headers(replace(rolled, messages_dropped=items))
