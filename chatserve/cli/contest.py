"""Several answers at the same time: each streamed by a thread of its own, all met in one queue.

Knows who answers by their methods; no conversation, no drawing.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from chatserve.cli.answer import ChatDelta
from chatserve.cli.asking import Rival
from chatserve.errors import ChatserveError

END_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Event:
    """What has come of the answer number `index`, and when: a delta, a failure, or, without both,
    its end."""

    index: int
    at: float
    delta: ChatDelta | None = None
    failure: ChatserveError | None = None


class Contest:
    """Answers of several rivals; each has a thread, and they meet in one queue."""

    def __init__(
        self,
        rivals: Sequence[Rival],
        ask: Callable[[int, Rival], Generator[ChatDelta, None, None]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`ask` gives the deltas of a rival's answer; it and `clock` are called in its thread."""
        self._clock = clock
        self._rivals = rivals
        self._ask = ask
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(index, rival), name="rival", daemon=True)
            for index, rival in enumerate(rivals)
        ]

    @contextlib.contextmanager
    def batches(self) -> Iterator[Iterator[list[Event]]]:
        """All that has come since the last time, again and again, until all answers are over.

        When this is left earlier, the answers that still run are given up.
        """
        for thread in self._threads:
            thread.start()
        try:
            yield self._batches()
        finally:
            self._stop()

    def _batches(self) -> Iterator[list[Event]]:
        num_open = len(self._rivals)
        while num_open:
            batch = [self._events.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._events.get_nowait())
            num_open -= sum(each.delta is None for each in batch)
            yield batch

    def _run(self, index: int, rival: Rival) -> None:
        failure = None
        try:
            with contextlib.closing(self._ask(index, rival)) as deltas:
                for delta in deltas:
                    if self._is_stopping.is_set():
                        return
                    self._events.put(Event(index, self._clock(), delta))
        except ChatserveError as error:
            failure = error
        finally:
            # whatever has happened: nobody may wait for it for ever
            self._events.put(Event(index, self._clock(), failure=failure))

    def _stop(self) -> None:
        self._is_stopping.set()
        for rival in self._rivals:
            rival.abort()
        for thread, rival in zip(self._threads, self._rivals, strict=True):
            thread.join(END_TIMEOUT_S)
            if not thread.is_alive():
                rival.close()
