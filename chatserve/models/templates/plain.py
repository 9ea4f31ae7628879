"""The kinds of built-in templates. Their texts are data in `builtin.py`.

A message's content is always ordinary text; where roles are written as text too (Vicuna,
StackLLaMA …), content that imitates one is changed by one space so that it cannot forge a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import Rendered, Special
from chatserve.models.templates import ChatMessage


@dataclass(frozen=True)
class RoleMarks:
    """Texts that would open a turn, and how content that holds one is defused."""

    pattern: re.Pattern[str]
    replacement: str

    def escape(self, content: str) -> str:
        """Content without markers comes back unchanged."""
        return self.pattern.sub(self.replacement, content)


@dataclass(frozen=True)
class ColonTemplate:
    """`SYSTEM` and then `ROLE: text` per turn; an open turn is `ROLE:`."""

    name: str
    system: str
    user: str
    assistant: str
    after_system: str
    after_user: str
    after_assistant: str | Special
    marks: RoleMarks
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    adds_bos: bool = True

    @property
    def special_tokens(self) -> tuple[str, ...]:
        token = self.after_assistant
        return (token,) if isinstance(token, Special) else ()

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        system, turns = split_system(self.name, messages)
        system = self.system if system is None else self.marks.escape(system)
        rendered: Rendered = (
            [system, self.after_system] if system else [self.after_system.lstrip(" \n")]
        )
        for turn in turns:
            is_user = turn.role == "user"
            label = self.user if is_user else self.assistant
            rendered.append(f"{label}: {self.marks.escape(turn.content)}")
            rendered.append(self.after_user if is_user else self.after_assistant)
        if add_generation_prompt:
            rendered.append(f"{self.assistant}:")
        return rendered


@dataclass(frozen=True)
class HeaderTemplate:
    """Each message between special tokens: header with the role, content, end."""

    name: str
    header_start: Special
    header_end: str | Special
    before_content: str
    end: Special
    after_end: str = ""
    strips_content: bool = False
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    adds_bos: bool = True

    @property
    def special_tokens(self) -> tuple[str, ...]:
        parts = (self.header_start, self.header_end, self.end)
        return tuple(part for part in parts if isinstance(part, Special))

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        rendered: Rendered = []
        for message in messages:
            content = message.content.strip() if self.strips_content else message.content
            rendered += [*self._header(message.role), content, self.end, self.after_end]
        if add_generation_prompt:
            rendered += self._header("assistant")
        return rendered

    def _header(self, role: str) -> Rendered:
        return [self.header_start, role, self.header_end, self.before_content]


@dataclass(frozen=True)
class Llama2Template:
    """`[INST] question [/INST] answer </s><s>`, the system message inside the first question."""

    name: str
    marks: RoleMarks
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ("</s>",)
    special_tokens: tuple[str, ...] = ("<s>", "</s>")
    adds_bos: bool = True

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        system, turns = split_system(self.name, messages)
        rendered: Rendered = []
        for index, turn in enumerate(turns):
            if (turn.role == "user") != (index % 2 == 0):
                raise InvalidRequest(
                    f"the template {self.name} needs user and assistant messages in turn, "
                    "a user's first",
                    param="messages",
                )
            text = self.marks.escape(turn.content)
            if turn.role == "assistant":
                rendered += [f"[/INST] {text} ", Special("</s>"), Special("<s>")]
                continue
            if index == 0 and system:
                text = f"<<SYS>>\n{self.marks.escape(system)}\n<</SYS>>\n\n{text}"
            rendered.append(f"[INST] {text} ")
        if add_generation_prompt:
            rendered.append("[/INST]")
        return rendered


@dataclass(frozen=True)
class QuestionTemplate:
    """One question, one answer: system message and earlier turns become part of the question."""

    name: str
    marks: RoleMarks
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    adds_bos: bool = True

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        texts = [self.marks.escape(message.content) for message in messages if message.content]
        question = "Question: " + "\n\n".join(texts)
        return [question + "\n\nAnswer:" if add_generation_prompt else question]


def split_system(
    template: str, messages: Sequence[ChatMessage]
) -> tuple[str | None, Sequence[ChatMessage]]:
    """The system message (None without one; several are joined by a blank line) and the turns.

    Raises `InvalidRequest` for a system message after the first turn: there is no place for it.
    """
    start = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    for index in range(start, len(messages)):
        if messages[index].role == "system":
            raise InvalidRequest(
                f"messages[{index}] is a system message in the middle of the chat; the template "
                f"{template} takes one at the start only",
                param=f"messages[{index}].role",
            )
    system = "\n\n".join(m.content for m in messages[:start]) if start else None
    return system, messages[start:]
