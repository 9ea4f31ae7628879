"""The chat: lines, turns and commands, one answer after the other.

Knows the conversation. What it reads from, writes to and talks to is handed in; it starts no
server, makes no HTTP request and writes no escape code. What each command does is in
`chatserve.cli.slash`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from chatserve.cli.answer import Answer
from chatserve.cli.asking import (
    ChatOptions,
    Server,
    ask,
    length_text,
    status_text,
    stream_answer,
    wait_until_ready,
)
from chatserve.cli.lines import Command, parse, unknown_command_text
from chatserve.cli.render import Display, progress_text
from chatserve.cli.slash.table import RUNS
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


class Lines(Protocol):
    def read(self) -> str:
        """The next line. Raises `EOFError` at the end, `KeyboardInterrupt` on Ctrl-C."""


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
        self._hush = hush
        self._clock = clock
        self._last_answer = Answer()
        self._last_model = ""

    def run(self, lines: Lines) -> None:
        """Until the lines end or say `/exit`. Raises `StartupError` when the server has ended."""
        try:
            self._run(lines)
        finally:
            # a Ctrl-C may have come while the last turn was saved
            self.save_turns()

    def _run(self, lines: Lines) -> None:
        while True:
            try:
                if not self._take(lines.read()):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.options.is_typed:
                    raise
                self.display.note("Ctrl-D or /exit leaves")

    def status(self) -> str:
        """One line on the server. Raises `StartupError` when it has ended."""
        if (progress := self.server.progress()) is not None:
            return progress_text(progress)
        return status_text(self.server.model(), self._last_answer)

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
        self.transcript.ask(question)
        answer = Answer()
        with interruptible(), self._hush():
            try:
                self._answer(answer)
            except KeyboardInterrupt:
                self._keep(answer, is_partial=True)
                self.display.note("stopped; /regen asks again")
            except (StartupError, SystemExit):
                self._keep(answer, is_partial=True)
                raise
            except ChatserveError as error:
                self._keep(answer, is_partial=True)
                self.display.error(error.message)
                if error.code == ContextLengthExceeded.code and self.options.is_typed:
                    self.display.note("/clear starts over")
            else:
                self._keep(answer, is_partial=False)
                if answer.finish_reason == "length":
                    model = self.server.model()
                    self.display.note(length_text(answer, self.options, model))

    def _answer(self, answer: Answer) -> None:
        wait_until_ready(self.server, self.display)
        self._last_model = self.server.model().name
        messages = self.transcript.messages(with_history=self.options.with_history)
        deltas = ask(self.server, messages, self.options, answer)
        stream_answer(deltas, self.display, answer, self._clock)

    def _keep(self, answer: Answer, *, is_partial: bool) -> None:
        self.transcript.answer(answer.text, is_partial=is_partial)
        self._last_answer = answer
        self.save_turns()

    def save_turns(self) -> None:
        """Let what keeps this chat hold it as it is now."""
        if self.kept is not None:
            self.kept.keep(self.transcript, self._last_model)

    def show_turns(self, most: int | None = None) -> None:
        """Draw the conversation so far, or the last turns of it."""
        turns = self.transcript.turns[self.transcript.offset :]
        shown = turns[-most:] if most is not None else turns
        if len(shown) < len(turns):
            self.display.note(f"… {len(turns) - len(shown)} earlier turns")
        roles = dict(zip(("user", "assistant"), self.transcript.roles, strict=True))
        for turn in shown:
            self.display.turn(roles[turn.role], turn.content)

    def begin_anew(self) -> None:
        """Keep the chat until now; what comes is another."""
        self.save_turns()
        if self.kept is not None:
            self.kept.begin_anew()
