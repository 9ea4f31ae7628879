"""create_worker_app: the OpenAI API over one engine and one model.

A complete server by itself. Knows no other worker and no dispatch; the process around it is
`worker_process.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chatserve.errors import ModelNotFound
from chatserve.protocol.anthropic import MESSAGES_PATH
from chatserve.protocol.control import MAX_NONCE_LEN, NONCE_HEADER, proof_of
from chatserve.protocol.replay import ID_PREFIX
from chatserve.protocol.responses import RESPONSES_PATH
from chatserve.server.adapted import fingerprint_of
from chatserve.server.adapter_routes import AdapterRoutes, OnChange, nobody_to_tell
from chatserve.server.cache_salt import salt_of
from chatserve.server.choices import Choice, choices_of
from chatserve.server.contract import Engine, ServedModel
from chatserve.server.conversation_store import ConversationStore
from chatserve.server.conversations import Conversations
from chatserve.server.disconnect import nobody_listens, until_disconnect
from chatserve.server.door import BehindDoor, Door
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.embedding_routes import EmbeddingRoutes
from chatserve.server.error_response import install_error_handlers
from chatserve.server.event_stream import EventStream
from chatserve.server.generation import Generation
from chatserve.server.journal import Journal
from chatserve.server.json_response import json_response
from chatserve.server.leniency import Lenient
from chatserve.server.lone_operator import LoneOperator
from chatserve.server.message_routes import MessageRoutes
from chatserve.server.model_slot import ModelSlot
from chatserve.server.openapi import document
from chatserve.server.opening import open_answer
from chatserve.server.page import Page
from chatserve.server.preparation import Prepared, prepare_chat, prepare_completion
from chatserve.server.preparation_pool import PreparationPool
from chatserve.server.ranker import Ranker
from chatserve.server.response_door import ResponseDoor
from chatserve.server.response_routes import ResponseRoutes
from chatserve.server.response_store import ResponseStore
from chatserve.server.resume_routes import GoOn, ResumeRoutes
from chatserve.server.resumption import Resumption
from chatserve.server.streaming import ReplyHead, chunk_encoder, fold, stream_frames
from chatserve.server.token_routes import TokenRoutes
from chatserve.server.truncation import dropped_headers

PING_INTERVAL_S = 15

Prepare = Callable[[bytes, ServedModel], Prepared]


def create_worker_app(
    engine: Engine,
    model: ServedModel,
    *,
    policy: AccessPolicy | None = None,
    control_token: str | None = None,
    ping_interval_s: float = PING_INTERVAL_S,
    is_lenient: bool = False,
    response_store: ResponseStore | None = None,
) -> Edge:
    """The ASGI app of a worker whose model is loaded and whose engine runs.

    Without a `policy` it is open to whoever speaks to a loopback name. With a `control_token` it
    can prove to a controller that it holds the token. `is_lenient`: fields that would be refused
    are left out and listed in a header.
    """
    slot = ModelSlot.filled(engine, model)
    return create_slot_app(
        slot, policy=policy, control_token=control_token, ping_interval_s=ping_interval_s,
        is_lenient=is_lenient, response_store=response_store,
    )  # fmt: skip


def create_slot_app(
    slot: ModelSlot,
    *,
    policy: AccessPolicy | None = None,
    control_token: str | None = None,
    ping_interval_s: float = PING_INTERVAL_S,
    is_lenient: bool = False,
    on_change: OnChange = nobody_to_tell,
    response_store: ResponseStore | None = None,
    conversations: ConversationStore | None = None,
) -> Edge:
    """The same for a slot that may still be empty: requests get 503 until it is filled.

    `on_change` is awaited when there is another model name, or one less. `response_store` and
    `conversations` are for a worker that is alone: behind a controller they are kept there, which
    has the page, too.
    """
    pool = PreparationPool()
    operator = LoneOperator(slot) if control_token is None else None

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with pool.open(), operator.watching() if operator else nullcontext():
            yield

    app = FastAPI(
        lifespan=lifespan, redirect_slashes=False,
        openapi_url=None, docs_url=None, redoc_url=None,
    )  # fmt: skip
    if operator is not None:
        operator.add_to(app)
    worker = WorkerRoutes(slot, control_token, ping_interval_s, pool)
    worker.add_to(app)
    TokenRoutes(slot, pool).add_to(app)
    EmbeddingRoutes(slot, pool, control_token).add_to(app)
    messages = MessageRoutes(slot, pool, control_token, ping_interval_s)
    messages.add_to(app)
    responses = ResponseRoutes(slot, pool, control_token, ping_interval_s)
    open_pages: frozenset[str] = frozenset()
    if control_token is None:
        ResponseDoor(response_store, responses).add_to(app)
        Conversations(conversations).add_to(app)
        page = Page()
        page.add_to(app)
        open_pages = page.paths
    else:
        responses.add_to(app)
    adapters = AdapterRoutes(slot, on_change)
    adapters.add_to(app)
    if control_token is not None:
        adapters.add_for_controller(app)
        streams: dict[str, GoOn] = {
            "/v1/chat/completions": worker.go_on_with_chat,
            "/v1/completions": worker.go_on_with_completion,
            MESSAGES_PATH: messages.go_on,
            RESPONSES_PATH: responses.go_on,
        }
        ResumeRoutes(streams, pool).add_to(app)
    document.add_to(app)
    install_error_handlers(app)
    door = Door(slot, control_token)
    app.add_middleware(BehindDoor, door)
    guarded = Lenient(app) if is_lenient else app
    return Edge(
        guarded, policy or AccessPolicy(), check_room=door.check, open_pages=open_pages,
        errors=slot.errors,
    )  # fmt: skip


class WorkerRoutes:
    """The routes of one worker and what they share."""

    def __init__(
        self,
        slot: ModelSlot,
        control_token: str | None,
        ping_interval_s: float,
        pool: PreparationPool,
    ) -> None:
        self._slot = slot
        self._control_token = control_token
        self._ping_interval_s = ping_interval_s
        self._pool = pool

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name:path}", self.model)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.complete, methods=["POST"])
        app.add_api_route("/health/live", self.live)
        app.add_api_route("/health/ready", self.ready)
        app.add_api_route("/health/decode", self.decode)

    async def chat(self, request: Request) -> Response:
        return await self.go_on_with_chat(request, await request.body())

    async def complete(self, request: Request) -> Response:
        return await self.go_on_with_completion(request, await request.body())

    async def go_on_with_chat(
        self, request: Request, body: bytes, resumption: Resumption | None = None
    ) -> Response:
        return await self._answer(request, body, prepare_chat, "chatcmpl-", resumption)

    async def go_on_with_completion(
        self, request: Request, body: bytes, resumption: Resumption | None = None
    ) -> Response:
        return await self._answer(request, body, prepare_completion, "cmpl-", resumption)

    async def models(self) -> Response:
        cards = [card.to_openai() for card in self._slot.cards()]
        return json_response({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        for card in self._slot.cards():
            if card.name == name:
                return json_response(card.to_openai())
        names = ", ".join(card.name for card in self._slot.cards())
        raise ModelNotFound(
            f"model {name[:100]!r} is not served here; there is {names}", param="model"
        )

    async def live(self, request: Request) -> Response:
        """The process answers. To a controller's nonce it also proves that it holds the token."""
        reply = {"status": "live"}
        nonce = request.headers.get(NONCE_HEADER)
        if self._control_token and nonce and len(nonce) <= MAX_NONCE_LEN:
            reply["proof"] = proof_of(self._control_token, nonce)
        return json_response(reply)

    async def ready(self) -> Response:
        state = self._slot.state
        models = [
            {
                "name": name,
                "state": state,
                "loaded_bytes": self._slot.loaded_bytes,
                "total_bytes": self._slot.total_bytes,
            }
            for name in self._slot.names
        ]
        return json_response({"status": state, "models": models}, 200 if state == "ready" else 503)

    async def decode(self) -> Response:
        """Whether tokens come: an engine that has work and makes none is not healthy."""
        engine = self._slot.engine
        if engine is None:
            return json_response({"status": "loading"}, 503)
        stats = engine.stats()
        is_stalled = self._slot.is_stalled
        reply = {
            "status": "stalled" if is_stalled else "decoding",
            "tick": stats.tick,
            "last_token_age_s": round(stats.last_token_age_s, 3),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
        }
        return json_response(reply, 503 if is_stalled else 200)

    async def _answer(
        self,
        request: Request,
        body: bytes,
        prepare: Prepare,
        prefix: str,
        resumption: Resumption | None,
    ) -> Response:
        engine, model = self._slot.served()
        prepared = await self._pool.run(prepare, body, model)
        opening = open_answer(
            ID_PREFIX if prepared.is_replay else prefix, prepared,
            fingerprint_of(model, prepared.adapter), engine, request.headers,
            self._control_token, resumption,
        )  # fmt: skip
        prepared = opening.prepared
        head = ReplyHead(
            opening.request_id, opening.created, prepared.model, opening.fingerprint,
            prepared.is_chat,
        )  # fmt: skip
        salt = salt_of(request.headers, self._control_token)
        headers = dropped_headers(prepared.rolled)
        generation = await Generation.submit(
            engine, opening.request_id, prepared, salt, request.receive, resumption
        )
        choices = choices_of(prepared, model.tokenizer, opening.request_id)
        if prepared.is_stream:
            await generation.replay(
                resumption, lambda index, event: choices and choices[index].feed(event)
            )
            stream = self._stream(generation, head, choices, opening.journal)
            stream.headers.update(headers)
            return stream
        try:
            ranker = None
            if prepared.ranking is not None:
                ranker = Ranker(
                    engine, model, self._pool, prepared, prepared.ranking, opening.request_id, salt
                )
            answer = fold(generation, head, choices, ranker)
            response = json_response(await until_disconnect(request.receive, answer))
            response.headers.update(headers)
            return response
        except ClientDisconnect:
            return nobody_listens(request)
        finally:
            await generation.aclose()
            generation.log_summary()

    def _stream(
        self, generation: Generation, head: ReplyHead, choices: Sequence[Choice], journal: Journal
    ) -> EventStream:
        frames = stream_frames(generation, chunk_encoder(generation, head), choices, journal)
        stream = EventStream(generation, frames, self._ping_interval_s)
        stream.headers.update(journal.headers)
        return stream


if __name__ == "__main__":
    from chatserve.server import command_line

    raise SystemExit(command_line.worker())
