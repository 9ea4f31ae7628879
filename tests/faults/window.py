"""A window into a process of the rig: a socket beside it that answers with its figures.

`open_window` is for processes whose folder of windows is in FAULT_WINDOWS; it starts a thread and
wraps the event loop that chatserve makes, so that its lag is measured from its first moment.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from chatserve.server import process
from chatserve.server.edge import Edge
from chatserve.server.registry import WorkerRegistry
from tests.faults.engine import ScriptedEngine
from tests.faults.loop_lag import INTERVAL_S, LagProbe

FOLDER = "FAULT_WINDOWS"
STRICT = "FAULT_STRICT_LAG"  # set: waiting for a processor is lag, too
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class View:
    """One process at one moment. What it is not, it has none of.

    num_requests: under way at its front door. num_leases: claims on workers.
    num_workers: those that would get a request.
    num_objects: that Python's collector knows, garbage excepted.
    num_seqs: running or waiting in its engine. lag: of its event loop since the last view, in ms.
    """

    pid: int
    rss_bytes: int
    num_fds: int
    num_threads: int
    num_tasks: int
    num_objects: int
    num_requests: int
    num_leases: int
    num_workers: int
    num_seqs: int
    lag: dict[str, float]

    @property
    def is_calm(self) -> bool:
        return not (self.num_requests or self.num_leases or self.num_seqs)


def open_window() -> None:
    """In the process to be looked into, before anything else runs."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    probe = LagProbe(is_strict=STRICT in os.environ)
    loops: list[asyncio.AbstractEventLoop] = []
    make = process._loop_factory() or asyncio.new_event_loop

    def new_loop() -> asyncio.AbstractEventLoop:
        loop = make()
        loops.append(loop)
        loop.call_soon(probe.start, loop)
        return loop

    process._loop_factory = lambda: new_loop
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(Path(folder, f"{os.getpid()}.sock")))
    listening.listen()
    threading.Thread(
        target=_serve, args=(listening, loops, probe), name="window", daemon=True
    ).start()


def _serve(
    listening: socket.socket, loops: list[asyncio.AbstractEventLoop], probe: LagProbe
) -> None:
    while True:
        connection, _ = listening.accept()
        with connection:
            if loops:
                connection.sendall(json.dumps(_figures(loops[0], probe)).encode())


def _figures(loop: asyncio.AbstractEventLoop, probe: LagProbe) -> dict[str, Any]:
    lag = probe.take()
    gc.collect()
    objects = gc.get_objects()
    edges = [each for each in objects if isinstance(each, Edge)]
    registries = [each for each in objects if isinstance(each, WorkerRegistry)]
    workers = [worker for each in registries for worker in list(each._workers.values())]
    engines = [each for each in objects if isinstance(each, ScriptedEngine)]
    this = psutil.Process()
    stats = [engine.stats() for engine in engines]
    figures = {
        "pid": this.pid,
        "rss_bytes": this.memory_info().rss,
        # without the connection that asks
        "num_fds": this.num_fds() - 1,
        "num_threads": this.num_threads() - _num_pooled(),
        "num_objects": len(objects),
        "num_tasks": len(_unchanging(lambda: asyncio.all_tasks(loop))),
        "num_requests": sum(edge.num_in_flight for edge in edges),
        "num_leases": sum(worker.num_in_flight for worker in workers),
        "num_workers": sum(
            worker.status.state == "ready" and worker.ejected_until is None for worker in workers
        ),
        "num_seqs": sum(each.num_running + each.num_waiting for each in stats),
        "lag": lag.to_dict(),
    }
    # looking in makes the loop late, too
    time.sleep(2 * INTERVAL_S)
    probe.take()
    return figures


def _num_pooled() -> int:
    """Threads of the loop's own pool: they come as they are wanted, up to its bound, and stay."""
    names = ("asyncio_", "uvloop_")
    return sum(each.name.startswith(names) for each in threading.enumerate())


def _unchanging(look: Callable[[], set[Any]]) -> set[Any]:
    """The loop goes on meanwhile, and its tasks with it."""
    while True:
        try:
            return look()
        except RuntimeError:
            continue


def look(folder: Path, pid: int) -> View:
    """What the process `pid` says of itself. Raises `OSError` when there is none."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(str(folder / f"{pid}.sock"))
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    if not data:
        raise ConnectionError(f"process {pid} has no loop yet")
    return View(**json.loads(data))


def look_until(
    folder: Path, pid: int, is_so: Callable[[View], bool], what: str, timeout_s: float = TIMEOUT_S
) -> View:
    """Look again and again until it is so."""
    deadline = time.monotonic() + timeout_s
    while True:
        view = look(folder, pid)
        if is_so(view):
            return view
        assert time.monotonic() < deadline, f"{what}: {view}"
        time.sleep(0.02)
