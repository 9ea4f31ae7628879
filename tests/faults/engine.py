"""ScriptedEngine: an engine without weights that does what each prompt asks of it.

A prompt ends in the JSON of a `Script`. Its text is known in advance and no two of its tokens are
alike, so that a token lost, doubled or of somebody else is seen. Nothing of a request is kept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from chatserve.engine.admission import Admission
from chatserve.engine.output import Detokenizer
from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.errors import EngineStopped, GenerationFailed, Overloaded
from chatserve.meter import Meter
from tests.fakes import FakeStats

if TYPE_CHECKING:
    from chatserve.engine.sequence import Begun, FinishReason

STEP_S = 0.005
Then = Literal["stop", "hang", "hang in secret", "crash", "exit", "die", "block", "error"]
Lie = Literal["double", "lose", "count"]
_PIECES = (
    "a", "Z", " ", "  ", "\n", "\r", "\r\n", "\t", "\\", '"', "'", "/", "{", "}", "é", "ß", "你",
    "好", "🙂", "👩‍👩‍👧", "🏳️‍🌈", "e\u0301", "\u2028", "\u2029", "\x85", "\x00", "\x1b[31m",
    "\x7f", "\ufeff", "data: ", "\n\n", "[DONE]", ": ping", "event: x",
    "</s>", "\U0010ffff", "\ufffd",
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """What one request gets.

    say: so many tokens of text that `key` and nothing else decides; step_s: one in so many seconds.
    then: what comes behind them; "crash" is SIGKILL, "block" stops the whole process for 2 s, and
    who hangs in secret goes on telling of progress.
    bytes_each: pads every token, to flood. is_garbage: tokens are the bytes of random texts.
    lie, at: at this token something untrue is said.
    """

    key: str = "k"
    say: int = 20
    step_s: float = STEP_S
    then: Then = "stop"
    bytes_each: int = 0
    is_garbage: bool = False
    lie: Lie | None = None
    at: int = 5

    @property
    def prompt(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, prompt_ids: Sequence[int]) -> Script:
        """The one at the end of a prompt; a prompt without one is answered all the same."""
        text = bytes(id_ for id_ in prompt_ids if id_ < 256).decode("utf-8", "replace")
        start = text.rfind('{"key"')
        if start < 0:
            return cls()
        return cls(**json.JSONDecoder().raw_decode(text[start:])[0])

    def ids(self, choice: int = 0) -> Sequence[int]:
        return range(choice * self.say, (choice + 1) * self.say)

    def token_bytes(self, token_id: int) -> bytes:
        if self.is_garbage:
            return self._garbage(token_id // self.say)[token_id % self.say]
        return f"{self.key}.{token_id} ".ljust(self.bytes_each, "#").encode()

    def text(self, choice: int = 0, most: int | None = None) -> str:
        """All that the tokens say, or the first `most` of them."""
        return "".join(text for text, _ in self.pieces(choice, most))

    def pieces(self, choice: int, most: int | None = None) -> Iterator[tuple[str, int]]:
        """Text and id of the tokens, one after the other."""
        detokenizer = Detokenizer(self, strip_leading_space=False)
        for token_id in self.ids(choice)[:most]:
            yield detokenizer.add(token_id), token_id

    def _garbage(self, choice: int) -> Sequence[bytes]:
        """Random bytes and characters, which begin in one token and end in another."""
        return _garbage(self.key, choice, self.say)


@functools.lru_cache(maxsize=64)
def _garbage(key: str, choice: int, say: int) -> Sequence[bytes]:
    choose = random.Random(f"{key} {choice}")
    sizes = [choose.randint(1, 7) for _ in range(say)]
    data = b""
    while len(data) < sum(sizes):
        is_text = choose.random() < 0.8
        data += choose.choice(_PIECES).encode() if is_text else choose.randbytes(2)
    ends = list(itertools.accumulate(sizes))
    return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


class ScriptedEngine:
    """An engine as the server uses it: at most `max_num_seqs` run, `max_num_waiting` wait."""

    def __init__(self, *, max_num_seqs: int = 16, max_num_waiting: int = 64) -> None:
        self.admission = Admission(max_num_seqs, max_num_waiting)
        self.meter = Meter()
        self._max_num_waiting = max_num_waiting
        self._max_num_seqs = max_num_seqs
        self._places = asyncio.Semaphore(max_num_seqs)
        self._stopped = asyncio.Event()
        self._streams: set[_Stream] = set()
        self._num_running = 0
        self._tick = 0
        self._last_at = 0.0
        self._num_seeds = 0
        self._is_alive = True
        self._lies_about_progress = False

    def start(self) -> None:
        self._last_at = time.monotonic()

    async def stop(self) -> None:
        self._stopped.set()

    def draw_seed(self) -> int:
        self._num_seeds += 1
        return self._num_seeds

    def stats(self) -> FakeStats:
        self._tick += self._lies_about_progress
        return FakeStats(
            tick=self._tick,
            last_token_age_s=time.monotonic() - self._last_at if self._num_running else 0.0,
            num_running=self._num_running,
            num_waiting=len(self._streams) - self._num_running,
            is_alive=self._is_alive,
        )

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        begun: Begun | None = None,
        **_options: Any,
    ) -> _Stream:
        """What else a request may ask for, nobody gets here."""
        is_full = len(self._streams) >= self._max_num_seqs + self._max_num_waiting
        if is_full and begun is None:
            raise Overloaded("the fake is full", retry_after_s=1)
        stream = _Stream(self, f"{request_id}-{choice}")
        told = {"seq_id": stream.seq_id, "num_prompt_tokens": len(prompt_ids)}
        script = Script.of(prompt_ids)
        stream.events = self._events(stream, script, params.max_tokens, choice, begun, told)
        self._streams.add(stream)
        return stream

    async def _events(
        self,
        stream: _Stream,
        script: Script,
        max_tokens: int,
        choice: int,
        begun: Begun | None,
        told: dict[str, Any],
    ) -> AsyncIterator[TokenEvent]:
        async with self._places:
            self._num_running += 1
            stream.is_running = True
            count = 0
            tokens = script.pieces(choice, max_tokens)
            units = begun.units if begun is not None else ()
            for number, unit in enumerate(units, 1):
                text = "".join(text for text, _ in itertools.islice(tokens, len(unit)))
                count += len(unit)
                event = TokenEvent(text=text, token_ids=unit, num_generated_tokens=count, **told)
                if begun is not None and begun.has_ended and number == len(units):
                    yield dataclasses.replace(event, finish_reason=_reason(count, max_tokens))
                    return
                yield event
            for text, token_id in tokens:
                await self._step(script.step_s)
                count += 1
                for _ in range(_times(script, count)):
                    yield TokenEvent(
                        text=text, token_ids=(token_id,), num_generated_tokens=count, **told
                    )
            if script.lie == "count":
                count += 1
            async for event in self._end(script, _reason(count, max_tokens), count, told):
                yield event

    async def _step(self, step_s: float) -> None:
        await asyncio.sleep(step_s)
        if self._stopped.is_set():
            raise EngineStopped("the engine has stopped")
        self._tick += 1
        self._last_at = time.monotonic()

    async def _end(
        self, script: Script, reason: FinishReason, count: int, told: dict[str, Any]
    ) -> AsyncIterator[TokenEvent]:
        if script.then == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif script.then == "exit":
            os._exit(1)
        elif script.then == "die":
            self._is_alive = False
        elif script.then == "block":
            time.sleep(2)  # the process does nothing at all, heartbeats included
        elif script.then == "hang in secret":
            self._lies_about_progress = True
        if script.then in ("hang", "hang in secret", "die"):
            await self._stopped.wait()
            raise EngineStopped("the engine has stopped")
        if script.then == "error":
            yield TokenEvent(
                error=GenerationFailed("as the script says"), num_generated_tokens=count, **told
            )
            return
        yield TokenEvent(num_generated_tokens=count, finish_reason=reason, **told)

    def forget(self, stream: _Stream) -> None:
        self._streams.discard(stream)
        self._num_running -= stream.is_running
        stream.is_running = False


def _reason(count: int, max_tokens: int) -> FinishReason:
    return "length" if count >= max_tokens else "stop"


def _times(script: Script, count: int) -> int:
    """How often a token is said: once, unless the script lies."""
    if count != script.at:
        return 1
    return {"double": 2, "lose": 0}.get(script.lie or "", 1)


class _Stream:
    """The events of one sequence; closing it early is an abort."""

    events: AsyncIterator[TokenEvent]
    place: int | None = None

    def __init__(self, engine: ScriptedEngine, seq_id: str) -> None:
        self.seq_id = seq_id
        self.is_running = False
        self._engine = engine

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> TokenEvent:
        try:
            event = await anext(self.events)
        except GenerationFailed as error:
            await self.aclose()
            return TokenEvent(self.seq_id, error=error)
        except BaseException:
            self._engine.forget(self)
            raise
        if event.is_last:
            await self.aclose()
        return event

    async def aclose(self) -> None:
        self._engine.forget(self)
        await self.events.aclose()  # type: ignore[attr-defined]
