"""Fakes of what the server leans on: an engine that replays a script, a model without weights."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from chatserve.engine.admission import Admission
from chatserve.engine.grammar import Grammars
from chatserve.engine.rolling import Rolled
from chatserve.engine.sequence import Begun, LoadedAdapter, Pooling, SamplingParams, TokenEvent
from chatserve.engine.waiting_line import Priority
from chatserve.errors import (
    ChatserveError,
    ContextLengthExceeded,
    EngineStopped,
    ModelNotFound,
)
from chatserve.meter import Meter
from chatserve.models.tool_format import TAGS
from chatserve.server.contract import Renderer, ToolDefinitions

WAIT_S = 20.0
ANSWER = ("Hello", ", ", "wörld", " 🙂", "!")


@dataclass(frozen=True)
class Submitted:
    """One call of `submit`, as the test wants to look at it."""

    seq_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    choice: int
    strip_leading_space: bool
    salt: bytes
    adapter: LoadedAdapter | None = None
    begun: Begun | None = None


@dataclass(frozen=True)
class FakeStats:
    tick: int = 0
    last_token_age_s: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    free_kv_tokens: int = 1000
    is_alive: bool = True
    num_kv_tokens: int = 1000
    num_preempted: int = 0


class FakeClock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeStream:
    """Replays the events of one sequence; closing it early is an abort."""

    def __init__(self, engine: FakeEngine, seq_id: str, events: Sequence[TokenEvent]) -> None:
        self._engine = engine
        self._seq_id = seq_id
        self._events = list(events)
        self._is_done = False
        self._begun_at = self._spoke_at = time.monotonic()

    @property
    def place(self) -> int | None:
        return self._engine.place

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._is_done:
            raise StopAsyncIteration
        if not self._events and self._engine.hangs:
            await self._engine.stopped.wait()
        if self._engine.stopped.is_set():
            self._finish(self._engine.finished)
            return TokenEvent(self._seq_id, error=EngineStopped("the engine has stopped"))
        if not self._events:
            raise StopAsyncIteration
        if self._engine.step_s is not None:
            await asyncio.sleep(self._engine.step_s)
        event = self._events.pop(0)
        self._measure(event)
        if event.is_last:
            self._finish(self._engine.finished)
        self._engine.note_event(self._seq_id)
        return event

    async def aclose(self) -> None:
        self._finish(self._engine.aborted)

    def _measure(self, event: TokenEvent) -> None:
        """As the real engine does."""
        meter, now = self._engine.meter, time.monotonic()
        if event.token_ids:
            is_first = event.num_generated_tokens == 1
            (meter.first_token if is_first else meter.between_tokens).observe(now - self._spoke_at)
            if is_first:
                meter.note_prompt(event.num_prompt_tokens, event.num_cached_tokens)
            meter.generation_tokens += len(event.token_ids)
        if event.is_last:
            meter.note_end(event.finish_reason or "error", now - self._begun_at)
        self._spoke_at = now

    def _finish(self, outcome: list[str]) -> None:
        if not self._is_done:
            self._is_done = True
            self._engine.note_end(self._seq_id, outcome)


class FakeEngine:
    """Answers every prompt with `pieces`, one per step.

    `hangs`: say the pieces and then nothing more, without an end. `error`: end with it instead of
    with a finish reason. `refusal`: raised by `submit`. `step_s`: time between two events; None
    does not even yield to the loop. `num_cached`: prompt tokens said to be in the cache. The
    test may wait for what the server thread does.
    """

    def __init__(
        self,
        pieces: Sequence[str] = ANSWER,
        *,
        hangs: bool = False,
        error: ChatserveError | None = None,
        refusal: ChatserveError | None = None,
        step_s: float | None = None,
        num_cached: int = 0,
    ) -> None:
        self.pieces = tuple(pieces)
        self.hangs = hangs
        self.error = error
        self.refusal = refusal
        self.step_s = step_s
        self.num_cached = num_cached
        self.current = FakeStats()
        self.admission = Admission(16, 64)
        self.meter = Meter()
        self.place: int | None = None
        self.priorities: dict[str, Priority] = {}
        self.is_started = False
        self.submitted: list[Submitted] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.running: set[str] = set()
        self.num_events: dict[str, int] = {}
        self.stopped = asyncio.Event()
        self._changed = threading.Condition()

    def start(self) -> None:
        self.is_started = True

    async def stop(self) -> None:
        self.stopped.set()

    def stats(self) -> FakeStats:
        return self.current

    def draw_seed(self) -> int:
        return 1000 + len(self.submitted)

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        salt: bytes = b"",
        adapter: LoadedAdapter | None = None,
        strip_leading_space: bool = False,
        priority: Priority = "interactive",
        begun: Begun | None = None,
    ) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        seq_id = f"{request_id}-{choice}"
        with self._changed:
            self.submitted.append(
                Submitted(
                    seq_id,
                    tuple(prompt_ids),
                    params,
                    choice,
                    strip_leading_space,
                    salt,
                    adapter,
                    begun,
                )
            )
            self.priorities[seq_id] = priority
            self.running.add(seq_id)
            self._changed.notify_all()
        if params.pooling is not None and self.error is None and not self.hangs:
            return FakeStream(self, seq_id, [_embedded(seq_id, prompt_ids, params.pooling)])
        script = self._script(seq_id, len(prompt_ids), params)
        return FakeStream(self, seq_id, self._again(begun, script) if begun else script)

    def _script(self, seq_id: str, num_prompt: int, params: SamplingParams) -> list[TokenEvent]:
        events = [
            TokenEvent(
                seq_id, text=text, token_ids=(i,), num_prompt_tokens=num_prompt,
                num_generated_tokens=i + 1, num_cached_tokens=self.num_cached,
            )
            for i, text in enumerate(self.pieces[: params.max_tokens])
        ]  # fmt: skip
        if self.hangs:
            return events
        count = len(events)
        if self.error is not None:
            last = TokenEvent(seq_id, num_prompt_tokens=num_prompt, error=self.error)
        else:
            reason: Any = "length" if count == params.max_tokens else "stop"
            last = TokenEvent(
                seq_id, num_prompt_tokens=num_prompt, num_generated_tokens=count,
                num_cached_tokens=self.num_cached, finish_reason=reason,
            )  # fmt: skip
        return [*events, last]

    def _again(self, begun: Begun, script: list[TokenEvent]) -> list[TokenEvent]:
        """What has been said, in the units it came in, and the rest."""
        said = []
        for unit in begun.units:
            here = script[: len(unit)] or script[:1]
            script = script[len(here) :]
            said.append(
                replace(
                    here[-1], text="".join(each.text for each in here), token_ids=unit,
                    num_cached_tokens=begun.num_cached_tokens,
                )
            )  # fmt: skip
        return [*said, *(replace(e, num_cached_tokens=begun.num_cached_tokens) for e in script)]

    def note_event(self, seq_id: str) -> None:
        with self._changed:
            self.num_events[seq_id] = self.num_events.get(seq_id, 0) + 1
            self._changed.notify_all()

    def note_end(self, seq_id: str, outcome: list[str]) -> None:
        with self._changed:
            outcome.append(seq_id)
            self.running.discard(seq_id)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[FakeEngine], bool], what: str = "") -> None:
        """Block the test until the server thread has made `condition` true."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), WAIT_S), what or "timed out"


