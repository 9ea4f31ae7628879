"""Processes that each do one job after another, and end with the one that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """A process ended in the middle of a job; with its exit code."""


def done_by_workers(
    do: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int
) -> Iterator[tuple[Job, Result]]:
    """What `do`, a function of a module, makes of each job, as they come to an end.

    With one worker, this process does it. An `OSError` of a job is raised here, and whenever this
    ends, the processes do, too: also by SIGKILL. Raises `WorkerDied`.
    """
    if num_workers == 1:
        for job in jobs:
            yield job, do(job)
        return
    # no copy of this process, whose threads and locks would be half there
    context = multiprocessing.get_context("spawn")
    remaining = iter(jobs)
    processes: list[Any] = []
    busy: dict[Any, tuple[Any, Job]] = {}
    try:
        for _, job in zip(range(num_workers), remaining, strict=False):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(do, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            _sent(ours, process, job)
            busy[ours] = process, job
        while busy:
            pipes: list[Any] = connection.wait([*busy])
            for ready in pipes:
                process, job = busy.pop(ready)
                result = _received(ready, process)
                yield job, result
                following = next(remaining, None)
                if following is None:
                    ready.close()
                else:
                    _sent(ready, process, following)
                    busy[ready] = process, following
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _sent(pipe: Any, process: Any, job: Any) -> None:
    try:
        pipe.send(job)
    except ConnectionError:
        process.join()
        raise WorkerDied(process.exitcode) from None


def _received(pipe: Any, process: Any) -> Any:
    try:
        result = pipe.recv()
    except (EOFError, ConnectionError):  # a reset where the job had not been read
        process.join()
        raise WorkerDied(process.exitcode) from None
    if isinstance(result, OSError):
        raise result
    return result


def _work(do: Callable[[Job], Result], pipe: Any) -> None:
    # Ctrl-C goes to the whole group; the parent ends us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    result: Result | OSError
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            job = pipe.recv()
            try:
                result = do(job)
            except OSError as error:
                result = OSError(error.errno, error.strerror, error.filename)
            pipe.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
