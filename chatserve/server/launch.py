"""run_server: a controller in this process and one supervised worker per WEIGHTS.

Processes, ports, readiness, signals; no routes. Nothing is left behind, however this process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence

from chatserve import environment
from chatserve.config import ServeConfig
from chatserve.errors import ShuttingDown
from chatserve.options import ModelOptions
from chatserve.running_servers import (
    Announcement,
    RunningModel,
    RunningServer,
    announced,
    full_weights,
)
from chatserve.server.connection import within_file_limit
from chatserve.server.controller import create_controller_app
from chatserve.server.controller_process import access_policy
from chatserve.server.conversations import store_for
from chatserve.server.lifeline import tie_to_parent
from chatserve.server.listener import Listener, bind, url_of
from chatserve.server.moves import ResumePolicy
from chatserve.server.process import (
    EXIT_INTERRUPTED,
    StopSignals,
    configure_logging,
    run_process,
    run_until,
)
from chatserve.server.registry import WorkerRegistry
from chatserve.server.repertoire.measure import Measure, Planned
from chatserve.server.repertoire.models import Repertoire
from chatserve.server.repertoire.settings import all_models, loading_policy
from chatserve.server.repertoire.workers import Workers
from chatserve.server.response_store import ResponseStore
from chatserve.server.service_manager import ServiceManager
from chatserve.server.socket_folder import socket_folder
from chatserve.server.supervisor import RestartPolicy
from chatserve.server.tls import server_context
from chatserve.server.tracing import traced
from chatserve.settings import flags_of

logger = logging.getLogger(__name__)

# -P: no file of the folder that it is started in is ever imported
WORKER_COMMAND = (sys.executable, "-P", "-m", "chatserve.server.worker")
WORKER_STOP_S = 5.0
# workers listen on 127.0.0.1 and are called back where they call from
REACHED_OVER_IPV4_LOOPBACK = ("127.0.0.1", "localhost", "0.0.0.0")

Policy = Callable[[], RestartPolicy]


def run_server(
    config: ServeConfig,
    weights: Sequence[str],
    *,
    worker_command: Sequence[str] = WORKER_COMMAND,
    policy: Policy = RestartPolicy,
    measure: Measure | None = None,
) -> int:
    """Serve `weights` until a signal comes, and return the exit code.

    Prints `ready: URL (names)` on stdout once every model is ready; one line on stderr says why it
    failed. `worker_command` gets the flags of a worker and WEIGHTS; `measure` says what those take.
    """
    if config.parent_pipe is not None:
        tie_to_parent(config.parent_pipe)
    configure_logging("server", debug=config.debug, log_format=config.log_format)

    async def serve() -> int:
        return await _Server(config, weights, worker_command, policy, measure).serve()

    return run_process(serve, debug=config.debug)


class _Server:
    """One run of `chatserve serve`."""

    def __init__(
        self,
        config: ServeConfig,
        weights: Sequence[str],
        worker_command: Sequence[str],
        policy: Policy,
        measure: Measure | None,
    ) -> None:
        self._config = config
        self._first, self._waiting = all_models(config, weights)
        self._loading_policy = loading_policy(config)
        self._worker_command = tuple(worker_command)
        self._policy = policy
        self._measure = measure or Planned(config)
        # whoever started us may want to use it, too
        self._token = environment.control_token() or secrets.token_urlsafe(32)
        self._stop = StopSignals()
        # where the workers listen, by their ids
        self._sockets: dict[str, str] = {}
        self._workers: Workers
        self._announcement: Announcement | None = None
        self._has_changed = asyncio.Event()
        self._registry = WorkerRegistry(
            time.monotonic,
            expiry_s=config.heartbeat_expiry_s,
            stall_s=_stall_s(config),
            expected=[name for name, _ in self._first],
            on_change=self._note_change,
        )

    async def serve(self) -> int:
        """Raises `StartupError` when the address is taken or a worker is no use."""
        config = self._config
        policy = access_policy(config, self._token)
        repertoire = Repertoire(
            self._registry,
            lambda name, weights: self._workers.start(name, weights),
            self._measure,
            time.monotonic,
            self._loading_policy,
            on_change=lambda: self._announce_models(repertoire),
        )
        edge = create_controller_app(
            self._registry,
            control_token=self._token,
            policy=policy,
            heartbeat_interval_s=config.heartbeat_interval_s,
            response_store=ResponseStore.at_home() if config.store_responses else None,
            conversations=store_for(config, config.host, policy),
            resume=ResumePolicy(config.resume, config.resume_timeout_s),
            sockets=self._sockets,
            repertoire=repertoire,
            options=config,
        )
        # before the workers: who finds the port taken should not load a model first
        tls = server_context(config.ssl_certfile, config.ssl_keyfile)
        public = bind(config.host, config.port, tls)
        # the certificate is made out to another name than that by which our own workers come
        is_shared = config.host in REACHED_OVER_IPV4_LOOPBACK and tls is None
        control = public if is_shared else bind("127.0.0.1", 0)
        listener = Listener(
            edge, *dict.fromkeys((public, control)),
            max_connections=within_file_limit(config.max_connections, tls),
            write_timeout_s=config.write_timeout_s,
        )  # fmt: skip
        control_url = url_of("127.0.0.1", control)
        manager = ServiceManager.of_environment()
        async with contextlib.AsyncExitStack() as stack:
            folder = stack.enter_context(socket_folder())
            self._workers = Workers(
                config, self._worker_command, self._policy, self._registry,
                control_token=self._token, control_url=control_url, folder=folder,
                sockets=self._sockets,
            )  # fmt: skip
            for name, path in self._first:
                repertoire.declare(name, path, is_first=True)
            for name, path in self._waiting:
                repertoire.declare(name, path)
            edge.tracing = stack.enter_context(traced(config.otlp_traces_endpoint, "controller"))
            stack.enter_context(self._stop.installed())
            await stack.enter_async_context(manager.told(self._progress))
            await listener.start()
            announcement = self._announce(url_of(config.host, public), manager)
            if config.parent_pipe is None:
                # who is found may be used by others; a private one is its starter's alone
                self._announcement = stack.enter_context(announced(self._described(control_url)))
            if config.parent_pipe is not None:
                # who started us wants to ask how far the model is, before it is ready
                _tell(f"listening: {url_of(config.host, public)}/v1")
            try:
                await run_until(self._stop.asked, repertoire.outlive(), announcement)
            finally:
                manager.stopping()
                await self._shut_down(listener, repertoire)
        return EXIT_INTERRUPTED if self._stop.is_interrupted else 0

    async def _shut_down(self, listener: Listener, repertoire: Repertoire) -> None:
        async def abort() -> None:
            self._registry.abort(
                ShuttingDown("the server has shut down; try again when it is back")
            )
            repertoire.hurry()

        await repertoire.close()
        self._registry.close()
        insisted = self._stop.insisted
        await listener.drain(seconds=self._config.drain_timeout_s, hurry=insisted, abort=abort)
        await repertoire.stop(kill_after_s=WORKER_STOP_S, hurry=insisted)
        await listener.close()

    def _note_change(self) -> None:
        self._has_changed.set()
        self._workers.look()

    def _announce_models(self, repertoire: Repertoire) -> None:
        if self._announcement is not None:
            self._announcement.tell(
                RunningModel(model.name, full_weights(model.weights))
                for model in repertoire.models()
                if repertoire.policy.auto_load or model.phase in ("loading", "ready")
            )

    def _progress(self) -> str:
        return ", ".join(f"{model.name}: {model.state}" for model in self._registry.readiness())

    async def _announce(self, url: str, manager: ServiceManager) -> None:
        while not self._registry.is_ready():
            self._has_changed.clear()
            await self._has_changed.wait()
        manager.ready()
        _tell(f"ready: {url}/v1 ({', '.join(self._served())})")

    def _described(self, url: str) -> RunningServer:
        return RunningServer(
            url=url,
            pid=os.getpid(),
            started_at=time.time(),
            models=tuple(RunningModel(name, full_weights(path)) for name, path in self._first),
            control_token=self._token,
            flags=tuple(flags_of(self._config, ModelOptions)),
        )

    def _served(self) -> Sequence[str]:
        """Each model that there is, and each with its adapters behind it; else those that wait."""
        cards = self._registry.cards()
        return [
            card.name
            for name, _ in self._first
            for card in cards
            if name in (card.name, card.parent)
        ] or [name for name, _ in self._waiting]


def _stall_s(config: ServeConfig) -> float:
    """Whom its worker waits for is not given up here before."""
    given = config.stall_timeout_s
    return config.token_gap_timeout_s if given is None else given


def _tell(line: str) -> None:
    # whoever started us may not listen any more
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)
