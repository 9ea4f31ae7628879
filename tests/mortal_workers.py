"""Keeps worker processes alive that kill themselves with SIGKILL at a random token.

A program: python -m tests.mortal_workers WEIGHTS SEED. torch is imported once and workers are
forked, so that one is ready in a moment. Each line on stdin says where they register, how many
there should be and how long they live: `URL 2 5 60` keeps two, each of which dies with one of its
5th to 60th tokens; `URL 1 0 0` keeps one that lives on. Those before it end. On stdout there is a
line for each death.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any

from chatserve.config import WorkerConfig
from chatserve.engine.sequence import Begun, TokenEvent
from chatserve.progress import Progress
from chatserve.server import command_line
from chatserve.server.contract import Engine, ServedModel, TokenStream
from chatserve.server.worker_process import load_engine

FLAGS = ("--dtype=float32", "--no-self-check", "--no-prepare-grammars")


class MortalEngine:
    """`engine`, until `life` new tokens have been handed out."""

    def __init__(self, engine: Engine, life: int) -> None:
        self._engine = engine
        self._left = life

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, *arguments: Any, begun: Begun | None = None, **options: Any) -> TokenStream:
        num_old = sum(map(len, begun.units)) if begun is not None else 0
        return MortalStream(self, self._engine.submit(*arguments, begun=begun, **options), num_old)

    def spend(self, num_tokens: int) -> None:
        if 0 < self._left <= num_tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= num_tokens if self._left else 0


class MortalStream:
    def __init__(self, engine: MortalEngine, stream: TokenStream, num_old: int) -> None:
        self._engine = engine
        self._stream = stream
        self._num_old = num_old

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> MortalStream:
        return self

    async def __anext__(self) -> TokenEvent:
        event = await anext(self._stream)
        num_old = min(self._num_old, len(event.token_ids))
        self._num_old -= num_old
        self._engine.spend(len(event.token_ids) - num_old)
        return event

    async def aclose(self) -> None:
        await self._stream.aclose()


class Keeper:
    def __init__(self, weights: str, seed: str) -> None:
        self._weights = weights
        self._controller = ""
        self._choose = random.Random(seed)
        self._wanted = (0, 0, 0)
        self._alive: set[int] = set()

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker)
        try:
            while True:
                ready, _, _ = select.select([sys.stdin, woken], [], [])
                if woken in ready:
                    os.read(woken, 4096)
                    self._bury()
                if sys.stdin in ready:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._end()
                    self._controller, *numbers = line.split()
                    count, low, high = map(int, numbers)
                    self._wanted = (count, low, high)
                while len(self._alive) < self._wanted[0]:
                    self._start()
        finally:
            self._end()

    def _start(self) -> None:
        life = self._choose.randint(*self._wanted[1:])
        pid = os.fork()
        if pid:
            self._alive.add(pid)
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)

        def load(config: WorkerConfig, progress: Progress) -> tuple[Engine, ServedModel]:
            engine, model = load_engine(config, progress)
            return MortalEngine(engine, life), model  # type: ignore[return-value]

        arguments = [self._weights, f"--controller={self._controller}", *FLAGS]
        os._exit(command_line.worker(arguments, load=load))

    def _bury(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in self._alive:
                    self._alive.discard(ended[0])
                    print(f"died {os.waitstatus_to_exitcode(ended[1])}", flush=True)

    def _end(self) -> None:
        for pid in self._alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._alive.clear()


def main(argv: Sequence[str]) -> None:
    import torch

    import chatserve.engine.serving  # noqa: F401  what every worker would import

    torch.set_num_threads(1)
    Keeper(*argv).run()


if __name__ == "__main__":
    main(sys.argv[1:])
