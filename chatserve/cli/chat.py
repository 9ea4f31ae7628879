"""The chat: turns, commands, one answer after the other; and the answer to a single prompt.

Knows the conversation. What it reads from, writes to and talks to is handed in; it starts no
server, makes no HTTP request and writes no escape code.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from chatserve.cli.answer import Answer, ChatDelta, ModelInfo, Progress
from chatserve.cli.escapes import one_line
from chatserve.cli.lines import Command, help_text, parse, unknown_command_text
from chatserve.cli.render import Display, progress_text
from chatserve.cli.terminal import interruptible
from chatserve.cli.transcript import Transcript
from chatserve.errors import ChatserveError, ContextLengthExceeded, StartupError, UsageError

WAIT_S = 0.1


class Server(Protocol):
    """The server behind a chat, which may still be loading its model."""

    def progress(self) -> Progress | None:
        """How far it is; None when it is ready. Raises `StartupError` when it has ended."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until it is ready or has ended, at most `timeout_s`."""

    def model(self) -> ModelInfo:
        """The model that answers; only when ready."""

    def models(self) -> Sequence[ModelInfo]:
        """All that it serves; only when ready. Raises `ChatserveError`."""

    def choose(self, model: ModelInfo) -> None:
        """Let `model` answer from now on; only when ready."""

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        """Ask for an answer; only when ready. Closing the deltas cancels it on the server.

        The deltas raise `ChatserveError`.
        """


class Kept(Protocol):
    """Where a chat is kept; what goes wrong there is told, never raised."""

    @property
    def name(self) -> str | None:
        """What finds the chat again; None when nothing of it is kept."""

    def keep(self, transcript: Transcript, model: str) -> None:
        """Save what has changed, if anything has."""

    def begin_anew(self) -> None:
        """What comes is another chat."""

    def rename(self, name: str) -> str | None:
        """Call the chat so; what hinders that, if anything does."""

    def listed(self) -> str:
        """The newest chats, a line each."""


class Lines(Protocol):
    def read(self) -> str:
        """The next line. Raises `EOFError` at the end, `KeyboardInterrupt` on Ctrl-C."""


@dataclass(frozen=True)
class ChatOptions:
    """`sampling` goes into each request as it is; `wished_max_tokens` where the context has room.

    A `max_tokens` in `sampling` comes before the wish.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    wished_max_tokens: int | None = None
    with_history: bool = True
    is_typed: bool = True


def stream_answer(
    deltas: Generator[ChatDelta, None, None],
    display: Display,
    answer: Answer,
    clock: Callable[[], float],
) -> None:
    """Draw an answer while it comes and keep it in `answer`, however it ends."""
    with contextlib.closing(deltas), display.answer() as draw:
        for delta in deltas:
            if delta.place is not None:
                display.place(delta.place)
                continue
            if delta.note:
                display.note(delta.note)
                continue
            answer.take(delta, clock())
            draw(delta.text)


def ask(
    server: Server, messages: list[dict[str, str]], options: ChatOptions, answer: Answer
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
            if not is_wish or answer.text or error.param != "max_tokens":
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
    show_status: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Answer the question in `transcript`. Raises `ChatserveError`, `KeyboardInterrupt`."""
    wait_until_ready(server, display)
    answer = Answer()
    deltas = ask(server, transcript.messages(), options, answer)
    stream_answer(deltas, display, answer, clock)
    if answer.finish_reason == "length":
        display.note(length_text(answer, options, server.model()))
    if show_status:
        display.note(status_text(server.model(), answer))


