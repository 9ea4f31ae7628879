"""create_controller_app: the public API over registered workers, and the control plane they use.

Holds no model, no template, no torch. The process around it is `controller_process.py`, or
`launch.py` when it supervises its own workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chatserve.config import adapted_name
from chatserve.errors import (
    InvalidRequest,
    ModelNotFound,
    NoWorkerAvailable,
    RegistrationRefused,
)
from chatserve.options import ModelOptions
from chatserve.protocol.adapters import LOAD_PATH, UNLOAD_PATH
from chatserve.protocol.anthropic import COUNT_TOKENS_PATH, MESSAGES_PATH
from chatserve.protocol.control import (
    HEARTBEAT_PATH,
    LEAVE_PATH,
    NONCE_HEADER,
    REGISTER_PATH,
    ControlMessage,
    Heartbeat,
    HeartbeatReply,
    Leave,
    Registered,
    Registration,
    parse,
    proof_of,
)
from chatserve.protocol.embeddings import EMBEDDINGS_PATH, SCORE_PATH
from chatserve.protocol.fields import model_of, reward_of
from chatserve.protocol.tokens import DETOKENIZE_PATH, TOKENIZE_PATH
from chatserve.server.adapter_dispatch import AdapterDispatch
from chatserve.server.controller_door import ControllerDoor
from chatserve.server.conversation_store import ConversationStore
from chatserve.server.conversations import Conversations
from chatserve.server.disconnect import nobody_listens
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.error_log import ErrorLog
from chatserve.server.error_response import install_error_handlers
from chatserve.server.json_response import json_response
from chatserve.server.moves import RESUME, ResumePolicy
from chatserve.server.openapi import document
from chatserve.server.operator_routes import OperatorRoutes, WorkerSeen, shown_address
from chatserve.server.page import Page
from chatserve.server.registry import WorkerRegistry
from chatserve.server.relay import Relay
from chatserve.server.repertoire.gate import Gate, LoadingStream
from chatserve.server.repertoire.models import Repertoire
from chatserve.server.repertoire.routes import RepertoireRoutes
from chatserve.server.repertoire.rows import ModelRows, as_seen_by
from chatserve.server.response_door import ResponseDoor
from chatserve.server.response_store import ResponseStore
from chatserve.server.worker_client import WorkerClient
from chatserve.server.worker_watch import watch_workers

CALL_BACK_TIMEOUT_S = 3.0
MAX_CALL_BACK_BYTES = 64 * 1024
# parsing a larger body takes longer than a stream should wait for its next token
MAX_INLINE_BODY_BYTES = 64 * 1024


def create_controller_app(
    registry: WorkerRegistry,
    *,
    control_token: str,
    policy: AccessPolicy | None = None,
    heartbeat_interval_s: float = 2.0,
    response_store: ResponseStore | None = None,
    conversations: ConversationStore | None = None,
    resume: ResumePolicy = RESUME,
    sockets: Mapping[str, str] = MappingProxyType({}),
    repertoire: Repertoire | None = None,
    options: ModelOptions | None = None,
) -> Edge:
    """The ASGI app of a controller. Without a `policy` it is open to loopback names.

    `response_store`: where responses are kept that others go on from; None keeps none.
    `conversations`: the same for those of the page. `resume`: whether and for how long answers look
    for another worker when theirs is lost. `sockets`: where workers listen, by their ids, that were
    told to by who runs this controller. `repertoire`: the models whose workers it starts, if it
    does, with `options`.
    """
    controller = ControllerRoutes(
        registry, control_token, heartbeat_interval_s, resume, sockets, repertoire
    )
    app = FastAPI(
        lifespan=controller.lifespan, redirect_slashes=False,
        openapi_url=None, docs_url=None, redoc_url=None,
    )  # fmt: skip
    controller.add_to(app)
    ResponseDoor(response_store, controller).add_to(app)
    RepertoireRoutes(registry, repertoire, controller.rows, options).add_to(app)
    Conversations(conversations).add_to(app)
    page = Page()
    page.add_to(app)
    document.add_to(app)
    install_error_handlers(app)
    if policy is None:
        policy = AccessPolicy.build("127.0.0.1", control_token=control_token)
    door = ControllerDoor(registry, can_load=repertoire is not None and repertoire.policy.auto_load)
    controller.edge = Edge(
        app, policy, check_room=door.check, open_pages=page.paths,
        errors=controller.errors,
    )  # fmt: skip
    return controller.edge


class ControllerRoutes:
    """The routes of one controller and what they share."""

    edge: Edge

    def __init__(
        self,
        registry: WorkerRegistry,
        control_token: str,
        heartbeat_interval_s: float,
        resume: ResumePolicy,
        sockets: Mapping[str, str],
        repertoire: Repertoire | None,
    ) -> None:
        self._registry = registry
        self._token = control_token
        self._heartbeat_interval_s = heartbeat_interval_s
        self._resume = resume
        self._sockets = sockets
        self._repertoire = repertoire
        self.rows = ModelRows(registry, repertoire)
        self._gate = (
            None
            if repertoire is None
            else Gate(repertoire, self.rows, self._relayed, lambda: self._adapters)
        )
        self.errors = ErrorLog()
        self._operator = OperatorRoutes(
            self._workers, self.errors, is_draining=lambda: self.edge.is_draining,
            more=self._models_known,
        )  # fmt: skip
        self._client: WorkerClient
        self._relay: Relay
        self._adapters: AdapterDispatch

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        async with WorkerClient() as self._client:
            self._relay = Relay(self._registry, self._client, self._token, self._resume)
            self._adapters = AdapterDispatch(self._registry, self._client, self._token)
            watch = asyncio.create_task(watch_workers(self._registry))
            try:
                async with contextlib.aclosing(self._adapters), self._operator.watching():
                    yield
            finally:
                watch.cancel()

    def add_to(self, app: FastAPI) -> None:
        self._operator.add_to(app)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name:path}", self.model)
        app.add_api_route("/v1/chat/completions", self.forward, methods=["POST"])
        app.add_api_route("/v1/completions", self.forward, methods=["POST"])
        app.add_api_route(MESSAGES_PATH, self.forward, methods=["POST"])
        app.add_api_route(COUNT_TOKENS_PATH, self.forward, methods=["POST"])
        app.add_api_route(EMBEDDINGS_PATH, self.forward, methods=["POST"])
        app.add_api_route(SCORE_PATH, self.forward, methods=["POST"])
        app.add_api_route(TOKENIZE_PATH, self.forward_tokens, methods=["POST"])
        app.add_api_route(DETOKENIZE_PATH, self.forward_tokens, methods=["POST"])
        app.add_api_route(LOAD_PATH, self.load_adapter, methods=["POST"])
        app.add_api_route(UNLOAD_PATH, self.unload_adapter, methods=["POST"])
        app.add_api_route("/health/live", self.live)
        app.add_api_route("/health/ready", self.ready)
        app.add_api_route("/health/decode", self.decode)
        app.add_api_route(REGISTER_PATH, self.register, methods=["POST"])
        app.add_api_route(HEARTBEAT_PATH, self.heartbeat, methods=["POST"])
        app.add_api_route(LEAVE_PATH, self.leave, methods=["POST"])

    async def forward(self, request: Request) -> Response:
        """Any completion: to a worker as it came, and back as it comes."""
        return await self._forward(request, None)

    async def forward_tokens(self, request: Request) -> Response:
        """The same, and the model may be left out where there is only one."""
        bases = [card["id"] for card in self.rows.cards() if card["parent"] is None]
        return await self._forward(request, bases[0] if len(bases) == 1 else None)

    async def _forward(self, request: Request, default_model: str | None) -> Response:
        try:
            body = await request.body()
            if len(body) <= MAX_INLINE_BODY_BYTES:
                names = _names(body, default_model)
            else:
                names = await asyncio.to_thread(_names, body, default_model)
            return await self._to_worker(request, self._place_of(*names), body)
        except ClientDisconnect:
            return nobody_listens(request)

    def _place_of(self, model: str, reward: str | None) -> str:
        """By which name to look for a worker: not every one of a base need have the reward model
        that is to rank its answers."""
        if reward is None:
            return model
        ranked = reward if reward.startswith(f"{model}:") else adapted_name(model, reward)
        is_served = any(card.name == ranked for card in self._registry.cards())
        return ranked if is_served else model

    async def respond(self, request: Request, body: bytes, model: object) -> Response:
        """A response, in whose body an earlier one is expanded already."""
        if not isinstance(model, str):
            raise InvalidRequest("model is missing or not a text", param="model")
        return await self._to_worker(request, model, body)

    async def _to_worker(self, request: Request, model: str, body: bytes) -> Response:
        if self._gate is None:
            return await self._relayed(request, model, body)
        return await self._gate.forward(request, model, body)

    async def _relayed(self, request: Request, model: str, body: bytes) -> Response:
        return await self._relay.forward(request, model, body)

    async def cancel(self, request: Request, _response_id: str, stream: Response) -> Response:
        """End a response that comes from a worker, there."""
        if isinstance(stream, LoadingStream):
            if stream.inner is None:
                raise NoWorkerAvailable("its model is not loaded yet; try again in a moment")
            stream = stream.inner
        return await self._relay.forward_again(request, stream, b"{}")

    async def models(self) -> Response:
        return json_response({"object": "list", "data": self.rows.cards()})

    async def model(self, name: str) -> Response:
        cards = {card["id"]: card for card in self.rows.cards()}
        if name not in cards:
            raise ModelNotFound(
                f"model {name[:100]!r} is not served here; there is "
                f"{', '.join(cards) or 'none yet'}",
                param="model",
            )
        return json_response(cards[name])

    async def load_adapter(self, request: Request) -> Response:
        return await self._adapters.load(request)

    async def unload_adapter(self, request: Request) -> Response:
        return await self._adapters.unload(request)

    async def live(self) -> Response:
        return json_response({"status": "live"})

    async def ready(self) -> Response:
        """200 once every expected model has a ready worker; the body says how far each is."""
        is_ready = self._registry.is_ready() and not self.edge.is_draining
        status = "ready" if is_ready else "draining" if self.edge.is_draining else "loading"
        reply = {"status": status, "models": self._models_ready()}
        return json_response(reply, 200 if is_ready else 503)

    def _models_ready(self) -> list[dict[str, Any]]:
        return [
            {
                "name": model.name,
                "state": self.rows.state_in(model),
                "loaded_bytes": model.loaded_bytes,
                "total_bytes": model.total_bytes,
            }
            for model in self._registry.readiness()
        ]

    def _models_known(self) -> dict[str, Any]:
        """Where their files lie is for operators."""
        rows = self.rows.rows(time.monotonic())
        return {"models": [as_seen_by(row, is_operator=False) for row in rows]}

    def _workers(self) -> list[WorkerSeen]:
        return [
            (worker.worker_id, state, shown_address(worker.base_url), worker.status)
            for worker, state in self._registry.overview()
        ]

    async def decode(self) -> Response:
        """Whether tokens come: 503 while a worker has work and makes no step."""
        stalled = [worker.worker_id for worker in self._registry.stalled()]
        reply = {"status": "stalled" if stalled else "decoding", "stalled": stalled}
        return json_response(reply, 503 if stalled else 200)

    async def register(self, request: Request) -> Response:
        """List a worker, once a call back to where it says it listens has proved that it is one."""
        message = parse(Registration, await request.body())
        base_url = self._sockets.get(message.worker_id) or _caller_at(request, message.port)
        await self._call_back(base_url)
        status = self._adapters.hear(message.worker_id, message.status, registers=True)
        self._registry.register(message.worker_id, base_url, status)
        self._operator.hear(message.worker_id, status)
        self._adapters.restore(message.worker_id)
        return control_response(Registered(heartbeat_interval_s=self._heartbeat_interval_s))

    async def heartbeat(self, request: Request) -> Response:
        message = parse(Heartbeat, await request.body())
        status = self._adapters.hear(message.worker_id, message.status)
        is_known = self._registry.heartbeat(message.worker_id, status)
        if is_known:
            self._operator.hear(message.worker_id, status)
        await self._probe(message.worker_id)
        self._adapters.restore(message.worker_id)
        return control_response(HeartbeatReply(is_known=is_known))

    async def leave(self, request: Request) -> Response:
        message = parse(Leave, await request.body())
        self._registry.leave(message.worker_id)
        return control_response(HeartbeatReply(is_known=False))

    async def _probe(self, worker_id: str) -> None:
        """Give an ejected worker that beats again its way back."""
        worker = self._registry.worker_to_probe(worker_id)
        if worker is None:
            return
        try:
            await self._call_back(worker.base_url)
        except RegistrationRefused:
            self._registry.eject(worker_id)
        else:
            self._registry.readmit(worker_id)

    async def _call_back(self, base_url: str) -> None:
        """Raises `RegistrationRefused` unless a worker with our token listens there."""
        nonce = secrets.token_hex(16)
        try:
            async with (
                asyncio.timeout(CALL_BACK_TIMEOUT_S),
                self._client.get(
                    base_url, "/health/live", headers={NONCE_HEADER: nonce}
                ) as response,
            ):
                body = await response.content.read(MAX_CALL_BACK_BYTES)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RegistrationRefused(
                f"the controller cannot reach the worker at {base_url}: "
                f"{str(error) or type(error).__name__}; check --host and the firewall"
            ) from error
        if not _is_proof(body, proof_of(self._token, nonce)):
            raise RegistrationRefused(
                f"whoever listens at {base_url} does not know the control token; check --port"
            )


def _names(body: bytes, default_model: str | None) -> tuple[str, str | None]:
    """Of the model that a request asks for, and of the reward model that is to rank its answers."""
    return model_of(body, default_model), reward_of(body)


def _caller_at(request: Request, port: int | None) -> str:
    """The host comes from the connection: nobody can be named who did not call."""
    if request.client is None or port is None:
        raise RegistrationRefused("the worker names no port; start it with --port")
    host = request.client.host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _is_proof(body: bytes, expected: str) -> bool:
    try:
        reply = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    proof = reply.get("proof") if isinstance(reply, dict) else None
    return isinstance(proof, str) and hmac.compare_digest(proof.encode(), expected.encode())


def control_response(message: ControlMessage) -> Response:
    return json_response(message.model_dump(mode="json"))


if __name__ == "__main__":
    from chatserve.server import command_line

    raise SystemExit(command_line.controller())
