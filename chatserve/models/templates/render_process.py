"""The worker's end of the process that renders a model's own template: kept, replaced when dead."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping
from typing import Any

from chatserve.errors import GenerationFailed, ModelLoadError
from chatserve.helper_process import HelperProcess
from chatserve.models.templates.jinja_sandbox import MAX_REASON_CHARS, BadTemplate, CannotRender
from chatserve.models.templates.render import NO_MEMORY

logger = logging.getLogger(__name__)

# of processor time; where the bounds in the process say 1 s, they may say so themselves
RENDER_S = 1.25
RENDER_BYTES = 256 << 20
COMPILE_S = 10.0
COMPILE_BYTES = 512 << 20
# by the clock; only a process that has stopped is later, or a machine that has all but stopped
WALL_S = 30.0
_CHAR_BYTES = 6  # as JSON writes a control character
_FRAME_BYTES = 1 << 12  # and what is around the text
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT}


class RenderProcess:
    """Renders one template, one chat at a time; from any thread, each waits for its turn.

    Costs nothing before `compile`.
    """

    def __init__(
        self,
        *,
        seconds: float = RENDER_S,
        num_bytes: int = RENDER_BYTES,
        compile_s: float = COMPILE_S,
        wall_s: float = WALL_S,
        module: str = "chatserve.models.templates.render",
    ) -> None:
        self._seconds = seconds
        self._num_bytes = num_bytes
        self._compile_s = compile_s
        self._wall_s = wall_s
        self._module = module
        self._lock = threading.Lock()
        self._source: str | None = None
        self._process: HelperProcess | None = None
        self._is_compiled = False
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def compile(self, source: str) -> None:
        """Start the process. Raises `BadTemplate`, and `ModelLoadError` where it does not start."""
        with self._lock:
            self._end()
            self._source = source
            try:
                self._await_compiled(self._begin(source))
            except GenerationFailed as error:
                raise ModelLoadError(f"{error.message}; or set --conv-template") from error

    def render(self, max_chars: int, variables: Mapping[str, Any]) -> str:
        """Raises `CannotRender`, and `GenerationFailed` where the process cannot be kept alive."""
        request = {"seconds": self._seconds, "max_chars": max_chars, "variables": variables}
        with self._lock:
            # one that somebody has killed, out of memory for one, is no fault of the chat's
            for _ in range(2):
                process = self._ready()
                answer = self._ask(process, request, max_chars * _CHAR_BYTES + _FRAME_BYTES)
                match answer:
                    case {"text": str(text)} if len(text) <= max_chars:
                        return text
                    case {"failure": str(reason)}:
                        raise CannotRender(reason[:MAX_REASON_CHARS])
                self._check_fate(process)
            raise GenerationFailed("the process that renders chats ended by itself; try again")

    def close(self) -> None:
        """End the process, whatever it is doing; there will be no other. From any thread."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()  # whoever waits for its answer notices
        with self._lock:
            self._end()

    def _ready(self) -> HelperProcess:
        assert self._source is not None, "compiled before"
        process = self._process or self._begin(self._source)
        if not self._is_compiled:
            try:
                self._await_compiled(process)
            except BadTemplate as error:
                raise GenerationFailed(f"the chat template {error} any more; try again") from error
        return process

    def _begin(self, source: str) -> HelperProcess:
        """Start a process, and do not wait until it has compiled."""
        request = {
            "source": source, "seconds": self._compile_s, "compile_bytes": COMPILE_BYTES,
            "render_bytes": self._num_bytes,
        }  # fmt: skip
        try:
            self._is_compiled = False
            self._process = process = HelperProcess(self._module)
            if self._is_closed:
                raise ConnectionError("the server is about to stop")
            process.send(request, seconds=self._wall_s)
        except OSError as error:
            self._end()
            raise _not_started(error) from error
        return process

    def _await_compiled(self, process: HelperProcess) -> None:
        try:
            answer = process.receive(seconds=self._wall_s, max_bytes=_FRAME_BYTES)
        except OSError as error:
            self._end()
            raise _not_started(error) from error
        match answer:
            case {"failure": str(reason)}:
                self._end()
                raise BadTemplate(reason[:MAX_REASON_CHARS])
            case None:
                fate = process.fate()
                self._end()
                if fate == -signal.SIGPROF:
                    raise BadTemplate(f"takes more than {self._compile_s:g} s to compile")
                if fate == NO_MEMORY or fate in _CRASHES:
                    raise BadTemplate(
                        f"takes more than {COMPILE_BYTES >> 20} MB to compile, or is nested too "
                        "deeply"
                    )
                raise _not_started(f"it ended with {fate}")
        self._is_compiled = True

    def _ask(self, process: HelperProcess, request: Any, max_bytes: int) -> Any:
        try:
            process.send(request, seconds=self._wall_s)
            return process.receive(seconds=self._wall_s, max_bytes=max_bytes)
        except TimeoutError as error:
            self._replace()
            raise GenerationFailed(
                f"the process that renders chats has not answered for {self._wall_s:g} s; try again"
            ) from error
        except OSError:
            return None

    def _check_fate(self, process: HelperProcess) -> None:
        """Of a process that has not answered. Raises `CannotRender` where the template is why."""
        fate = process.fate()
        self._replace()
        if fate == -signal.SIGPROF:
            reason = f"it computes for more than {self._seconds:g} s"
        elif fate == NO_MEMORY or fate in _CRASHES:
            reason = f"it needs more than {self._num_bytes >> 20} MB, or is nested too deeply"
        else:
            logger.info("the process that renders chats has gone; starting another")
            return
        logger.warning("the model's own chat template was stopped: %s", reason)
        raise CannotRender(reason)

    def _replace(self) -> None:
        """So that the next chat finds one that has compiled."""
        self._end()
        assert self._source is not None, "it has been running"
        if not self._is_closed:
            try:
                self._begin(self._source)
            except GenerationFailed as error:
                logger.warning("%s", error.message)  # the next chat tries again

    def _end(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


def _not_started(reason: object) -> GenerationFailed:
    return GenerationFailed(f"the process that renders chats did not start ({reason}); try again")
