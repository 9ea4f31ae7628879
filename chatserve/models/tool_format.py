"""How models write the calls of tools. Plain data; knows no request, no grammar and no template."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True)
class ToolFormat:
    """The texts around the names and arguments of the calls in an answer.

    marker: what tells a call from text. follows_text: whether text may stand in front of it; else
    an answer is either. between: from one call to the next; empty where there is only one.
    control: a special token, invisible in the text, that models write before their calls.
    short_ids: whether the template takes only ids of nine letters and digits.
    """

    name: str
    marker: str
    before_name: str
    before_arguments: str
    after_call: str
    between: str = ""
    end: str = ""
    follows_text: bool = False
    control: str | None = None
    short_ids: bool = False


TAGS: Final = ToolFormat(
    name="tags",
    marker="<tool_call>",
    before_name='\n{"name": "',
    before_arguments='", "arguments": ',
    after_call="}\n</tool_call>",
    between='\n<tool_call>\n{"name": "',
    follows_text=True,
)
"""Of Hermes and Qwen."""

WORDS: Final = replace(TAGS, name="words", between='<tool_call>\n{"name": "')
"""Of all models that have no format of their own. Behind a call they would nearly always begin a
new line: if that led to the next call, small ones would never come to an end."""

LLAMA_3: Final = ToolFormat(
    name="llama-3",
    marker='{"name": "',
    before_name="",
    before_arguments='", "parameters": ',
    after_call="}",
    control="<|python_tag|>",
)

MISTRAL: Final = ToolFormat(
    name="mistral",
    marker='[{"name": "',
    before_name="",
    before_arguments='", "arguments": ',
    after_call="}",
    between=', {"name": "',
    end="]",
    control="[TOOL_CALLS]",
    short_ids=True,
)

_TOOLS = re.compile(r"\btools\b")
# a format's signs, and those of others that resemble it
_SIGNS: tuple[tuple[ToolFormat, tuple[str, ...], tuple[str, ...]], ...] = (
    (TAGS, ("<tool_call>", '"name"', '"arguments"'), ("<function=", "<arg_key>", "[TOOL_CALLS]")),
    (MISTRAL, ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), ("[ARGS]", "[CALL_ID]")),
    (LLAMA_3, ('"parameters"', '{"name": ', "ipython"), ("<tool_call>", "[TOOL_CALLS]")),
)


def recognise(source: str) -> ToolFormat | None:
    """The format that a Jinja template shows its model; None for a template without or another."""
    if not _TOOLS.search(source):
        return None
    # in a Jinja string quotes may be escaped
    plain = source.replace('\\"', '"').replace("\\n", "\n")
    for tool_format, signs, others in _SIGNS:
        if all(sign in plain for sign in signs) and not any(other in plain for other in others):
            return tool_format
    return None