class Chat:
    """The loop over typed lines."""

    def __init__(
        self,
        server: Server,
        display: Display,
        transcript: Transcript,
        options: ChatOptions,
        *,
        kept: Kept | None = None,
        hush: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`kept` saves each turn when it is over. `hush` is entered while an answer runs: it keeps
        typed keys off the screen.
        """
        self._server = server
        self._display = display
        self._transcript = transcript
        self._options = options
        self._kept = kept
        self._hush = hush
        self._clock = clock
        self._last_answer = Answer()
        self._last_model = ""
        self._commands: Mapping[str, Callable[[str], None]] = {
            "help": lambda _: display.note(help_text()),
            "reset": self._reset,
            "remove": self._remove,
            "regen": self._regen,
            "model": self._model,
            "system": self._system,
            "save": self._save,
            "load": self._load,
            "name": self._name,
            "sessions": self._sessions,
        }

    def run(self, lines: Lines) -> None:
        """Until the lines end or say `/exit`. Raises `StartupError` when the server has ended."""
        try:
            self._run(lines)
        finally:
            # a Ctrl-C may have come while the last turn was saved
            self._save_turns()

    def _run(self, lines: Lines) -> None:
        while True:
            try:
                if not self._take(lines.read()):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._options.is_typed:
                    raise
                self._display.note("Ctrl-D or /exit leaves")

    def status(self) -> str:
        """One line on the server. Raises `StartupError` when it has ended."""
        if (progress := self._server.progress()) is not None:
            return progress_text(progress)
        return status_text(self._server.model(), self._last_answer)

    def _take(self, line: str) -> bool:
        """Do what a line says; False when it says to leave."""
        meaning = parse(line, is_typed=self._options.is_typed)
        if meaning is None:
            return True
        if not isinstance(meaning, Command):
            self._ask(meaning.text)
        elif meaning.name == "exit":
            return False
        elif command := self._commands.get(meaning.name):
            command(meaning.argument)
        else:
            self._display.error(unknown_command_text(meaning.name))
        return True

    def _ask(self, question: str) -> None:
        self._transcript.ask(question)
        answer = Answer()
        with interruptible(), self._hush():
            try:
                self._answer(answer)
            except KeyboardInterrupt:
                self._keep(answer, is_partial=True)
                self._display.note("stopped; /regen asks again")
            except (StartupError, SystemExit):
                self._keep(answer, is_partial=True)
                raise
            except ChatserveError as error:
                self._keep(answer, is_partial=True)
                self._display.error(error.message)
                if error.code == ContextLengthExceeded.code and self._options.is_typed:
                    self._display.note("/clear starts over")
            else:
                self._keep(answer, is_partial=False)
                if answer.finish_reason == "length":
                    model = self._server.model()
                    self._display.note(length_text(answer, self._options, model))

    def _answer(self, answer: Answer) -> None:
        wait_until_ready(self._server, self._display)
        self._last_model = self._server.model().name
        messages = self._transcript.messages(with_history=self._options.with_history)
        deltas = ask(self._server, messages, self._options, answer)
        stream_answer(deltas, self._display, answer, self._clock)

    def _keep(self, answer: Answer, *, is_partial: bool) -> None:
        self._transcript.answer(answer.text, is_partial=is_partial)
        self._last_answer = answer
        self._save_turns()

    def _save_turns(self) -> None:
        if self._kept is not None:
            self._kept.keep(self._transcript, self._last_model)

    def _reset(self, _: str) -> None:
        self._begin_anew()
        self._transcript.reset()
        self._display.note("the conversation is empty")

    def _remove(self, _: str) -> None:
        has_removed = self._transcript.remove_last()
        self._save_turns()
        self._display.note("removed the last question" if has_removed else "nothing to remove")

    def _regen(self, _: str) -> None:
        question = self._transcript.take_last_question()
        if question is None:
            self._display.note("no question to ask again")
        else:
            self._ask(question)

    def _model(self, name: str) -> None:
        if (progress := self._server.progress()) is not None:
            self._display.error(progress_text(progress))
            return
        try:
            models = {model.name: model for model in self._server.models()}
        except ChatserveError as error:
            self._display.error(error.message)
            return
        there = ", ".join(one_line(each) for each in models)
        if not name:
            self._display.note(f"{one_line(self._server.model().name)} answers; there is {there}")
        elif name in models:
            self._server.choose(models[name])
            self._display.note(f"{one_line(name)} answers from now on")
        else:
            self._display.error(f"{one_line(name)} is not served; there is {there}")

    def _system(self, text: str) -> None:
        if text:
            self._transcript.system = text
        self._display.note(f"system message: {self._transcript.system or 'none'}")

    def _save(self, file: str) -> None:
        if not file:
            self._display.error("/save needs a file name")
            return
        try:
            if self._server.progress() is None:
                template_name = self._server.model().template_name
                self._transcript.template_name = template_name or self._transcript.template_name
            path, has_replaced = self._transcript.save(file)
            self._display.note(f"replaced {path}" if has_replaced else f"saved to {path}")
        except UsageError as error:
            self._display.error(error.message)

    def _load(self, file: str) -> None:
        if not file:
            self._display.error("/load needs a file name")
            return
        try:
            loaded = Transcript.load(file)
        except UsageError as error:
            self._display.error(error.message)
            return
        self._begin_anew()
        self._transcript = loaded
        self.show_turns()

    def show_turns(self, most: int | None = None) -> None:
        """Draw the conversation so far, or the last turns of it."""
        turns = self._transcript.turns[self._transcript.offset :]
        shown = turns[-most:] if most is not None else turns
        if len(shown) < len(turns):
            self._display.note(f"… {len(turns) - len(shown)} earlier turns")
        roles = dict(zip(("user", "assistant"), self._transcript.roles, strict=True))
        for turn in shown:
            self._display.turn(roles[turn.role], turn.content)

    def _begin_anew(self) -> None:
        self._save_turns()
        if self._kept is not None:
            self._kept.begin_anew()

    def _name(self, name: str) -> None:
        if self._kept is None:
            self._display.error("this chat is not kept (--no-save)")
        elif not name:
            self._display.note(f"this chat is called {self._kept.name or 'nothing yet'}")
        elif (hindrance := self._kept.rename(name)) is not None:
            self._display.error(hindrance)
        else:
            self._display.note(f"--resume {one_line(name)} goes on with this chat")

    def _sessions(self, _: str) -> None:
        if self._kept is None:
            self._display.error("no chat is kept (--no-save)")
        else:
            self._display.note(self._kept.listed())


def status_text(model: ModelInfo, answer: Answer) -> str:
    """`smollm2-135m · cpu · float32 · 8-bit · 41.3 tokens/s`, leaving out what is not known."""
    parts = (
        model.name,
        model.device,
        model.dtype,
        f"{model.weight_bits}-bit" if model.weight_bits else None,
        f"{answer.tokens_per_s:.1f} tokens/s" if answer.tokens_per_s else None,
    )
    return " · ".join(one_line(part) for part in parts if part)


def length_text(answer: Answer, options: ChatOptions, model: ModelInfo) -> str:
    """Why an answer ended before its end."""
    limit = answer.max_tokens
    if limit is not None and (answer.num_tokens is None or answer.num_tokens >= limit):
        if "max_tokens" in options.sampling:
            return f"the answer stopped at --max-new-tokens {limit}"
        return f"the answer stopped at {limit} tokens; --max-new-tokens raises the limit"
    size = f" of {model.context_length} tokens" if model.context_length else ""
    return f"the answer stopped where the model's context{size} ends"
