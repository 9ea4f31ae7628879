"""A server process that belongs to one chat: started at once, stopped at the end.

Knows processes and the HTTP client; which command starts a server is handed in. The client, and
with it httpx, is imported by a thread, so that the prompt does not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from chatserve.cli.answer import ChatDelta, ModelInfo, Progress
from chatserve.cli.escapes import one_line, strip_escapes
from chatserve.environment import child_environment
from chatserve.errors import ChatserveError, CrashLoop, StartupError

if TYPE_CHECKING:
    from chatserve.cli.client import ChatClient
    from chatserve.cli.joined_server import RivalConnection

STOP_TIMEOUT_S = 5.0
POLL_S = 0.1
_MAX_LOG_TAIL_BYTES = 64 * 1024
_LOGGED = re.compile(r"\d\d:\d\d:\d\d |chatserve: |\{")


class PrivateServer:
    """Runs `command`, which prints `listening: URL` once it can say how far it is.

    It gets a random API key in `CHATSERVE_API_KEYS` and a file descriptor in
    `CHATSERVE_PARENT_PIPE` that closes when this process dies, however it dies. Its log goes to a
    temporary file, and with `debug` to `err` at the end.
    """

    def __init__(self, command: Sequence[str], err: TextIO, *, debug: bool = False) -> None:
        """Raises `StartupError` when the command cannot be started."""
        self._err = err
        self._debug = debug
        self._key = secrets.token_urlsafe(32)
        self._progress = Progress(state="starting")
        self._ready: tuple[ChatClient, ModelInfo] | None = None
        self._changed = threading.Event()
        self._stopping = threading.Event()
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(
                tempfile.NamedTemporaryFile(prefix="chatserve-", suffix=".log")
            )
            self._process, self._lifeline = self._start(command)
            self._resources = stack.pop_all()
        self._reader = threading.Thread(target=self._read_output, name="output", daemon=True)
        self._reader.start()

    def progress(self) -> Progress | None:
        """How far it is; None when it is ready. Raises `StartupError` when it has ended."""
        if self._process.poll() is not None:
            raise self._failure()
        return None if self._ready else self._progress

    def wait(self, timeout_s: float) -> None:
        """Sleep until it is ready or has ended, at most `timeout_s`."""
        self._changed.wait(timeout_s)

    def model(self) -> ModelInfo:
        """The model it serves; only when ready."""
        assert self._ready is not None
        return self._ready[1]

    def news(self) -> str:
        """Its end is no news but that of the chat."""
        return ""

    def models(self) -> list[ModelInfo]:
        """The model and what is served beside it; only when ready. Raises `ChatserveError`."""
        assert self._ready is not None
        return self._ready[0].models()

    def choose(self, model: ModelInfo) -> None:
        """Ask `model` from now on; only when ready."""
        assert self._ready is not None
        self._ready = self._ready[0], model

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        """Ask for an answer; only when ready. The deltas raise `ChatserveError`."""
        assert self._ready is not None
        client, model = self._ready
        return client.stream(messages, model.name, **sampling)

    def count_tokens(self, text: str) -> int | None:
        """How many tokens the model makes of `text`; None before it is ready."""
        if self._ready is None:
            return None
        client, model = self._ready
        return client.count_tokens(text, model.name)

    def rival(self, model: ModelInfo) -> RivalConnection:
        """A further connection, for another model's answer; only when ready."""
        from chatserve.cli.joined_server import RivalConnection

        assert self._ready is not None
        return RivalConnection(self._ready[0].again(), model)

    def close(self) -> None:
        """Stop the process and wait for its end; after `STOP_TIMEOUT_S` it is killed."""
        self._stopping.set()
        try:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        finally:
            if self._process.poll() is None:
                # its workers have sessions of their own and end when their lifeline closes
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._tidy_up()

    def _start(self, command: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
        theirs, ours = os.pipe()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=child_environment(
                    CHATSERVE_API_KEYS=self._key, CHATSERVE_PARENT_PIPE=str(theirs)
                ),
                pass_fds=(theirs,),
                # Ctrl-C stops an answer; it must not reach the server
                start_new_session=True,
            )
        except OSError as error:
            os.close(ours)
            raise StartupError(f"cannot start {command[0]}: {error.strerror}") from error
        finally:
            os.close(theirs)
        return process, ours

    def _read_output(self) -> None:
        """In a thread: wait for the URL, then keep the pipe empty until the process ends."""
        assert self._process.stdout is not None
        watcher: threading.Thread | None = None
        for line in self._process.stdout:
            word, *rest = line.decode("utf-8", "replace").split()[:2] or [""]
            if watcher is None and rest and word in ("listening:", "ready:"):
                watcher = threading.Thread(
                    target=self._watch, args=(rest[0],), name="watch", daemon=True
                )
                watcher.start()
        self._process.stdout.close()
        self._process.wait()
        self._changed.set()
        if watcher:
            watcher.join()

    def _watch(self, url: str) -> None:
        """In a thread: ask how far the server is until it is ready."""
        from chatserve.cli.client import ChatClient

        client = ChatClient(url, self._key)
        while not self._stopping.is_set():
            try:
                progress = client.progress()
                if progress is None and (models := client.models()):
                    self._ready = client, models[0]
                    self._changed.set()
                    return
                self._progress = progress or self._progress
            except ChatserveError:
                # not yet, or not any more: then the end of the process says why
                if self._process.poll() is not None:
                    break
            self._stopping.wait(POLL_S)
        client.close()

    def _failure(self) -> StartupError:
        """Why the process ended, in the words of its last line, with its exit code."""
        code = self._process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            hint = ": the system may have run out of memory" if name == "SIGKILL" else ""
            return StartupError(f"the server was killed by {name}{hint}")
        lines = [line for line in map(one_line, self._log_tail().splitlines()) if line]
        message = lines[-1].removeprefix("chatserve:").strip() if lines else ""
        kinds = {kind.exit_code: kind for kind in StartupError.__subclasses__()}
        kind = kinds.get(code, StartupError) if code > 1 else StartupError
        if kind is CrashLoop:
            # the end of a traceback, of the linker: what no logger wrote
            wrote = [line for line in lines[:-1] if not _LOGGED.match(line)]
            if wrote and wrote[-1] not in message:
                message += f"; before that the log has: {wrote[-1]}"
        return kind(message or f"the server ended with exit code {code}")

    def _log_tail(self) -> str:
        # the child writes through a descriptor of its own: reading must not move its position
        with Path(self._log.name).open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _MAX_LOG_TAIL_BYTES))
            return log.read().decode("utf-8", "replace")

    def _tidy_up(self) -> None:
        os.close(self._lifeline)
        self._reader.join(STOP_TIMEOUT_S)
        if self._ready:
            self._ready[0].close()
        if self._debug:
            self._err.write(strip_escapes(self._log_tail()))
            self._err.flush()
        self._resources.close()
