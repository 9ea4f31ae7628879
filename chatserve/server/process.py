"""What every server process has around its work: logs, the event loop, signals, the last line.

Knows no routes and no models.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from chatserve.errors import StartupError
from chatserve.server.log_lines import formatter

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130


def configure_logging(name: str, *, debug: bool, log_format: str = "text") -> None:
    """Logs to stderr; other libraries only from WARNING on, and never what a stream carries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(log_format, name))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("chatserve").setLevel(logging.DEBUG if debug else logging.INFO)


def forbid_core_dumps() -> None:
    """A process that dies writes no file with the prompts and keys that it holds in memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def print_error(message: str) -> None:
    """The one line on stderr that says why a command failed."""
    print(f"chatserve: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


Report = Callable[[str, bool], None]
"""Called with the line that says why a process ends, and whether another start would end alike."""


def print_failure(message: str, is_final: bool) -> None:
    """To a person it makes no difference whether the end is final."""
    print_error(message)


class StopSignals:
    """SIGTERM and SIGINT as events: the first asks to stop, the second insists."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        self.is_interrupted = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        kinds = (signal.SIGTERM, signal.SIGINT)
        for kind in kinds:
            loop.add_signal_handler(kind, self._receive, kind)
        try:
            yield
        finally:
            for kind in kinds:
                loop.remove_signal_handler(kind)

    def _receive(self, kind: signal.Signals) -> None:
        if self.asked.is_set():
            self.insisted.set()
            return
        logger.info("stopping on %s", kind.name)
        self.is_interrupted = kind == signal.SIGINT
        self.asked.set()


async def run_until(stop: asyncio.Event, *jobs: Coroutine[Any, Any, None]) -> None:
    """Run `jobs` side by side until `stop` is set; then cancel them and wait for their end.

    A job may end by itself. Raises the first exception of a job.
    """
    waiter = asyncio.create_task(stop.wait())
    pending: set[asyncio.Task[Any]] = {waiter, *(asyncio.create_task(job) for job in jobs)}
    everything = set(pending)
    try:
        while not waiter.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)


async def outlive(task: asyncio.Task[None]) -> None:
    """Wait for `task` without cancelling it: a job of `run_until` that goes on after it."""
    await asyncio.shield(task)


async def cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run_process(
    main: Callable[[], Coroutine[Any, Any, int]],
    *,
    debug: bool = False,
    report: Report = print_failure,
) -> int:
    """Run `main` on uvloop where there is one. Returns the exit code.

    Whatever ends it becomes one line for `report`; a traceback only with `debug`.
    """
    forbid_core_dumps()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.get_loop().set_exception_handler(_log_stray_error)
            return runner.run(main())
    except StartupError as error:
        logger.debug("startup failed", exc_info=debug)
        report(error.message, True)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # the boundary of the process: a bug ends it with one line
        logger.debug("internal error", exc_info=debug)
        report(f"internal error: {type(error).__name__}: {error} (--debug shows where)", False)
        return StartupError.exit_code


def _log_stray_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody has caught. asyncio's own line shows the arguments of a callback and what a
    task's error says: prompts and answers among them."""
    words, callback, _ = context["message"].partition(" callback ")
    task = context.get("task") or context.get("future")
    name = getattr(task.get_coro(), "__qualname__", "") if isinstance(task, asyncio.Task) else ""
    line = " ".join(filter(None, (words, callback.strip(), name)))
    logger.error("%s", line, exc_info=context.get("exception"))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop
