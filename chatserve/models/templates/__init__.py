"""Chat templates: messages in, special tokens and text out. Knows no token ids and no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # the process that renders models' own templates has no need of tokenizers
    from chatserve.models.special_tokens import Rendered


class ChatMessage(Protocol):
    """One message of a chat; roles are `system`, `user` and `assistant`."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class ChatTemplate(Protocol):
    """How one family of models wants a chat written.

    adds_bos: whether the tokenizer's BOS goes in front. stop: texts that end an answer.
    stop_tokens: special tokens that end one, beside the tokenizer's own. special_tokens: those that
    the vocabulary must have.
    """

    @property
    def name(self) -> str: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def stop_tokens(self) -> tuple[str, ...]: ...

    @property
    def special_tokens(self) -> tuple[str, ...]: ...

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        """The prompt. Raises `InvalidRequest` for a chat that the template has no form for."""
        ...
