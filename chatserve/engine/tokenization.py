"""Text to token ids of any length and back, for clients that count and look. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from chatserve.engine.no_answers import NoAnswers
from chatserve.engine.prompt import Message, PromptBuilder
from chatserve.errors import InvalidRequest
from chatserve.models.templates.tools import ToolDefinitions
from chatserve.models.tokenizer import Tokenizer

MAX_BYTES_PER_TOKEN = 16
"""Of a text that may fit: looking at that is cheaper than the tokenizer, whose time grows with the
text."""


class Tokenization:
    """The tokens of one model. `vocab_size`: rows of its embedding, which may have padding.

    `is_encoder`: texts begin, too, as the vocabulary's own rules have it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: PromptBuilder | NoAnswers,
        vocab_size: int,
        *,
        is_encoder: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._num_ids = max(vocab_size, tokenizer.vocab_size)
        self._before, self._after = tokenizer.frame
        if not is_encoder:
            is_begun = tokenizer.adds_bos and tokenizer.bos_id is not None
            self._before = (tokenizer.bos_id or 0,) if is_begun else ()

    @property
    def num_ending(self) -> int:
        """How many tokens end an embedded text."""
        return len(self._after)

    def of_embedded(self, text: str) -> list[int]:
        """As of a whole text, which nothing continues: some models end it with a token of its own.

        Raises as `of_text` does.
        """
        ids = self._tokenizer.encode(text, add_bos=False)
        return [*self._before, *ids, *self._after]

    def of_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As of a prompt to be continued: text, which is never read as special tokens.

        Of a model that continues none as of an embedded one. Raises `InvalidRequest` for what is no
        Unicode.
        """
        if add_special_tokens and isinstance(self._prompts, NoAnswers):
            return self.of_embedded(text)
        add_bos = add_special_tokens and self._tokenizer.adds_bos
        return self._tokenizer.encode(text, add_bos=add_bos)

    def of_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> list[int]:
        """What the network reads of a chat; without `add_generation_prompt` it may end anyhow.

        `is_open`: the last message is the beginning of the answer. Raises `InvalidRequest` for a
        chat that the template has no form for.
        """
        return self._prompts.chat_ids(
            messages, add_generation_prompt=add_generation_prompt, is_open=is_open, tools=tools
        )

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; special tokens as they are written.

        Bytes that are no character become U+FFFD. Raises `InvalidRequest` for an unknown id.
        """
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < self._num_ids:
                raise InvalidRequest(
                    f"tokens: there is no token {token_id}, the vocabulary has {self._num_ids:,}",
                    param="tokens",
                )
        return self._tokenizer.decode(ids, shows_special=not skip_special_tokens)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return [self._tokenizer.piece(token_id) for token_id in ids]
