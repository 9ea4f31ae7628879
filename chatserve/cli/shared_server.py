"""A server of this user that serves the wanted weights already: found, joined, replaced at its end.

Knows running servers and the HTTP client; how a server of one's own is started is handed in.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chatserve.cli.answer import ChatDelta, ModelInfo, Progress
from chatserve.errors import (
    ChatserveError,
    InvalidAPIKey,
    NoWorkerAvailable,
    ShuttingDown,
    WorkerLost,
)
from chatserve.running_servers import RunningModel, RunningServer, running_servers

if TYPE_CHECKING:
    from chatserve.cli.asking import Rival, Server
    from chatserve.cli.client import ChatClient

POLL_S = 0.1
LAST_BREATH_S = 2.0  # a process that has closed its connections may take so long to end
# they say what may be fetched or loaded later, and nothing of how it answers
_OTHER_MATTERS = ("--offline", "--no-self-check", "--adapter-root")


def running_with(weights: str, flags: Sequence[str]) -> tuple[RunningServer, RunningModel] | None:
    """The youngest server that serves `weights` in the form that `flags` ask for."""
    wanted = _form(flags)
    for server in running_servers():
        model = server.model_of(weights)
        if model is not None and wanted is not None and _form(server.flags) == wanted:
            return server, model
    return None


def _form(flags: Sequence[str]) -> frozenset[str] | None:
    """What makes one model answer otherwise than another; None where paths may mean two things."""
    if any(flag.partition("=")[0] == "--adapter" for flag in flags):
        return None
    return frozenset(flag for flag in flags if flag.partition("=")[0] not in _OTHER_MATTERS)


def join(
    running: RunningServer,
    model: RunningModel,
    api_key: str | None,
    start_own: Callable[[], Server],
    tell: Callable[[str], None],
) -> SharedServer | None:
    """None, and a word of why where that helps, when it cannot be joined."""
    from chatserve.cli.client import ChatClient  # late: httpx takes a tenth of a second to import

    client = ChatClient(running.url, api_key)
    try:
        client.models()
    except ChatserveError as error:
        client.close()
        if isinstance(error, InvalidAPIKey):
            tell(f"{running.url} serves {model.name}, but wants a key in CHATSERVE_API_KEY")
        return None
    tell(f"joined {running.url}, which serves {model.name} already; --private starts another")
    return SharedServer(running, model, client, start_own)


class SharedServer:
    """One that serves others, too. When it ends, `start_own` starts another in its place."""

    def __init__(
        self,
        running: RunningServer,
        model: RunningModel,
        client: ChatClient,
        start_own: Callable[[], Server],
    ) -> None:
        self._running = running
        self._name = model.name
        self._client = client
        self._start_own = start_own
        self._joined: Server | None = None
        self._own: Server | None = None
        self._progress = Progress(model.name, "loading")
        self._changed = threading.Event()
        self._is_closing = False
        self._look()
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        if self._joined is None:
            self._watcher.start()

    def progress(self) -> Progress | None:
        """How far it is; None when it is ready. Raises `StartupError` when one's own has ended."""
        if self._own is None and self._joined is None and self._changed.is_set():
            self._replace()
        if self._own is not None:
            return self._own.progress()
        return None if self._joined is not None else self._progress

    def wait(self, timeout_s: float) -> None:
        if self._own is not None:
            self._own.wait(timeout_s)
        else:
            self._changed.wait(timeout_s)

    def model(self) -> ModelInfo:
        return self._ready().model()

    def news(self) -> str:
        return self._ready().news()

    def models(self) -> Sequence[ModelInfo]:
        return self._ready().models()

    def choose(self, model: ModelInfo) -> None:
        self._ready().choose(model)

    def count_tokens(self, text: str) -> int | None:
        return None if self.progress() is not None else self._ready().count_tokens(text)

    def rival(self, model: ModelInfo) -> Rival:
        return self._ready().rival(model)

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        """As any other's; where the server ends before the first word, another one answers."""
        has_begun = False
        try:
            for delta in self._ready().stream(messages, sampling):
                has_begun = has_begun or delta.has_begun
                yield delta
            return
        except (NoWorkerAvailable, ShuttingDown, WorkerLost) as error:
            if self._own is not None or not self._has_ended(error):
                raise
            told = f"the server at {self._running.url} has ended: one of this chat's own starts"
            self._replace()
            if has_begun:
                raise WorkerLost(told) from error
        yield ChatDelta(note=told)
        while self.progress() is not None:
            self.wait(POLL_S)
        yield from self._ready().stream(messages, sampling)

    def close(self) -> None:
        self._is_closing = True
        if self._watcher.is_alive():
            self._watcher.join()
        self._client.close()
        if self._own is not None:
            self._own.close()

    def _ready(self) -> Server:
        server = self._own or self._joined
        assert server is not None
        return server

    def _watch(self) -> None:
        """In a thread: ask how far the server is until it is ready, or has ended."""
        while not self._is_closing and not self._changed.is_set():
            time.sleep(POLL_S)
            with contextlib.suppress(ChatserveError):  # not yet, or not any more
                self._look()
            if not self._is_running():
                self._changed.set()

    def _look(self) -> None:
        from chatserve.cli.joined_server import JoinedServer

        progress = self._client.progress(self._name)
        if progress is None:
            self._joined = JoinedServer(self._client, self._name)
            self._changed.set()
        else:
            self._progress = progress

    def _replace(self) -> None:
        self._client.close()
        self._own = self._start_own()

    def _has_ended(self, error: ChatserveError) -> bool:
        if isinstance(error, ShuttingDown):
            return True
        until = time.monotonic() + LAST_BREATH_S
        while self._is_running():
            if time.monotonic() > until:
                return False
            time.sleep(POLL_S)
        return True

    def _is_running(self) -> bool:
        this = (self._running.pid, self._running.started_at)
        return any((other.pid, other.started_at) == this for other in running_servers())
