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
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chatserve import environment
from chatserve.config import ServeConfig, served_names
from chatserve.errors import ShuttingDown, UsageError
from chatserve.options import MAX_CONNECTIONS, ApiOptions, EngineConfig, ModelOptions, TimeLimits
from chatserve.protocol.control import SOCKET_SCHEME
from chatserve.running_servers import RunningModel, RunningServer, announced, full_weights
from chatserve.server.connection import within_file_limit
from chatserve.server.controller import create_controller_app
from chatserve.server.controller_process import access_policy
from chatserve.server.conversations import store_for
from chatserve.server.leases import Worker
from chatserve.server.lifeline import tie_to_parent
from chatserve.server.listener import Listener, bind, url_of
from chatserve.server.moves import ResumePolicy
from chatserve.server.process import (
    EXIT_INTERRUPTED,
    StopSignals,
    cancelled,
    configure_logging,
    outlive,
    run_process,
    run_until,
)
from chatserve.server.registry import WorkerRegistry
from chatserve.server.response_store import ResponseStore
from chatserve.server.service_manager import ServiceManager
from chatserve.server.socket_folder import socket_folder
from chatserve.server.supervisor import RestartPolicy, Supervisor
from chatserve.server.tls import server_context
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
) -> int:
    """Serve `weights` until a signal comes, and return the exit code.

    Prints `ready: URL (names)` on stdout once every model is ready; one line on stderr says why it
    failed. `worker_command` gets WEIGHTS and the flags of a worker.
    """
    if config.parent_pipe is not None:
        tie_to_parent(config.parent_pipe)
    configure_logging("server", debug=config.debug, log_format=config.log_format)

    async def serve() -> int:
        return await _Server(config, weights, worker_command, policy).serve()

    return run_process(serve, debug=config.debug)


class _Child:
    """One worker process of ours, as the registry knows it, or has known it."""

    def __init__(self) -> None:
        self.worker_id = ""
        self._worker: Worker | None = None

    def begin(self) -> None:
        self.worker_id, self._worker = uuid.uuid4().hex, None

    def look_at(self, registry: WorkerRegistry) -> None:
        self._worker = registry.find(self.worker_id) or self._worker

    @property
    def ready_s(self) -> float:
        return 0.0 if self._worker is None else self._worker.ready_s


