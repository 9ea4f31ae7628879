"""A worker's /v1/messages and /v1/messages/count_tokens, as Anthropic's clients speak."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chatserve.errors import ContextLengthExceeded
from chatserve.protocol.anthropic import (
    COUNT_TOKENS_PATH,
    MESSAGES_PATH,
    AskedMessage,
    parse_count_tokens,
    parse_messages,
)
from chatserve.server.adapted import find_adapter, fingerprint_of
from chatserve.server.answer_events import choice_of, fold_answer, replay, stream_answer
from chatserve.server.cache_salt import salt_of
from chatserve.server.cancellation import Cancellation
from chatserve.server.contract import ServedModel, Tokenizer
from chatserve.server.disconnect import nobody_listens, until_disconnect
from chatserve.server.event_stream import EventStream
from chatserve.server.generation import Generation
from chatserve.server.json_response import json_response
from chatserve.server.message_events import JournaledPing, MessageEncoder, ping_event, usage_of
from chatserve.server.model_slot import ModelSlot
from chatserve.server.opening import open_answer
from chatserve.server.preparation import Prepared, chat_prompt, prepare_chat_request
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.resumption import Resumption
from chatserve.server.stop_sequence import StopSequence


class MessageRoutes:
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

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(MESSAGES_PATH, self.create, methods=["POST"])
        app.add_api_route(COUNT_TOKENS_PATH, self.count_tokens, methods=["POST"])

    async def create(self, request: Request) -> Response:
        return await self.go_on(request, await request.body())

    async def go_on(
        self, request: Request, body: bytes, resumption: Resumption | None = None
    ) -> Response:
        engine, model = self._slot.served()
        asked, prepared = await self._pool.run(_prepare, body, model)
        opening = open_answer(
            "msg_", prepared, fingerprint_of(model, prepared.adapter), engine, request.headers,
            self._control_token, resumption,
        )  # fmt: skip
        prepared = opening.prepared
        salt = salt_of(request.headers, self._control_token)
        with asked.names.in_errors():
            generation = await Generation.submit(
                engine, opening.request_id, prepared, salt, request.receive, resumption
            )
        encoder = MessageEncoder(
            opening.request_id,
            prepared.model,
            opening.fingerprint,
            partial(usage_of, generation),
            _stop_sequence(asked, prepared, model.tokenizer),
        )
        choice = choice_of(generation, model.tokenizer)
        if prepared.is_stream:
            await replay(generation, choice, encoder, resumption)
            frames = stream_answer(generation, choice, encoder, Cancellation(), opening.journal)
            ping = JournaledPing if opening.journal.headers else ping_event
            stream = EventStream(generation, frames, self._ping_interval_s, ping)
            stream.headers.update(opening.journal.headers)
            return stream
        try:
            await until_disconnect(request.receive, fold_answer(generation, choice, encoder))
            return json_response(encoder.message)
        except ClientDisconnect:
            return nobody_listens(request)
        finally:
            await generation.aclose()
            generation.log_summary()

    async def count_tokens(self, request: Request) -> Response:
        """How many tokens the prompt of a message would have."""
        _, model = self._slot.served()
        count = await self._pool.run(_count, await request.body(), model)
        return json_response({"input_tokens": count})


def _prepare(body: bytes, model: ServedModel) -> tuple[AskedMessage, Prepared]:
    """Raises `InvalidRequest` and its children, `ModelNotFound`."""
    asked = parse_messages(body)
    with asked.names.in_errors():
        return asked, prepare_chat_request(asked.chat, model)


def _count(body: bytes, model: ServedModel) -> int:
    """Raises as `_prepare` does; `ContextLengthExceeded` only where the length is the matter."""
    asked = parse_count_tokens(body)
    find_adapter(model, asked.chat.model)
    with asked.names.in_errors():
        try:
            return len(chat_prompt(asked.chat, model).ids)
        except ContextLengthExceeded:
            if asked.chat.is_open or asked.chat.offers_tools:
                raise
            return len(model.tokenization.of_chat(asked.chat.messages))


def _stop_sequence(asked: AskedMessage, prepared: Prepared, tokenizer: Tokenizer) -> StopSequence:
    return StopSequence(
        tokenizer,
        asked.chat.stop,
        strip_leading_space=prepared.strip_leading_space and tokenizer.strips_leading_space,
    )
