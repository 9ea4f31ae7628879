"""A chat whose last message is the beginning of the answer: its prompt ends inside that message.

Knows no tokenizer. Whatever a template does with a message's text, its end is found by a mark that
no text has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import Rendered, Special
from chatserve.models.templates import ChatMessage, ChatTemplate

# noncharacters, other ones than Jinja templates are given
_MARKS = [chr(plane << 16 | 0xFFFE) for plane in range(1, 17)]


@dataclass(frozen=True)
class _Marked:
    role: str
    content: str


def render_open(template: ChatTemplate, messages: Sequence[ChatMessage]) -> Rendered:
    """The prompt up to the end of the last message's text; no end of the turn.

    Raises `InvalidRequest` for a template whose open answer is no beginning of a whole one.
    """
    *earlier, last = messages
    if not last.content:
        return template.render(earlier)
    mark = next((mark for mark in _MARKS if not any(mark in m.content for m in messages)), None)
    if mark is None:
        raise InvalidRequest(
            "the messages hold every Unicode noncharacter from U+1FFFE to U+10FFFE; remove them",
            param="messages",
        )
    marked = [*earlier, _Marked(last.role, last.content + mark)]
    opened = _up_to(mark, template.render(marked, add_generation_prompt=False))
    if opened is None or not "".join(opened).startswith("".join(template.render(earlier))):
        raise InvalidRequest(
            f"the chat template {template.name} has no form for an answer that has begun; leave "
            "continue_final_message out",
            param="continue_final_message",
        )
    return opened


def _up_to(mark: str, rendered: Rendered) -> Rendered | None:
    for index, part in enumerate(rendered):
        if not isinstance(part, Special) and mark in part:
            beginning = part[: part.index(mark)]
            return [*rendered[:index], *([beginning] if beginning else [])]
    return None