class _Server:
    """One run of `chatserve serve`."""

    def __init__(
        self,
        config: ServeConfig,
        weights: Sequence[str],
        worker_command: Sequence[str],
        policy: Policy,
    ) -> None:
        self._config = config
        self._models = named(weights, config.model_names)
        self._worker_command = tuple(worker_command)
        self._policy = policy
        # whoever started us may want to use it, too
        self._token = environment.control_token() or secrets.token_urlsafe(32)
        self._stop = StopSignals()
        # where the workers listen, by their ids
        self._sockets: dict[str, str] = {}
        self._children: list[_Child] = []
        self._has_changed = asyncio.Event()
        self._registry = WorkerRegistry(
            time.monotonic,
            expiry_s=config.heartbeat_expiry_s,
            stall_s=_stall_s(config),
            expected=[name for name, _ in self._models],
            on_change=self._note_change,
        )

    async def serve(self) -> int:
        """Raises `StartupError` when the address is taken or a worker is no use."""
        config = self._config
        policy = access_policy(config, self._token)
        edge = create_controller_app(
            self._registry,
            control_token=self._token,
            policy=policy,
            heartbeat_interval_s=config.heartbeat_interval_s,
            response_store=ResponseStore.at_home() if config.store_responses else None,
            conversations=store_for(config, config.host, policy),
            resume=ResumePolicy(config.resume, config.resume_timeout_s),
            sockets=self._sockets,
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
            workers = [
                self._supervisor(control_url, folder and folder / f"{index}.sock", *model)
                for index, model in enumerate(self._models)
            ]
            stack.enter_context(self._stop.installed())
            await stack.enter_async_context(manager.told(self._progress))
            await listener.start()
            running = [asyncio.create_task(worker.run()) for worker in workers]
            announcement = self._announce(url_of(config.host, public), manager)
            if config.parent_pipe is None:
                # who is found may be used by others; a private one is its starter's alone
                stack.enter_context(announced(self._described(control_url)))
            if config.parent_pipe is not None:
                # who started us wants to ask how far the model is, before it is ready
                _tell(f"listening: {url_of(config.host, public)}/v1")
            try:
                await run_until(self._stop.asked, *map(outlive, running), announcement)
            finally:
                manager.stopping()
                await self._shut_down(listener, workers)
                await cancelled(running)
        return EXIT_INTERRUPTED if self._stop.is_interrupted else 0

    async def _shut_down(self, listener: Listener, workers: Sequence[Supervisor]) -> None:
        async def abort() -> None:
            self._registry.abort(
                ShuttingDown("the server has shut down; try again when it is back")
            )
            for worker in workers:
                worker.hurry()

        for worker in workers:
            worker.retire()
        self._registry.close()
        insisted = self._stop.insisted
        await listener.drain(seconds=self._config.drain_timeout_s, hurry=insisted, abort=abort)
        stops = (each.stop(kill_after_s=WORKER_STOP_S, hurry=insisted) for each in workers)
        await asyncio.gather(*stops)
        await listener.close()

    def _note_change(self) -> None:
        self._has_changed.set()
        for child in self._children:
            child.look_at(self._registry)

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
            models=tuple(RunningModel(name, full_weights(path)) for name, path in self._models),
            control_token=self._token,
            flags=tuple(flags_of(self._config, ModelOptions)),
        )

    def _served(self) -> Sequence[str]:
        """Each model, and each with its adapters behind it."""
        cards = self._registry.cards()
        return [
            card.name
            for name, _ in self._models
            for card in cards
            if name in (card.name, card.parent)
        ]

    def _supervisor(
        self, control_url: str, socket_path: Path | None, name: str, weights: str
    ) -> Supervisor:
        child = _Child()
        self._children.append(child)

        def worker_environment(lifeline_fd: int) -> Mapping[str, str]:
            child.begin()
            if socket_path is not None:
                self._sockets[child.worker_id] = f"{SOCKET_SCHEME}{socket_path}"
            return environment.child_environment(
                CHATSERVE_CONTROL_TOKEN=self._token,
                CHATSERVE_WORKER_ID=child.worker_id,
                CHATSERVE_PARENT_PIPE=str(lifeline_fd),
                CHATSERVE_SOCKET_PATH=str(socket_path or ""),
                # what a file of settings says to workers that are alone
                CHATSERVE_NO_REGISTER="false",
                # the clients' keys are none of a worker's business
                CHATSERVE_API_KEYS="",
            )

        def forget() -> float:
            self._sockets.pop(child.worker_id, None)
            self._registry.remove(child.worker_id)
            return child.ready_s

        command = [
            *self._worker_command,
            *flags_of(self._config, ModelOptions, EngineConfig, TimeLimits, ApiOptions),
            *("--host=127.0.0.1", "--port=0", f"--controller={control_url}"),
            f"--model-names={name}",
            f"--log-format={self._config.log_format}",
            *("--ssl-certfile=", "--ssl-keyfile=", "--ssl-ca-certs="),
            # whoever is let in here finds room there
            f"--max-connections={min(self._config.max_connections + 64, MAX_CONNECTIONS)}",
            *(["--debug"] if self._config.debug else []),
            "--",
            weights,
        ]
        return Supervisor(
            name,
            command,
            worker_environment,
            self._policy(),
            on_exit=forget,
        )


def _stall_s(config: ServeConfig) -> float:
    """Whom its worker waits for is not given up here before."""
    given = config.stall_timeout_s
    return config.token_gap_timeout_s if given is None else given


def named(weights: Sequence[str], model_names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, WEIGHTS) of each model. Raises `UsageError` when names and WEIGHTS do not pair up."""
    if not weights:
        raise UsageError("nothing to serve; name at least one WEIGHTS")
    if model_names and len(model_names) != len(weights):
        raise UsageError(
            f"--model-names has {len(model_names)} names for {len(weights)} WEIGHTS; give one each"
        )
    names = [served_names(path, model_names[i : i + 1])[0] for i, path in enumerate(weights)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two models would be called {name}; tell them apart by --model-names")
    return list(zip(names, weights, strict=True))


def _tell(line: str) -> None:
    # whoever started us may not listen any more
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)
