"""Messages or text to token ids that fit the context. Knows no HTTP schema.

Nothing is cut away in silence: what does not fit is refused with the numbers. Old turns give way
only where that is asked for, and it is said which.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.engine.continuation import render_open
from chatserve.engine.rolling import Rolled, Turns, most_that_fit
from chatserve.errors import ContextLengthExceeded, InvalidRequest
from chatserve.models.templates import ChatTemplate
from chatserve.models.templates.tools import (
    ToolCall,
    ToolDefinitions,
    has_tools,
    tool_format_of,
    with_tools,
)
from chatserve.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_RESERVE = 1024

# "developer" is OpenAI's newer name for "system".
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One message of a chat, its content as plain text.

    tool_calls: what the assistant has asked for. tool_call_id and name: the call whose result a
    message of the role `tool` is, and its tool.
    """

    role: str
    content: str
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None


class PromptBuilder:
    """Builds the prompts of one model.

    system_message: put in front of chats that bring no system message of their own. stop and
    stop_token_ids: what ends an answer beside the tokenizer's own end ids. tool_format: how answers
    call tools; tool_control_id: the special token that may come before, if any; tool_marks: special
    tokens within. vocab_size: rows of the model's embedding, where they are known; a tokenizer may
    have more tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        context_length: int,
        system_message: str | None = None,
        *,
        model_name: str = "the model",
        vocab_size: int | None = None,
    ) -> None:
        self.context_length = context_length
        self.stop = template.stop
        self.stop_token_ids = tuple(
            tokenizer.special_ids[text]
            for text in template.stop_tokens
            if text in tokenizer.special_ids
        )
        self.tool_format = tool_format_of(template)
        control = self.tool_format.control
        self.tool_control_id = tokenizer.special_ids.get(control) if control else None
        ids = {mark: tokenizer.special_ids.get(mark) for mark in self.tool_format.marks}
        self.tool_marks = {
            mark: token_id
            for mark, token_id in ids.items()
            # others are text like any
            if token_id is not None and not tokenizer.token_bytes(token_id)
        }
        self._tokenizer = tokenizer
        self._template = template
        self._system_message = system_message
        self._model_name = model_name
        self._vocab_size = vocab_size
        for text in template.stop_tokens:
            if text not in tokenizer.special_ids:
                logger.warning(
                    "the chat template %s ends answers with %r, which the vocabulary of %s lacks; "
                    "if answers do not end, choose another with --conv-template",
                    template.name, str(text), model_name,
                )  # fmt: skip

    def chat(
        self,
        messages: Sequence[Message],
        *,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> list[int]:
        """Ids of a chat that an answer of the assistant continues.

        `is_open`: the last message is the beginning of that answer. `tools`: OpenAI's definitions
        of what that answer may call. Raises `InvalidRequest`, and
        `ContextLengthExceeded` when no room for an answer is left.
        """
        turns = self._checked_chat(messages, is_open=is_open)
        ids = self._chat_ids(turns, is_open=is_open, tools=tools)
        self._check_length(len(ids), "messages", "shorten the messages")
        return ids

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> list[int]:
        """Ids of a chat of any length; without `add_generation_prompt` of what has been said."""
        if is_open:
            turns = self._checked_chat(messages, is_open=True)
            return self._chat_ids(turns, is_open=True, tools=tools)
        turns = self._checked(messages, may_end_with_answer=not add_generation_prompt)
        return self._chat_ids(turns, add_generation_prompt=add_generation_prompt, tools=tools)

    def rolling_chat(
        self,
        messages: Sequence[Message],
        asked: int | None,
        *,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> Rolled:
        """The same, but the oldest turns give way until `asked` tokens of an answer have room.

        Without `asked` it is a quarter of the context, at most 1,024 tokens, and less where the
        last turn alone leaves less. Raises as `chat` does where even that does not fit.
        """
        turns = self._checked_chat(messages, is_open=is_open)
        whole = self._chat_ids(turns, is_open=is_open, tools=tools)
        reserve = min(self.context_length // 4, _MAX_RESERVE) if asked is None else asked
        room = self.context_length - max(1, reserve)
        if len(whole) <= room:
            return Rolled(whole)
        order = Turns([turn.role for turn in turns])
        built: dict[int, list[int]] = {}

        def ids_of(num_kept: int) -> list[int]:
            if num_kept not in built:
                kept = [turns[i] for i in order.places(num_kept)]
                built[num_kept] = self._chat_ids(kept, is_open=is_open, tools=tools)
            return built[num_kept]

        last = ids_of(1)
        if len(last) > room:
            self._check_last_turn(len(last), asked)
            num_kept = 1
        else:
            num_kept = most_that_fit(order.count, lambda number: len(ids_of(number)) <= room)
        ids = ids_of(num_kept)
        return Rolled(ids, order.dropped(num_kept), len(whole) - len(ids))

    def completion(self, prompt: str | Sequence[int], *, is_answered: bool = True) -> list[int]:
        """Ids of a prompt to be continued: text, which is never read as special tokens, or ids.

        One that is not to be answered may fill the context. Raises `InvalidRequest`, and
        `ContextLengthExceeded` when no room for an answer is left.
        """
        if isinstance(prompt, str):
            _check_unicode(prompt, "prompt")
            ids = self._tokenizer.encode(prompt, add_bos=self._tokenizer.adds_bos)
        else:
            ids = self._checked_ids(prompt)
        if not ids:
            raise InvalidRequest("the prompt is empty; send text or token ids", param="prompt")
        self._check_known(ids, "prompt")
        if is_answered or len(ids) > self.context_length:
            self._check_length(len(ids), "prompt", "shorten it")
        return ids

    def max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        """How many tokens may be generated: `asked`, 0 to only read the prompt, or what is left.

        Raises `ContextLengthExceeded` when `asked` does not fit.
        """
        rest = self.context_length - num_prompt_tokens
        if asked is None:
            return rest
        if asked < 0:
            raise InvalidRequest(f"max_tokens is {asked}; it cannot be below 0", param="max_tokens")
        if asked > rest:
            raise ContextLengthExceeded(
                f"prompt has {num_prompt_tokens:,} tokens and max_tokens is {asked:,}, together "
                f"{num_prompt_tokens + asked:,}; {self._model_name} holds "
                f"{self.context_length:,}; ask for at most {rest:,} or shorten the prompt",
                param="max_tokens",
            )
        return asked

    def _checked_chat(self, messages: Sequence[Message], *, is_open: bool) -> list[Message]:
        turns = self._checked(messages, may_end_with_answer=is_open)
        if is_open and turns[-1].role != "assistant":
            raise InvalidRequest(
                "continue_final_message needs a last message of the assistant",
                param=f"messages[{len(turns) - 1}].role",
            )
        return turns

    def _chat_ids(
        self,
        turns: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        is_open: bool = False,
        tools: ToolDefinitions = (),
    ) -> list[int]:
        template = self._template
        if tools or has_tools(turns):
            template = with_tools(template, tools)
        if self._system_message is not None and turns[0].role != "system":
            turns = [Message("system", self._system_message), *turns]
        if is_open:
            rendered = render_open(template, turns)
        else:
            rendered = template.render(turns, add_generation_prompt=add_generation_prompt)
        ids = self._tokenizer.encode(
            rendered, add_bos=self._template.adds_bos and self._tokenizer.adds_bos
        )
        if not ids:
            raise InvalidRequest(
                f"the chat template {self._template.name} turns this chat into an empty prompt; "
                "send a message with text",
                param="messages",
            )
        self._check_known(ids, "messages")
        return ids

    def _checked(
        self, messages: Sequence[Message], *, may_end_with_answer: bool = False
    ) -> list[Message]:
        if not messages:
            raise InvalidRequest("messages is empty; send at least one", param="messages")
        turns = []
        for index, message in enumerate(messages):
            role = _ROLES.get(message.role)
            if role is None:
                raise InvalidRequest(
                    f"messages[{index}].role is {message.role!r}; supported: {', '.join(_ROLES)}",
                    param=f"messages[{index}].role",
                )
            _check_unicode(message.content, f"messages[{index}].content")
            turns.append(
                Message(
                    role, message.content, message.tool_calls, message.tool_call_id, message.name
                )
            )
        if turns[-1].role == "assistant" and not may_end_with_answer:
            raise InvalidRequest(
                "the last message is the assistant's; end the chat with a user message, or ask for "
                "continue_final_message",
                param=f"messages[{len(turns) - 1}].role",
            )
        return turns

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        vocab_size = self._tokenizer.vocab_size
        for index, token_id in enumerate(ids):
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequest(
                    f"prompt[{index}] is {token_id!r}, not a token id", param="prompt"
                )
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"prompt[{index}] is {token_id}; token ids of {self._model_name} go from 0 to "
                    f"{vocab_size - 1}",
                    param="prompt",
                )
        return list(ids)

    def _check_known(self, ids: Sequence[int], param: str) -> None:
        if self._vocab_size is not None and max(ids) >= self._vocab_size:
            raise InvalidRequest(
                f"the tokenizer makes the token id {max(ids)} of this {param}, {self._model_name} "
                f"has only {self._vocab_size}; the tokenizer's files are another model's",
                param=param,
            )

    def _check_last_turn(self, num_tokens: int, asked: int | None) -> None:
        """Of a chat that has nothing left to drop."""
        wanted = 1 if asked is None else asked
        if num_tokens + wanted <= self.context_length:
            return
        limit, way_out = "", "shorten the last message"
        if asked is not None:
            limit = f" and max_tokens is {asked:,}, together {num_tokens + asked:,}"
            way_out += " or ask for fewer"
        raise ContextLengthExceeded(
            f"the last turn, with the system message, has {num_tokens:,} tokens{limit}; "
            f"{self._model_name} holds {self.context_length:,} and only earlier turns are dropped; "
            f"{way_out}",
            param="messages",
        )

    def _check_length(self, num_tokens: int, param: str, way_out: str) -> None:
        if num_tokens >= self.context_length:
            room = ", which leaves none for an answer" * (num_tokens == self.context_length)
            raise ContextLengthExceeded(
                f"prompt has {num_tokens:,} tokens, {self._model_name} holds "
                f"{self.context_length:,}{room}; {way_out}",
                param=param,
            )


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} holds half of a surrogate pair at character {error.start}, which is not "
            "valid Unicode",
            param=param,
        ) from None
