"""An answer and the model that gives it, as plain data: what client, chat and drawing share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatDelta:
    """What one event adds to an answer; or, before it begins, its place in the queue, how far its
    model is, or a note on what it waits for.

    messages_dropped: places in the request of what was left out, so that the rest fits.
    reasoning: what some servers send apart of what a model thinks before it answers.
    """

    text: str = ""
    finish_reason: str | None = None
    num_completion_tokens: int | None = None
    place: int | None = None
    loading: Progress | None = None
    note: str = ""
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    messages_dropped: tuple[int, ...] = ()
    reasoning: str = ""

    @property
    def has_begun(self) -> bool:
        """Whether the model has said or thought something here."""
        return bool(self.text or self.reasoning)


@dataclass(frozen=True)
class ModelInfo:
    """One entry of `/v1/models`; what the server does not say is None.

    weight_bits: of a compressed model. parent: of a base with an adapter, the base.
    """

    name: str
    device: str | None = None
    dtype: str | None = None
    weight_bits: int | None = None
    context_length: int | None = None
    template_name: str | None = None
    parent: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a server is that is not ready: bytes of its model in memory, or zeros."""

    name: str = ""
    state: str = ""
    loaded_bytes: int = 0
    total_bytes: int = 0


@dataclass
class Answer:
    """What has come of one answer so far."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    messages_dropped: tuple[int, ...] = ()
    asked_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    max_tokens: int | None = None  # the limit that was asked for
    num_events: int = 0  # that brought text, or what the model thinks

    def take(self, delta: ChatDelta, now: float) -> None:
        if delta.has_begun:
            self.text += delta.text
            self.reasoning += delta.reasoning
            self.num_events += 1
            if self.first_token_at is None:
                self.first_token_at = now
            self.last_token_at = now
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.num_tokens = delta.num_completion_tokens or self.num_tokens
        if delta.num_prompt_tokens is not None:
            self.num_prompt_tokens = delta.num_prompt_tokens
            self.num_cached_tokens = delta.num_cached_tokens
        self.messages_dropped = delta.messages_dropped or self.messages_dropped

    @property
    def num_context_tokens(self) -> int | None:
        """What the prompt and the answer take of the context together."""
        if self.num_prompt_tokens is None:
            return None
        return self.num_prompt_tokens + (self.num_tokens or 0)

    @property
    def ttft_s(self) -> float | None:
        """How long the first token took."""
        if self.asked_at is None or self.first_token_at is None:
            return None
        return self.first_token_at - self.asked_at

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed: the first token's wait is prefill and does not count."""
        if not self.num_tokens or self.first_token_at is None or self.last_token_at is None:
            return None
        duration_s = self.last_token_at - self.first_token_at
        return (self.num_tokens - 1) / duration_s if duration_s > 0 else None

    @property
    def duration_s(self) -> float | None:
        """From the question to the last that came."""
        if self.asked_at is None or self.last_token_at is None:
            return None
        return self.last_token_at - self.asked_at

    @property
    def events_per_s(self) -> float | None:
        """What stands in for `tokens_per_s` where the server has not told its tokens."""
        if self.first_token_at is None or self.last_token_at is None:
            return None
        duration_s = self.last_token_at - self.first_token_at
        return (self.num_events - 1) / duration_s if duration_s > 0 else None
