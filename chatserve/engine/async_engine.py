"""The engine on a thread of its own, awaited from asyncio: the only file where the two meet.

Commands go in through a queue, events come out through one `call_soon_threadsafe` per step. The
thread sleeps while there is nothing to do.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TypeVarTuple

from chatserve.engine.admission import Admission
from chatserve.engine.deadlines import NO_LIMITS, Deadline, Watchdog, first_deadline
from chatserve.engine.encoder_engine import EncoderEngine
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import Begun, LoadedAdapter, SamplingParams, TokenEvent
from chatserve.engine.token_stream import (
    MAX_PENDING,
    MAX_PENDING_LOGPROBS,
    MAX_PENDING_SCORES,
    TokenStream,
)
from chatserve.engine.waiting_line import Priority
from chatserve.errors import ChatserveError, EngineStopped, WorkerStalled
from chatserve.meter import Meter, Outcome
from chatserve.options import TimeLimits

logger = logging.getLogger(__name__)
Arguments = TypeVarTuple("Arguments")
PLACES_S = 1.0
THREAD_NAME = "engine"
STOP_S = 1.0


@dataclass(frozen=True)
class EngineStats:
    """Progress of the engine, for heartbeats.

    `tick` counts steps; `last_token_age_s` is the time since the last one, which made tokens or
    took a chunk of a prompt, 0 while idle: it grows while a step hangs, even if nobody waits for it
    any more. `is_alive` is False once the engine thread has died: the process should be replaced.
    """

    tick: int
    last_token_age_s: float
    num_running: int
    num_waiting: int
    free_kv_tokens: int
    is_alive: bool = True
    num_kv_tokens: int = 0
    num_preempted: int = 0


class AsyncEngine:
    """`submit` from the event loop; one thread steps the engine."""

    def __init__(
        self,
        engine: Engine | EncoderEngine,
        *,
        max_num_seqs: int = 16,
        max_num_waiting: int = 64,
        max_num_seqs_per_key: int | None = None,
        limits: TimeLimits = NO_LIMITS,
    ) -> None:
        """`max_num_seqs` run at once, as in the engine; `max_num_waiting` more may wait.

        A stream that is over one of the `limits` ends with an error, and its sequence is aborted.
        """
        self._engine = engine
        self.admission = Admission(max_num_seqs, max_num_waiting, max_num_seqs_per_key)
        self.meter = Meter()
        self._places: dict[str, int] = {}
        self._places_at = 0.0
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, TokenStream] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self._is_alive = True
        self._is_asleep = True
        self._tick = 0
        self._num_resumed = 0
        self._last_progress = time.monotonic()
        self._limits = limits
        self._watchdog = Watchdog(limits, self._streams, self._first_deadline, self._expire)

    @property
    def engine(self) -> Engine:
        """The synchronous engine of a model that generates, for use without `start`."""
        assert isinstance(self._engine, Engine)
        return self._engine

    def start(self) -> None:
        """Start the thread; call it inside the event loop that will consume the events."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Abort everything and end the thread after its current step, if that ends soon."""
        is_first = not self._is_stopping
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._fail_all(EngineStopped("the server is shutting down; try again later"))
        if self._thread is not None and is_first:
            # a step that hangs must not keep the process
            await asyncio.to_thread(self._thread.join, STOP_S)

    def draw_seed(self) -> int:
        """For a request that brings none."""
        return self._engine.draw_seed()

    def stats(self) -> EngineStats:
        engine = self._engine
        return EngineStats(
            tick=self._tick,
            last_token_age_s=max(0.0, time.monotonic() - self._moved_at()),
            num_running=engine.num_running,
            num_waiting=max(0, len(self._streams) - engine.num_running - engine.num_held),
            free_kv_tokens=engine.num_free_kv_tokens,
            is_alive=self._is_alive,
            num_kv_tokens=engine.num_kv_tokens,
            num_preempted=engine.num_preempted,
        )

    def submit(
        self,
        request_id: str,
        prompt_ids: Rows[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        salt: bytes = b"",
        adapter: LoadedAdapter | None = None,
        strip_leading_space: bool = False,
        priority: Priority = "interactive",
        begun: Begun | None = None,
    ) -> TokenStream:
        """Start a sequence; iterate over its events and `aclose` the stream in a `finally`.

        The choices of one request share their prompt, requests of the same `salt` its beginning.
        What has `begun` elsewhere says that again first, and did its waiting there.

        Raises `Overloaded` when the queue is full, `ContextLengthExceeded` when it can never fit,
        `EngineStopped` when the engine thread is gone, `WorkerStalled` when it hangs.
        """
        if not self._is_alive or self._is_stopping:
            raise EngineStopped("the engine has stopped; the server restarts it")
        gap_s = self._limits.token_gap_timeout_s
        if gap_s and time.monotonic() - self._moved_at() > gap_s:
            raise WorkerStalled(f"the engine has made no step for {gap_s:g} s; try again later")
        self._engine.check(prompt_ids, params)
        seq_id = f"{request_id}-{choice}"
        if begun is None:
            self.admission.check(salt, priority)
        else:
            # what began it may be here, too, and not have ended yet
            self._num_resumed += 1
            seq_id += f"~{self._num_resumed}"
        stream = TokenStream(
            lambda: self._close(seq_id),
            lambda is_held: self._hold(seq_id, is_held),
            lambda: self._places.get(seq_id),
            share=salt,
            max_pending=_max_pending(params),
        )
        # of what has begun elsewhere, or goes on with the same prompt, it has been counted
        stream.is_prompt_counted = choice > 0 or bool(begun and begun.units)
        self.admission.add(salt)
        self._streams[seq_id] = stream
        self._watchdog.expect()
        prompt_ids = tuple(prompt_ids)

        def add() -> None:
            try:
                said = self._engine.add(
                    seq_id,
                    prompt_ids,
                    params,
                    choice=choice,
                    group=request_id,
                    salt=salt,
                    adapter=adapter,
                    strip_leading_space=strip_leading_space,
                    priority=priority,
                    begun=begun,
                )
                if said:
                    self._call(self._dispatch, said, False)
            except ChatserveError as error:
                self._deliver([TokenEvent(seq_id, num_prompt_tokens=len(prompt_ids), error=error)])

        self._command(add)
        return stream

    def _moved_at(self) -> float:
        """When the engine made its last step; now, while it has nothing to do."""
        is_idle = self._is_asleep and not self._commands
        return time.monotonic() if is_idle else self._last_progress

    def _first_deadline(self, seq_id: str, stream: TokenStream) -> Deadline:
        phase = self._engine.phase(seq_id)
        return first_deadline(self._limits, stream, phase, self._moved_at())

    def _expire(self, seq_id: str, error: ChatserveError) -> None:
        logger.warning("%s: %s", seq_id, error.message)
        self._streams[seq_id].put(TokenEvent(seq_id, error=error))
        self._close(seq_id, "error")

    def _close(self, seq_id: str, outcome: Outcome = "abort") -> None:
        if (stream := self._streams.pop(seq_id, None)) is not None:
            self.meter.note_end(outcome, 0.0)
            self.admission.remove(stream.share)
            self._command(lambda: self._engine.abort(seq_id))

    def _hold(self, seq_id: str, is_held: bool) -> None:
        engine = self._engine
        if seq_id in self._streams:
            self._command(lambda: engine.hold(seq_id) if is_held else engine.release(seq_id))

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._is_asleep and not self._commands:
                self._last_progress = time.monotonic()  # what it had no work for is no gap
            self._commands.append(command)
            self._wake.notify()

    # Below: the engine thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                started_at = time.monotonic()
                events = self._engine.step()
                self._tick += 1
                now = self._last_progress = time.monotonic()  # a chunk of prefill is progress, too
                self.admission.pace.note_step(len(events), now - started_at)
                self.meter.step.observe(now - started_at)
                if admitted := self._engine.admitted:
                    self._call(self._note_turns, admitted, started_at)
                if events:
                    self._deliver(events)
                if self._engine.num_waiting:
                    self._note_places(now)
                elif self._places:
                    self._places = {}
        except BaseException as error:  # a bug: tell every stream, then let the process be replaced
            logger.critical("the engine thread died: %s", error, exc_info=error)
            self._is_alive = False
            self._call(self._fail_all, EngineStopped("the engine died; the server restarts it"))

    def _wait_for_work(self) -> bool:
        """Run the queued commands; sleep while idle. False when it is time to stop."""
        while True:
            with self._wake:
                while not (self._commands or self._is_stopping or self._engine.has_work):
                    self._is_asleep = True
                    self._wake.wait()
                self._is_asleep = False
                commands = list(self._commands)
                self._commands.clear()
            if self._is_stopping:
                return False
            for command in commands:
                command()
            if self._engine.has_work:
                return True

    def _note_places(self, now: float) -> None:
        if now >= self._places_at:
            self._places_at = now + PLACES_S
            self._places = self._engine.places()

    def _deliver(self, events: Rows[TokenEvent]) -> None:
        self._call(self._dispatch, events, True)

    def _call(self, function: Callable[[*Arguments], None], *arguments: *Arguments) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    # Below: the event loop.

    def _dispatch(self, events: Rows[TokenEvent], is_news: bool) -> None:
        """`is_news` False: another engine has said them before."""
        now = time.monotonic()
        between = self.meter.between_tokens
        num_tokens = 0
        for event in events:
            stream = self._streams.get(event.seq_id)
            if stream is None:
                continue
            if event.token_ids:
                if is_news:
                    num_tokens += (num_new := len(event.token_ids))
                    if stream.heard_at is not None:
                        between.observe((now - stream.heard_at) / num_new, num_new)
                    elif stream.spoke_at is None:
                        stream.first_at = now
                        self.meter.first_token.observe(now - stream.arrived_at)
                        self._note_prompt(stream, event)
                    stream.heard_at = now
                stream.spoke_at = now
            if event.is_last:
                del self._streams[event.seq_id]
                self.admission.remove(stream.share)
                self._note_end(stream, event, now)
            stream.put(event)
        self.meter.generation_tokens += num_tokens

    def _note_prompt(self, stream: TokenStream, event: TokenEvent) -> None:
        if not stream.is_prompt_counted:
            stream.is_prompt_counted = True
            self.meter.note_prompt(event.num_prompt_tokens, event.num_cached_tokens)

    def _note_turns(self, seq_ids: Rows[str], started_at: float) -> None:
        for seq_id in seq_ids:
            if (stream := self._streams.get(seq_id)) is not None:
                self.meter.queue.observe(max(0.0, started_at - stream.arrived_at))

    def _note_end(self, stream: TokenStream, event: TokenEvent, now: float) -> None:
        self.meter.note_end(event.finish_reason or "error", now - stream.arrived_at)
        if event.finish_reason is None:
            return
        self.admission.pace.note_answer(event.num_generated_tokens)
        self._note_prompt(stream, event)
        if event.num_generated_tokens > 1 and stream.first_at and not stream.has_paused:
            self.meter.note_answer(event.num_generated_tokens, now - stream.first_at)

    def _fail_all(self, error: ChatserveError) -> None:
        for seq_id, stream in list(self._streams.items()):
            self.meter.note_end("error", 0.0)
            stream.put(TokenEvent(seq_id, error=error))
            self.admission.remove(stream.share)
        self._streams.clear()
        self._watchdog.stop()


def _max_pending(params: SamplingParams) -> int:
    if params.prompt_logprobs is not None:
        return MAX_PENDING_SCORES
    return MAX_PENDING_LOGPROBS if params.logprobs else MAX_PENDING
