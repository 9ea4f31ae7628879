"""StartedWorker: a worker process of this server, kept running: its command line, environment and
socket. Knows processes; decides nothing."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chatserve import environment
from chatserve.config import ServeConfig
from chatserve.options import (
    MAX_CONNECTIONS,
    ApiOptions,
    DrainOptions,
    EngineConfig,
    ModelOptions,
    RankingOptions,
    TimeLimits,
)
from chatserve.protocol.control import SOCKET_SCHEME
from chatserve.server.leases import Worker
from chatserve.server.registry import WorkerRegistry
from chatserve.server.supervisor import RestartPolicy, Supervisor
from chatserve.settings import flags_of


class Child:
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


class StartedWorker:
    """One model's, for as long as that is wanted."""

    def __init__(self, supervisor: Supervisor, child: Child, forget: Callable[[], None]) -> None:
        self.supervisor = supervisor
        self.forget = forget
        self._child = child

    @property
    def worker_id(self) -> str:
        return self._child.worker_id


class Workers:
    """Starts workers that register with the controller of `registry` at `control_url`.

    They listen in `folder`, where there is one; `sockets` says where, by their ids. `command` gets
    the flags of a worker and WEIGHTS.
    """

    def __init__(
        self,
        config: ServeConfig,
        command: Sequence[str],
        policy: Callable[[], RestartPolicy],
        registry: WorkerRegistry,
        *,
        control_token: str,
        control_url: str,
        folder: Path | None,
        sockets: dict[str, str],
    ) -> None:
        self._config = config
        self._command = tuple(command)
        self._policy = policy
        self._registry = registry
        self._token = control_token
        self._control_url = control_url
        self._folder = folder
        self._sockets = sockets
        self._children: list[Child] = []
        self._numbers: set[int] = set()

    def look(self) -> None:
        """Something has changed in the registry."""
        for child in self._children:
            child.look_at(self._registry)

    def start(self, name: str, weights: str) -> StartedWorker:
        """A worker to be run."""
        child = Child()
        self._children.append(child)
        # the lowest that is free: who talks to a worker keeps a session for each path
        number = next(each for each in itertools.count() if each not in self._numbers)
        self._numbers.add(number)
        path = self._folder and self._folder / f"{number}.sock"

        def worker_environment(lifeline_fd: int) -> Mapping[str, str]:
            child.begin()
            if path is not None:
                self._sockets[child.worker_id] = f"{SOCKET_SCHEME}{path}"
            return environment.child_environment(
                CHATSERVE_CONTROL_TOKEN=self._token,
                CHATSERVE_WORKER_ID=child.worker_id,
                CHATSERVE_PARENT_PIPE=str(lifeline_fd),
                CHATSERVE_SOCKET_PATH=str(path or ""),
                # what a file of settings says to workers that are alone
                CHATSERVE_NO_REGISTER="false",
                # the clients' keys are none of a worker's business
                CHATSERVE_API_KEYS="",
            )

        def end() -> float:
            self._sockets.pop(child.worker_id, None)
            self._registry.remove(child.worker_id)
            return child.ready_s

        def forget() -> None:
            self._children.remove(child)
            self._numbers.discard(number)
            self._registry.forget_family(name)

        supervisor = Supervisor(
            name,
            [*self._command, *self._flags(name), "--", weights],
            worker_environment,
            self._policy(),
            on_exit=end,
        )
        return StartedWorker(supervisor, child, forget)

    def _flags(self, name: str) -> list[str]:
        config = self._config
        kinds = (ModelOptions, RankingOptions, EngineConfig, TimeLimits, ApiOptions, DrainOptions)
        return [
            *flags_of(config, *kinds),
            *("--host=127.0.0.1", "--port=0", f"--controller={self._control_url}"),
            f"--model-names={name}",
            f"--log-format={config.log_format}",
            f"--otlp-traces-endpoint={config.otlp_traces_endpoint or ''}",
            *("--ssl-certfile=", "--ssl-keyfile=", "--ssl-ca-certs="),
            # whoever is let in here finds room there
            f"--max-connections={min(config.max_connections + 64, MAX_CONNECTIONS)}",
            *(["--debug"] if config.debug else []),
        ]
