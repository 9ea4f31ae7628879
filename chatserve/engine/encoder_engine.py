"""The engine of an encoder: `add`, `abort`, `step`, as `Engine` has them, for embeddings alone.

Each step takes the texts whose turn it is, as many as its limits allow, and is done with them:
nothing is kept between steps. Knows no HTTP, asyncio or threads.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from chatserve.engine.pooling import Pooler
from chatserve.engine.sequence import (
    Begun,
    LoadedAdapter,
    Phase,
    Pooling,
    SamplingParams,
    TokenEvent,
)
from chatserve.engine.waiting_line import Priority, WaitingLine
from chatserve.errors import (
    ChatserveError,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    UnsupportedParameter,
)
from chatserve.models.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """`chatserve.models.encoder_network.EncoderNetwork`, as the engine uses it."""

    @property
    def vocab_size(self) -> int: ...
    def states(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class _Text:
    seq_id: str
    token_ids: tuple[int, ...]
    pooling: Pooling
    share: bytes
    priority: Priority


class EncoderEngine:
    def __init__(
        self,
        network: Encoder,
        *,
        context_length: int,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
    ) -> None:
        """A step takes at most `max_num_seqs` texts that, filled up to the longest of them, have
        `max_num_batched_tokens`; or a longer one alone."""
        self._network = network
        self._context_length = context_length
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: dict[str, _Text] = {}
        self._line: WaitingLine[_Text] = WaitingLine()
        self._num_running = 0
        self.admitted: Sequence[str] = ()
        """Texts whose turn has come in the last step."""

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_held(self) -> int:
        """A text has one event: no reader is too slow for it."""
        return 0

    @property
    def num_preempted(self) -> int:
        """Nothing is kept that could be taken away."""
        return 0

    @property
    def num_kv_tokens(self) -> int:
        return self.num_free_kv_tokens

    @property
    def num_free_kv_tokens(self) -> int:
        """Nothing is kept: there is place for as much as a step takes."""
        return self._max_num_seqs * self._context_length

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises as `Engine.check` does, and `UnsupportedParameter` where text is to be made."""
        if params.pooling is None:
            raise UnsupportedParameter("this model is an encoder: it makes embeddings only")
        if not prompt_ids:
            raise InvalidRequest("the prompt has no tokens; send some text")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._network.vocab_size:
            raise InvalidRequest(
                f"the prompt has token ids outside the model's {self._network.vocab_size:,}: the "
                "tokenizer knows tokens that the model lacks; leave them out"
            )
        if len(prompt_ids) > self._context_length:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt_ids):,} tokens, the model holds "
                f"{self._context_length:,}; shorten it"
            )

    def draw_seed(self) -> int:
        return secrets.randbits(63)

    def add(
        self,
        seq_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        group: str | None = None,
        salt: bytes = b"",
        adapter: LoadedAdapter | None = None,
        strip_leading_space: bool = False,
        priority: Priority = "interactive",
        begun: Begun | None = None,
    ) -> Sequence[TokenEvent]:
        """Queue a text; salts take turns. What tells sequences apart that share a cache has no
        meaning here.

        Raises what `check` raises.
        """
        assert seq_id not in self._waiting, f"sequence {seq_id} exists already"
        self.check(prompt_ids, params)
        assert params.pooling is not None and adapter is None and begun is None
        text = _Text(seq_id, tuple(prompt_ids), params.pooling, salt, priority)
        self._waiting[seq_id] = text
        self._line.add(text)
        return ()

    def abort(self, seq_id: str) -> None:
        """Forget a text; unknown and finished ones are left alone."""
        if (text := self._waiting.pop(seq_id, None)) is not None:
            self._line.remove(text)

    def read(self, token_ids: Sequence[int]) -> torch.Tensor:
        """What the network makes of a text of its own, outside any step. (T, hidden)."""
        return self._network.states([token_ids])[0]

    def limit_steps(self, num_tokens: int) -> None:
        """Let a step have no more tokens than these; a longer text, which is not divided, has."""
        self._max_num_batched_tokens = min(self._max_num_batched_tokens, num_tokens)

    def hold(self, seq_id: str) -> None:
        """See `num_held`."""

    def release(self, seq_id: str) -> None:
        """See `num_held`."""

    def places(self) -> dict[str, int]:
        """Of the texts that wait; 1 is next."""
        return self._line.places()

    def phase(self, seq_id: str) -> Phase:
        """Whether a text waits, or is in the step that is running. From any thread."""
        return "waiting" if seq_id in self._waiting else "prefill"

    def step(self) -> list[TokenEvent]:
        """Compute one batch. Returns an event with its embedding, or an error, for each text.

        A fault fails only the texts that fail alone, too. A device that is lost raises.
        """
        batch = self._take()
        self._num_running = len(batch)
        self.admitted = [text.seq_id for text in batch]
        try:
            return self._run(batch)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # whatever a network raises, other texts go on
            if len(batch) == 1:
                return [_failure(batch[0], error)]
            logger.warning("a batch of %d failed, each runs alone now: %s", len(batch), error)
        finally:
            self._num_running = 0
        return [self._run_alone(text) for text in batch]

    def _take(self) -> list[_Text]:
        batch: list[_Text] = []
        longest = 0
        while self._line and len(batch) < self._max_num_seqs:
            text = self._line.first()
            longest = max(longest, len(text.token_ids))
            if batch and (len(batch) + 1) * longest > self._max_num_batched_tokens:
                break
            batch.append(self._line.take())
            del self._waiting[text.seq_id]
        return batch

    def _run(self, batch: Sequence[_Text]) -> list[TokenEvent]:
        if not batch:
            return []
        states = self._network.states([text.token_ids for text in batch])
        return [_event(text, rows) for text, rows in zip(batch, states, strict=True)]

    def _run_alone(self, text: _Text) -> TokenEvent:
        try:
            return self._run([text])[0]
        except torch.AcceleratorError:
            raise
        except Exception as error:  # as in `step`: this text alone fails
            return _failure(text, error)


def _event(text: _Text, states: torch.Tensor) -> TokenEvent:
    """states: (T, hidden)."""
    rows = {"mean": states, "last": states[-1:], "cls": states[:1]}[text.pooling]
    pooler = Pooler(text.pooling, len(text.token_ids))
    pooler.add(0, rows)
    embedding = pooler.embedding()
    if embedding is None:
        return _failure(text, GenerationFailed("the model computed no finite states"))
    return TokenEvent(
        seq_id=text.seq_id,
        num_prompt_tokens=len(text.token_ids),
        finish_reason="length",
        embedding=embedding,
    )


def _failure(text: _Text, error: Exception) -> TokenEvent:
    if is_out_of_memory(error):
        error = OutOfMemory("the device ran out of memory over this text; send a shorter one")
    elif not isinstance(error, ChatserveError):
        logger.error("text %s failed: %s", text.seq_id, error, exc_info=error)
        error = GenerationFailed(f"the engine failed on this request: {type(error).__name__}")
    return TokenEvent(seq_id=text.seq_id, num_prompt_tokens=len(text.token_ids), error=error)
