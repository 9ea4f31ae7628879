"""The chat: lines, turns and commands, one answer after the other.

Knows the conversation. What it reads from, writes to and talks to is handed in; it starts no
server, makes no HTTP request and writes no escape code. What each command does is in
`chatserve.cli.slash`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from chatserve.cli.answer import Answer, ModelInfo
from chatserve.cli.asking import (
    CONTEXT_LINE,
    ChatOptions,
    Server,
    ask,
    length_text,
    only_thought_text,
    opened,
    outside_text,
    stopped_text,
    stream_answer,
    wait_until_ready,
)
from chatserve.cli.attachments import Attachments
from chatserve.cli.lines import Command, parse, unknown_command_text
from chatserve.cli.render import Display, progress_text
from chatserve.cli.slash.compare import ask_both
from chatserve.cli.slash.table import RUNS
from chatserve.cli.stats import Stats
from chatserve.cli.status_bar import bar_text, live_text
from chatserve.cli.terminal import interruptible
from chatserve.cli.transcript import Transcript
from chatserve.errors import ChatserveError, ContextLengthExceeded, StartupError


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

    def searched(self, words: str) -> str:
        """The chats in which all of `words` were said together, with the places."""

    def resume(self, wanted: str, source: str) -> Transcript:
        """The chat of that name or id; it is gone on with.

        Raises `UsageError`, which begins with `source`.
        """

    def delete(self, wanted: str) -> str:
        """Delete the chat of that name or id, not this one; what it was called.

        Raises `UsageError`.
        """


class Lines(Protocol):
    def read(self, prefill: str = "") -> str:
        """The next line, begun for the user. Raises `EOFError`, `KeyboardInterrupt` on Ctrl-C."""


class Chat:
    """The loop over typed lines. Commands read and change what is public here."""

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
        self.server = server
        self.display = display
        self.transcript = transcript
        self.options = options
        self.kept = kept
        self.first_options = options
        self.stats = Stats()
        self.waiting = Attachments()
        self.num_outside = 0  # turns, the oldest, that the last request had no room for
        self.rivals: tuple[ModelInfo, ModelInfo] | None = None
        self.copies_by_terminal = False
        self.lines: Lines | None = None
        self.hush = hush
        self.clock = clock
        self._last_answer = Answer()
        self._last_model = ""
        self._leaves_next = False

    def run(self, lines: Lines) -> None:
        """Until the lines end or say `/exit`. Raises `StartupError` when the server has ended."""
        self.lines = lines
        try:
            self._run(lines)
        finally:
            # a Ctrl-C may have come while the last turn was saved
            self.save_turns()

    def _run(self, lines: Lines) -> None:
        while True:
            try:
                line = lines.read()
                self._leaves_next = False
                if not self._take(line):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.options.is_typed:
                    raise
                if self._leaves_next:
                    return
                self._leaves_next = True
                self.display.note("Ctrl-C once more, Ctrl-D or /exit leaves")

    def status(self, columns: int) -> str:
        """One line on the server, as much as there is room for.

        Raises `StartupError` when it has ended.
        """
        if (progress := self.server.progress()) is not None:
            return progress_text(progress)
        return bar_text(self.server.model(), self._last_answer, columns, self.server.news())

    def _take(self, line: str) -> bool:
        """Do what a line says; False when it says to leave."""
        meaning = parse(line, is_typed=self.options.is_typed)
        if meaning is None:
            return True
        if not isinstance(meaning, Command):
            self.ask(meaning.text)
        elif meaning.name == "exit":
            return False
        elif run := RUNS.get(meaning.name):
            run(self, meaning.argument)
        else:
            self.display.error(unknown_command_text(meaning.name))
        return True

    def ask(self, question: str) -> None:
        """Ask, draw the answer and keep both, however it ends. Raises `StartupError`."""
        question = self.waiting.before(question)
        if self.rivals is not None:
            ask_both(self, question, self.rivals)
            return
        self.transcript.ask(question)
        self._answer(self.options, self.transcript.answer)

    def go_on(self) -> None:
        """Let the last answer go on where it has ended. Raises `StartupError`."""
        self._answer(opened(self.options), self.transcript.go_on)

    def _answer(self, options: ChatOptions, keep: Callable[..., None]) -> None:
        """`keep` takes the text of the answer into the conversation."""
        answer = Answer()
        with self.stopped_by_ctrl_c():
            try:
                self._stream(options, answer)
            except KeyboardInterrupt:
                self._keep(answer, keep, is_partial=True)
                self._leaves_next = True
                self.display.note(stopped_text(answer))
            except (StartupError, SystemExit):
                self._keep(answer, keep, is_partial=True)
                raise
            except ChatserveError as error:
                self._keep(answer, keep, is_partial=True)
                self.tell_failure(error)
            else:
                self._keep(answer, keep, is_partial=False)
                self._tell_end(answer)

    @contextlib.contextmanager
    def stopped_by_ctrl_c(self) -> Iterator[None]:
        """While an answer runs: Ctrl-C raises `KeyboardInterrupt` once, typed keys wait."""
        with interruptible(), self.hush():
            yield

    def _stream(self, options: ChatOptions, answer: Answer) -> None:
        wait_until_ready(self.server, self.display)
        self._last_model = self.server.model().name
        messages = self.messages()
        deltas = ask(self.server, messages, options, answer)
        model = self.server.model()

        def status() -> str:
            return live_text(model, answer, self.clock())

        try:
            stream_answer(deltas, self.display, answer, self.clock, status)
        finally:
            self._note_dropped(answer)

    def messages(self) -> list[dict[str, str]]:
        """What a request carries now."""
        return self.transcript.messages(with_history=self.options.with_history)

    def _keep(self, answer: Answer, keep: Callable[..., None], *, is_partial: bool) -> None:
        keep(answer.text, is_partial=is_partial)
        self._last_answer = answer
        self.stats.add(self._last_model, answer)
        self.save_turns()

    def take_answer(self, answer: Answer, model: ModelInfo) -> None:
        """That of another model, which is in the conversation already, is the last one now."""
        self._last_answer, self._last_model = answer, model.name
        self._note_dropped(answer)
        self.save_turns()
        self._tell_end(answer)

    def _note_dropped(self, answer: Answer) -> None:
        """Say it when more turns than before have found no room in the context."""
        if not (answer.text or answer.finish_reason or answer.messages_dropped):
            return  # nobody has answered
        sent = self.transcript.sent(with_history=self.options.with_history)
        first = len(self.messages()) - len(sent)  # behind the system message
        dropped = [sent[p - first] for p in answer.messages_dropped if 0 <= p - first < len(sent)]
        before, self.num_outside = self.num_outside, max(dropped, default=-1) + 1
        if self.num_outside > before:
            self.display.note(outside_text(self.num_outside, self.server.model()))

    def _tell_end(self, answer: Answer) -> None:
        if not answer.text and answer.reasoning:
            self.display.note(only_thought_text(answer))
        if answer.finish_reason != "length":
            return
        is_typed = self.options.is_typed
        text = length_text(answer, self.options, self.server.model(), has_set=is_typed)
        has_room = answer.max_tokens is not None and is_typed
        self.display.note(f"{text}; /continue goes on" if has_room else text)

    def tell_failure(self, error: ChatserveError) -> None:
        """Why there is no answer, or not all of it, and what helps."""
        self.display.error(error.message)
        if error.code == ContextLengthExceeded.code and self.options.is_typed:
            hint = "`/set context rolling` and /regen let the oldest turns go, "
            is_rolling = "truncation" in self.options.sampling
            self.display.note(("" if is_rolling else hint) + "/clear starts over")

    def save_turns(self) -> None:
        """Let what keeps this chat hold it as it is now."""
        if self.kept is not None:
            self.kept.keep(self.transcript, self._last_model)

    def show_turns(self, most: int | None = None, *, are_numbered: bool = False) -> None:
        """Draw the conversation so far, or the last turns of it, and where the context begins."""
        offset, turns = self.transcript.offset, self.transcript.turns
        first = offset if most is None else max(offset, len(turns) - most)
        if first > offset:
            self.display.note(f"… {first - offset} earlier turns")
        roles = dict(zip(("user", "assistant"), self.transcript.roles, strict=True))
        numbers = {place: n for n, place in enumerate(self.transcript.questions(), 1)}
        line = self.num_outside if self.options.with_history else len(turns)
        for place in range(first, len(turns)):
            if place == line > offset:
                self.display.note(CONTEXT_LINE)
            turn = turns[place]
            number = f"[{numbers[place]}] " if are_numbered and place in numbers else ""
            self.display.turn(number + roles[turn.role], turn.content)
        if line == len(turns) > first:
            self.display.note(CONTEXT_LINE)

    def begin_anew(self) -> None:
        """Keep the chat until now; what comes is another."""
        self.save_turns()
        self.num_outside = 0
        if self.kept is not None:
            self.kept.begin_anew()