def _embedded(seq_id: str, prompt_ids: Sequence[int], pooling: Pooling) -> TokenEvent:
    """A vector that tells what was pooled, and how: 3 for the mean, 5 for the last."""
    vector = [prompt_ids[0], prompt_ids[-1], len(prompt_ids), 3 if pooling == "mean" else 5]
    return TokenEvent(
        seq_id, num_prompt_tokens=len(prompt_ids), finish_reason="length",
        embedding=np.array(vector, np.float32),
    )  # fmt: skip


class FakePrompts:
    """Every byte of a text is a token."""

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length

    tool_format = TAGS
    tool_control_id = None
    tool_marks: Mapping[str, int] = {}

    def chat(
        self, messages: Sequence[Any], *, is_open: bool = False, tools: ToolDefinitions = ()
    ) -> list[int]:
        text = "".join(f"<{m.role}>{m.content}" for m in messages)
        names = "".join(f"<{tool['function']['name']}>" for tool in tools)
        return self.completion(names + text + "..." * is_open)

    def rolling_chat(
        self,
        messages: Sequence[Any],
        asked: int | None,
        *,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> Rolled:
        """Where not all fit, the last message alone stays."""
        texts = [f"<{m.role}>{m.content}".encode() for m in messages]
        texts[-1] += b"..." * is_open
        num_bytes = sum(map(len, texts))
        if num_bytes + (asked or 1) <= self._context_length:
            return Rolled(list(b"".join(texts)))
        dropped = tuple(range(len(texts) - 1))
        return Rolled(self.completion(list(texts[-1])), dropped, num_bytes - len(texts[-1]))

    def completion(self, prompt: str | Sequence[int], *, is_answered: bool = True) -> list[int]:
        ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        if len(ids) + is_answered > self._context_length:
            raise ContextLengthExceeded(
                f"prompt has {len(ids)} tokens, fake holds {self._context_length}; shorten it"
            )
        return ids

    def max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        rest = self._context_length - num_prompt_tokens
        if asked is not None and asked > rest:
            raise ContextLengthExceeded(f"asked for {asked} tokens, {rest} are left", param="max")
        return rest if asked is None else asked


class FakeTokenization:
    """Every byte of a text is a token; 0 starts it."""

    def __init__(self, prompts: FakePrompts) -> None:
        self._prompts = prompts

    num_ending = 0

    def of_embedded(self, text: str) -> list[int]:
        return self.of_text(text)

    def of_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + list(text.encode())

    def of_chat(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> list[int]:
        ends = add_generation_prompt and not is_open
        return self._prompts.chat(messages, is_open=is_open, tools=tools) + [1] * ends

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(id_ for id_ in ids if id_ > 1 or not skip_special_tokens).decode()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [chr(id_) for id_ in ids]


class FakeTokenizer:
    """Ids below 256 are bytes, those behind them control tokens."""

    eos_ids = frozenset({7})
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def name_of(self, token_id: int) -> str | None:
        return f"<|{token_id}|>" if token_id >= 256 else None

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


class FakeAdapters:
    """Adapters without numbers; `refusal` is raised by whatever would read one. `paths`: of those
    that have been served."""

    def __init__(
        self, *names: str, base: str = "trained/on", refusal: ChatserveError | None = None
    ) -> None:
        self.refusal = refusal
        self.paths: list[str] = []
        self._loaded = {name: fake_adapter(name, base=base) for name in names}
        self._staged: dict[str, tuple[str, LoadedAdapter]] = {}

    def loaded(self) -> Mapping[str, LoadedAdapter]:
        return self._loaded

    def load_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter:
        if self.refusal is not None:
            raise self.refusal
        self.paths.append(path)
        self._loaded = {**self._loaded, name: fake_adapter(name, path)}
        return self._loaded[name]

    def stage_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter:
        if self.refusal is not None:
            raise self.refusal
        self._staged = {name: (path, fake_adapter(name, path))}
        return self._staged[name][1]

    def settle(self, name: str, *, is_wanted: bool) -> None:
        path, staged = self._staged.pop(name)
        if is_wanted:
            self.paths.append(path)
            self._loaded = {**self._loaded, name: staged}

    def unload(self, name: str) -> None:
        if name not in self._loaded:
            raise ModelNotFound(f"there is no adapter {name}", param="lora_name")
        self._loaded = {key: value for key, value in self._loaded.items() if key != name}


class _FakeNetwork:
    num_bytes = 0


def fake_adapter(name: str, path: str = "", base: str = "trained/on") -> LoadedAdapter:
    return LoadedAdapter(name, f"ad_{name}{path}", _FakeNetwork(), base)


@dataclass(frozen=True)
class FakeModel:
    """A model that exists only in the answers about it."""

    names: Sequence[str] = ("fake",)
    context_length: int = 1000
    vocab_size: int = 256
    hidden_size: int = 4
    pooling: Pooling = "mean"
    is_encoder: bool = False
    stop: Sequence[str] = ("</s>",)
    stop_token_ids: Sequence[int] = (7,)
    strip_leading_space: bool = True
    fingerprint: str = "fp_fake"
    description: Mapping[str, Any] = field(default_factory=lambda: {"device": "cpu"})
    defaults: Mapping[str, float] = field(default_factory=dict)
    adapters: FakeAdapters = field(default_factory=lambda: FakeAdapters())
    grammars: Grammars | None = None
    renderer: Renderer | None = None
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)

    @property
    def prompts(self) -> FakePrompts:
        return FakePrompts(self.context_length)

    @property
    def tokenization(self) -> FakeTokenization:
        return FakeTokenization(self.prompts)
