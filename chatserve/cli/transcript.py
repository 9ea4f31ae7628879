"""The turns of one conversation, and FastChat's JSON file of them.

Knows messages only: no terminal, no HTTP, no chat template.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatserve.errors import UsageError

MAX_FILE_BYTES = 64 * 1024 * 1024
_DEFAULT_ROLES = ("USER", "ASSISTANT")


@dataclass(frozen=True)
class Turn:
    """One message; `is_partial` marks an answer that was stopped or broke off."""

    role: str  # "user" or "assistant"
    content: str
    is_partial: bool = False


@dataclass
class Transcript:
    """A conversation: an optional system message and turns in order.

    `roles`, `template_name` and `offset` are what FastChat's file says beside them; the first
    `offset` turns are a template's examples, part of the prompt but never removed.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    roles: tuple[str, str] = _DEFAULT_ROLES
    template_name: str = ""
    offset: int = 0

    def messages(self, *, with_history: bool = True) -> list[dict[str, str]]:
        """What a request carries; `with_history=False` leaves only the system and last message.

        A question whose answer was stopped before its first token is left out: two questions in a
        row are a conversation that no template was trained on.
        """
        head = [{"role": "system", "content": self.system}] if self.system else []
        turns = [self.turns[place] for place in self.sent(with_history=with_history)]
        return head + [{"role": turn.role, "content": turn.content} for turn in turns]

    def sent(self, *, with_history: bool = True) -> list[int]:
        """The places of the turns that `messages` has, behind the system message."""
        if with_history:
            return list(self._sendable())
        is_begun = bool(self.turns) and self.turns[-1].role == "assistant"
        return list(range(len(self.turns)))[-2 if is_begun else -1 :]

    def ask(self, question: str) -> None:
        self.turns.append(Turn("user", question))

    def answer(self, text: str, *, is_partial: bool) -> None:
        self.turns.append(Turn("assistant", text, is_partial))

    def go_on(self, text: str, *, is_partial: bool) -> None:
        """Add to the last answer, which had broken off."""
        begun = self.turns.pop()
        self.turns.append(Turn("assistant", begun.content + text, is_partial))

    def questions(self) -> list[int]:
        """The places of the questions, those of a template's examples left out."""
        behind = range(self.offset, len(self.turns))
        return [place for place in behind if self.turns[place].role == "user"]

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.turns.clear()
        self.offset = 0

    def remove_last(self) -> bool:
        """Take the last question and its answer back; False when there is none."""
        before = len(self.turns)
        self._pop("assistant")
        self._pop("user")
        return len(self.turns) < before

    def take_last_question(self) -> str | None:
        """Remove the last answer and its question and return the question, to ask it again."""
        if not self.turns[self.offset :]:
            return None
        answer = self._pop("assistant")
        question = self._pop("user")
        if question is None and answer is not None:
            self.turns.append(answer)
        return question.content if question else None

    def save(self, file: str) -> tuple[Path, bool]:
        """Write FastChat's JSON, whole or not at all; `.json` is added to a name without a suffix.

        Returns where it went, and whether that replaced a file. Raises `UsageError` when the file
        cannot be written.
        """
        path = path_of(file, "save to")
        if path.name and "." not in path.name:
            path = path.with_name(path.name + ".json")
        text = json.dumps(self._as_json(), ensure_ascii=False, indent=1) + "\n"
        return write_file(path, text, "save")

    @classmethod
    def load(cls, file: str) -> Transcript:
        """Read a conversation that FastChat or `save` wrote.

        Raises `UsageError` when the file cannot be read or is not such a conversation.
        """
        path = path_of(file, "load")
        if not os.path.exists(path) and os.path.exists(f"{path}.json"):
            path = path.with_name(path.name + ".json")
        try:
            table = json.loads(_read(path).decode("utf-8"))
        except OSError as error:
            raise UsageError(f"cannot load {path}: {_reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"cannot load {path}: it is no JSON that /save or FastChat wrote ({error})"
            ) from error
        return cls._from_json(table, path)

    def _sendable(self) -> Iterator[int]:
        following = [*self.turns[1:], None]
        for place, (turn, after) in enumerate(zip(self.turns, following, strict=True)):
            is_unanswered = after is not None and not after.content
            if turn.content and not (turn.role == "user" and is_unanswered):
                yield place

    def _pop(self, role: str) -> Turn | None:
        if len(self.turns) > self.offset and self.turns[-1].role == role:
            return self.turns.pop()
        return None

    def _as_json(self) -> dict[str, Any]:
        names = dict(zip(("user", "assistant"), self.roles, strict=True))
        return {
            "template_name": self.template_name,
            "system_message": self.system or "",
            "roles": list(self.roles),
            "messages": [[names[turn.role], turn.content] for turn in self.turns],
            "offset": self.offset,
        }

    @classmethod
    def _from_json(cls, table: Any, path: Path) -> Transcript:
        try:
            roles = (str(table["roles"][0]), str(table["roles"][1]))
            names = {roles[0]: "user", roles[1]: "assistant"}
            turns = [
                Turn(names[role], _text(content or ""), is_partial=content is None)
                for role, content in table["messages"]
            ]
            offset = int(table.get("offset", 0))
            system = _text(table.get("system_message") or "") or None
            template_name = _text(table.get("template_name") or "")
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UsageError(
                f"{path} is not a conversation: it needs roles and messages as FastChat's "
                f"!!save writes them"
            ) from error
        return cls(system, turns, roles, template_name, min(max(offset, 0), len(turns)))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def path_of(file: str, deed: str) -> Path:
    """The path that a user has typed. Raises `UsageError`."""
    try:
        return Path(file).expanduser()
    except RuntimeError as error:  # the home of a user whom nobody knows
        raise UsageError(f"cannot {deed} {file}: {_reason(error)}") from error


def _read(path: Path) -> bytes:
    """A whole file that may be a conversation. Raises `OSError`, and `UsageError`."""
    # a pipe that nobody writes to would be waited for, and a device may have no end
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UsageError(f"cannot load {path}: it is no file")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is over {MAX_FILE_BYTES} bytes: not a conversation")
    return data


def write_file(path: Path, text: str, deed: str) -> tuple[Path, bool]:
    """Write a whole file, or nothing. Returns where it went, and whether that replaced another.

    Raises `UsageError`, in which `deed` is what cannot be done.
    """
    try:
        has_replaced = os.path.lexists(path)
        _replace(path, text)
    except (OSError, ValueError) as error:  # half a character, or a name with a zero byte
        raise UsageError(f"cannot {deed} to {path}: {_reason(error)}") from error
    return path, has_replaced


def _replace(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a crash leaves the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
