"""Supervisor: keeps one child process running until it is told to stop, or it is no use.

Knows processes, back-off and exit codes; no HTTP and no models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chatserve.errors import (
    CrashLoop,
    DoesNotFit,
    HubError,
    ModelLoadError,
    RegistrationFailed,
    StartupError,
    UsageError,
)
from chatserve.server.lifeline import LastWords, Lifeline

logger = logging.getLogger(__name__)

HURRIED_STOP_S = 0.5
VMSTAT = Path("/proc/vmstat")

# what these say does not change by trying again
FINAL_ERRORS: Mapping[int, type[StartupError]] = {
    kind.exit_code: kind for kind in (UsageError, ModelLoadError, DoesNotFit, RegistrationFailed)
}


class RestartPolicy:
    """When to start a crashed process again: after a pause that doubles, and not for ever.

    What counts are crashes in a row; one that comes after `healthy_s` of being ready is the first
    of its own. However long a start takes, a process that cannot live is given up.
    """

    def __init__(
        self,
        *,
        first_pause_s: float = 0.5,
        max_pause_s: float = 8.0,
        max_restarts: int = 5,
        healthy_s: float = 60.0,
    ) -> None:
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._max_restarts = max_restarts
        self._healthy_s = healthy_s
        self._num_restarts = 0

    def pause_s(self, ready_s: float) -> float | None:
        """After a crash: seconds to wait before the restart; None when it is time to give up.

        `ready_s`: for how long it had been ready.
        """
        if ready_s >= self._healthy_s:
            self._num_restarts = 0
        if self._num_restarts >= self._max_restarts:
            return None
        pause_s = min(self._first_pause_s * 2.0**self._num_restarts, self._max_pause_s)
        self._num_restarts += 1
        return pause_s


WITHOUT_WORDS = (
    ", without a reason; what it wrote is in the log of the server (of a chat: --debug), "
    "`chatserve doctor` checks the machine"
)


class Supervisor:
    """One child: `spawn` says how to start it, given its lifeline's file descriptor.

    `on_exit` is called after each end, also of a child that was told to stop, and says for how many
    seconds that had been ready.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Callable[[int], Mapping[str, str]],
        policy: RestartPolicy,
        *,
        on_exit: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.name = name
        self._command = tuple(command)
        self._environment = environment
        self._policy = policy
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._start = asyncio.Lock()  # held while a child is being started
        self._is_retired = asyncio.Event()

    async def run(self) -> None:
        """Keep the child running until cancelled or `stop`.

        Raises the `StartupError` that a child ended with, or `CrashLoop`; its message is the
        child's last line.
        """
        while not self._is_retired.is_set():
            num_oom_kills = count_oom_kills()
            exit_code, words, ready_s = await self._run_once()
            if self._is_retired.is_set():
                return
            num_oom_kills = count_oom_kills() - num_oom_kills
            reason = (
                words.message if words else describe_exit(exit_code, num_oom_kills=num_oom_kills)
            )
            if kind := FINAL_ERRORS.get(exit_code):
                raise kind(reason)
            if words and words.is_final:
                raise HubError(reason)
            pause_s = self._policy.pause_s(ready_s)
            if pause_s is None:
                raise CrashLoop(
                    f"worker {self.name} keeps crashing; its last error: {reason}"
                    + ("" if words else WITHOUT_WORDS)
                )
            logger.warning(
                "worker %s ended (%s); starting it again in %.1f s", self.name, reason, pause_s
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_retired.wait(), pause_s)
                return

    @property
    def pid(self) -> int | None:
        """Of the child that runs now."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def retire(self) -> None:
        """Let the child go on, but do not start it again."""
        self._is_retired.set()

    async def stop(self, *, kill_after_s: float, hurry: asyncio.Event | None = None) -> None:
        """Ask the child to end; kill it when it does not within `kill_after_s`, or soon after
        `hurry` is set."""
        self.retire()
        async with self._start:  # a child that is just being born must be known before it is told
            process = self._process
        if process is None or process.returncode is not None:
            return
        _signal(process, signal.SIGTERM)
        ended = asyncio.create_task(process.wait())
        hurried = asyncio.create_task((hurry or asyncio.Event()).wait())
        try:
            await asyncio.wait(
                {ended, hurried}, timeout=kill_after_s, return_when=asyncio.FIRST_COMPLETED
            )
            if hurried.done():
                await asyncio.wait({ended}, timeout=min(kill_after_s, HURRIED_STOP_S))
            if not ended.done():
                logger.warning("worker %s does not stop; killing it", self.name)
                _signal(process, signal.SIGKILL)
            await ended
        finally:
            ended.cancel()
            hurried.cancel()

    def hurry(self) -> None:
        """Tell the child to end its answers now, with an error each."""
        if self._process is not None:
            # one after the other: two of the same kind could become one on the way
            _signal(self._process, signal.SIGTERM)
            _signal(self._process, signal.SIGINT)

    async def _run_once(self) -> tuple[int, LastWords | None, float]:
        """Start the child and wait for its end. Returns its exit code, its last words, and for how
        many seconds it was ready."""
        lifeline = Lifeline()
        try:
            async with self._start:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    env=self._environment(lifeline.child_fd),
                    pass_fds=(lifeline.child_fd,),
                    stdin=asyncio.subprocess.DEVNULL,
                    # Ctrl-C is for the server, which lets the child finish first
                    start_new_session=True,
                )
            lifeline.close_child_end()
            exit_code = await self._process.wait()
            ready_s = self._on_exit()
            return exit_code, lifeline.last_words(), ready_s
        finally:
            lifeline.close()
            if self._process is not None and self._process.returncode is None:
                _signal(self._process, signal.SIGKILL)
                await self._process.wait()


def describe_exit(exit_code: int, *, num_oom_kills: int = 0) -> str:
    """`exit code 1`, or the name of the signal; `num_oom_kills`: of the system in the meantime."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    if exit_code == -signal.SIGKILL and num_oom_kills:
        return (
            "killed by SIGKILL: the system ran out of memory; use --load-8bit, a smaller "
            "--context-length or a smaller model, or give it more"
        )
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def count_oom_kills() -> int:
    """How many processes Linux has killed for want of memory since it started, in containers too;
    elsewhere 0."""
    try:
        lines = VMSTAT.read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _signal(process: asyncio.subprocess.Process, kind: signal.Signals) -> None:
    try:
        process.send_signal(kind)
    except ProcessLookupError:
        return
