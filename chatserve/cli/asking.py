"""Asking for one answer: what a request carries, the deltas drawn as they come, how it ended.

Knows the server behind a chat by its methods alone, and one answer; no conversation, no command.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from chatserve.cli.answer import Answer, ChatDelta, ModelInfo, Progress
from chatserve.cli.render import Display
from chatserve.cli.status_bar import status_text
from chatserve.cli.transcript import Transcript
from chatserve.errors import ContextLengthExceeded

WAIT_S = 0.1
CONTEXT_LINE = "── not in context above this line ──"


class Streams(Protocol):
    """Whoever answers."""

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        """Ask for an answer; only when ready. Closing the deltas cancels it on the server.

        The deltas raise `ChatserveError`.
        """


class Server(Streams, Protocol):
    """The server behind a chat, which may still be loading its model."""

    def progress(self) -> Progress | None:
        """How far it is; None when it is ready. Raises `StartupError` when it has ended."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until it is ready or has ended, at most `timeout_s`."""

    def model(self) -> ModelInfo:
        """The model that answers; only when ready."""

    def news(self) -> str:
        """Whether it has gone, or come back; mostly nothing. Only when ready."""

    def models(self) -> Sequence[ModelInfo]:
        """All that it serves; only when ready. Raises `ChatserveError`."""

    def choose(self, model: ModelInfo) -> None:
        """Let `model` answer from now on; only when ready."""

    def count_tokens(self, text: str) -> int | None:
        """How many tokens the model makes of `text`; None where nobody can say, or not yet."""

    def close(self) -> None:
        """Let go of it; one of the chat's own is stopped."""

    def rival(self, model: ModelInfo) -> Rival:
        """A further connection to the same server, for another model's answer; only when ready."""


class Rival(Streams, Protocol):
    """One of several answers at the same time: streamed in a thread of its own."""

    def abort(self) -> None:
        """Let the thread that waits for a delta get an error instead."""

    def close(self) -> None:
        """Only when no thread streams any more."""


@dataclass(frozen=True)
class ChatOptions:
    """`sampling` goes into each request as it is; `wished_max_tokens` where the context has room.

    A `max_tokens` in `sampling` comes before the wish.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    wished_max_tokens: int | None = None
    with_history: bool = True
    is_typed: bool = True


def opened(options: ChatOptions) -> ChatOptions:
    """For a request whose last message is the beginning of the answer."""
    more = {"continue_final_message": True, "add_generation_prompt": False}
    return replace(options, sampling={**options.sampling, **more})


def stream_answer(
    deltas: Generator[ChatDelta, None, None],
    display: Display,
    answer: Answer,
    clock: Callable[[], float],
    status: Callable[[], str] | None = None,
) -> None:
    """Draw an answer while it comes and keep it in `answer`, however it ends.

    `status` is shown below it, where that can be, and asked at each frame.
    """
    answer.asked_at = clock()
    with contextlib.closing(deltas), display.answer(status) as draw:
        for delta in deltas:
            if delta.place is not None:
                display.place(delta.place)
                continue
            if delta.loading is not None:
                display.loading(delta.loading)
                continue
            if delta.note:
                display.note(delta.note)
                continue
            answer.take(delta, clock())
            if delta.reasoning:
                num_chars, has_begun = len(answer.reasoning), bool(answer.text)
                display.thinking(delta.reasoning, num_chars, has_begun=has_begun)
            # nothing is drawn beside the line that counts thoughts
            if delta.text or not delta.reasoning:
                draw(delta.text)


def ask(
    server: Streams, messages: list[dict[str, str]], options: ChatOptions, answer: Answer
) -> Generator[ChatDelta, None, None]:
    """The deltas of an answer; its limit goes into `answer`.

    A server refuses a limit that the context has no room for. Only a limit that the user gave is
    worth that error: without the wished one the same question is asked once more.
    """
    answer.max_tokens = options.sampling.get("max_tokens", options.wished_max_tokens)
    if answer.max_tokens is not None:
        sampling = {**options.sampling, "max_tokens": answer.max_tokens}
        try:
            yield from server.stream(messages, sampling)
            return
        except ContextLengthExceeded as error:
            is_wish = "max_tokens" not in options.sampling
            # other servers do not tell whose fault it is
            is_limit = error.param in ("max_tokens", None)
            if not is_wish or answer.text or not is_limit:
                raise
        answer.max_tokens = None
    yield from server.stream(messages, options.sampling)


def wait_until_ready(server: Server, display: Display) -> None:
    """Show the progress of a loading server. Raises `StartupError` when it ends instead."""
    try:
        while (progress := server.progress()) is not None:
            display.progress(progress)
            server.wait(WAIT_S)
    finally:
        display.progress(None)


def answer_once(
    server: Server,
    display: Display,
    transcript: Transcript,
    options: ChatOptions,
    *,
    answer: Answer | None = None,
    show_status: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Answer the question in `transcript`, and keep it in `answer` however it ends.

    Raises `ChatserveError`, `KeyboardInterrupt`.
    """
    wait_until_ready(server, display)
    answer = Answer() if answer is None else answer
    deltas = ask(server, transcript.messages(), options, answer)
    stream_answer(deltas, display, answer, clock)
    if not answer.text and answer.reasoning:
        display.note(only_thought_text(answer))
    if answer.finish_reason == "length":
        display.note(length_text(answer, options, server.model()))
    if show_status:
        display.note(status_text(server.model(), answer))


def length_text(
    answer: Answer, options: ChatOptions, model: ModelInfo, *, has_set: bool = False
) -> str:
    """Why an answer ended before its end. `has_set`: whoever reads it can type `/set`."""
    limit = answer.max_tokens
    if limit is not None and (answer.num_tokens is None or answer.num_tokens >= limit):
        if "max_tokens" in options.sampling:
            setting = "max_tokens" if has_set else "--max-new-tokens"
            return f"the answer stopped at {setting} {limit}"
        way = "/set max_tokens N" if has_set else "--max-new-tokens"
        return f"the answer stopped at {limit} tokens; {way} raises the limit"
    size = f" of {model.context_length} tokens" if model.context_length else ""
    return f"the answer stopped where the model's context{size} ends"


def only_thought_text(answer: Answer) -> str:
    """That all of an answer is what other servers send apart of it."""
    return f"the model has thought ({len(answer.reasoning):,} characters) and not answered"


def stopped_text(answer: Answer) -> str:
    """What can be done with an answer that Ctrl-C has stopped."""
    if not answer.text:
        return "stopped; /regen asks again, Ctrl-C leaves"
    return "stopped; /continue goes on, /regen repeats, Ctrl-C leaves"


def outside_text(num_turns: int, model: ModelInfo) -> str:
    """That the oldest turns of a chat have found no room."""
    size = f" of {model.context_length:,} tokens" if model.context_length else ""
    what = f"{num_turns} turns are" if num_turns > 1 else "turn is"
    return f"the oldest {what} no longer in the context{size}; /history draws the line"
