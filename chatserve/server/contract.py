"""What a worker asks of an engine and of a model: the seams that tests fake.

Structural types only; whoever fits is served. Imports no engine, so the HTTP side of a worker is up
before torch is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import JsonValue

from chatserve.engine.admission import Admission
from chatserve.engine.grammar import Grammars
from chatserve.engine.output import TokenBytes
from chatserve.engine.rolling import Rolled
from chatserve.engine.sequence import Begun, LoadedAdapter, Pooling, SamplingParams, TokenEvent
from chatserve.engine.waiting_line import Priority
from chatserve.meter import Meter
from chatserve.models.tool_format import ToolFormat

ToolDefinitions = Sequence[Mapping[str, Any]]
"""Tools as OpenAI's requests write them."""


class TokenStream(Protocol):
    """The events of one sequence. Closing it early aborts, also before the first event."""

    @property
    def place(self) -> int | None:
        """Among those who wait, 1 is next; None: it does not wait, or nobody has looked yet."""
        ...

    def __aiter__(self) -> TokenStream: ...
    async def __anext__(self) -> TokenEvent: ...
    async def aclose(self) -> None: ...


class Stats(Protocol):
    """A snapshot of the engine's progress."""

    @property
    def tick(self) -> int: ...
    @property
    def last_token_age_s(self) -> float: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def free_kv_tokens(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def num_kv_tokens(self) -> int: ...
    @property
    def num_preempted(self) -> int: ...


class Engine(Protocol):
    """`chatserve.engine.async_engine.AsyncEngine`, as the server uses it."""

    @property
    def admission(self) -> Admission: ...
    @property
    def meter(self) -> Meter: ...
    def start(self) -> None: ...
    async def stop(self) -> None: ...
    def stats(self) -> Stats: ...
    def draw_seed(self) -> int: ...
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
    ) -> TokenStream:
        """With `begun`, the first events are those again: no queue refuses it."""
        ...


class Prompts(Protocol):
    """`chatserve.engine.prompt.PromptBuilder`, as the server uses it.

    Messages are whatever has `role` and `content`, and perhaps `tool_calls`, `tool_call_id` and
    `name`. `tool_format`: how answers call tools; `tool_control_id`: a special token before that;
    `tool_marks`: special tokens within.
    """

    @property
    def tool_format(self) -> ToolFormat: ...
    @property
    def tool_control_id(self) -> int | None: ...
    @property
    def tool_marks(self) -> Mapping[str, int]: ...
    def chat(
        self, messages: Sequence[Any], *, is_open: bool = False, tools: ToolDefinitions = ()
    ) -> list[int]: ...
    def rolling_chat(
        self,
        messages: Sequence[Any],
        asked: int | None,
        *,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> Rolled: ...
    def completion(self, prompt: str | Sequence[int], *, is_answered: bool = True) -> list[int]: ...
    def max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int: ...


class Tokenization(Protocol):
    """`chatserve.engine.tokenization.Tokenization`, as the server uses it."""

    @property
    def num_ending(self) -> int: ...
    def of_embedded(self, text: str) -> list[int]: ...
    def of_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def of_chat(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> list[int]: ...
    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...
    def pieces(self, ids: Sequence[int]) -> list[str]: ...


class Tokenizer(TokenBytes, Protocol):
    """`chatserve.models.tokenizer.Tokenizer`, as the server shows tokens.

    `name_of` a control token is what it is called; it is no text.
    """

    @property
    def eos_ids(self) -> frozenset[int]: ...
    @property
    def strips_leading_space(self) -> bool: ...
    def name_of(self, token_id: int) -> str | None: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Adapters(Protocol):
    """`chatserve.engine.adapters.Adapters`, as the server uses it.

    All but `loaded` may be called from any thread; `load_below` and `stage_below` take their time.
    """

    def loaded(self) -> Mapping[str, LoadedAdapter]: ...
    def load_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter: ...
    def stage_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter: ...
    def settle(self, name: str, *, is_wanted: bool) -> None: ...
    def unload(self, name: str) -> None: ...


class Renderer(Protocol):
    """`chatserve.models.templates.render_process.RenderProcess`, as the server uses it."""

    def close(self) -> None: ...


class ServedModel(Protocol):
    """What the server knows of the model behind the engine.

    `names` are its names in the API, `adapters` what is served beside it under `NAME:ADAPTER`.
    `stop` are the chat template's own stop strings, `stop_token_ids` ids beside the end-of-sequence
    ids. `strip_leading_space`: an answer in a chat begins with a space that belongs to the template
    (LLaMA's tokenizer). `defaults` are values for fields that a request leaves out
    (`--use-generation-config`), by their OpenAI names. `hidden_size` is how long an embedding is,
    `pooling` how it is made unless a request says otherwise. `is_encoder`: it reads texts in both
    directions and writes none.
    `grammars` compiles what answers must match; None where that is not offered. `renderer` is the
    process that renders the model's own chat template, if there is one, to be closed.
    `description` goes to `/v1/models`: device, dtype, 8 bits, and why.
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def context_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def prompts(self) -> Prompts: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def pooling(self) -> Pooling: ...
    @property
    def is_encoder(self) -> bool: ...
    @property
    def tokenization(self) -> Tokenization: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def stop(self) -> Sequence[str]: ...
    @property
    def stop_token_ids(self) -> Sequence[int]: ...
    @property
    def strip_leading_space(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def description(self) -> Mapping[str, JsonValue]: ...
    @property
    def defaults(self) -> Mapping[str, float]: ...
    @property
    def adapters(self) -> Adapters: ...
    @property
    def grammars(self) -> Grammars | None: ...
    @property
    def renderer(self) -> Renderer | None: ...
