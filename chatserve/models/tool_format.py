"""How models write the calls of tools. Plain data; knows no request, no grammar and no template."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

CALL_ID: Final = "\0" * 9
"""In a format's text: nine letters and digits that the model thinks of."""


@dataclass(frozen=True)
class ArgumentTags:
    """The texts around each argument, in formats that write no JSON object.

    end: the part of `after_value` that no text may hold.
    """

    before_key: str
    after_key: str
    after_value: str
    end: str


@dataclass(frozen=True)
class ToolFormat:
    """The texts around the names and arguments of the calls in an answer.

    marker: what tells a call from text. follows_text: whether text may stand in front of it; else
    an answer is either. between: from one call to the next; empty where there is only one.
    control: a special token, invisible in the text, that models write before their calls.
    marks: parts of the texts that may be special tokens of their own, with which they are meant.
    short_ids: whether the template takes only ids of nine letters and digits. tags: around each
    argument; without them all are one JSON object.
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
    marks: tuple[str, ...] = ()
    short_ids: bool = False
    tags: ArgumentTags | None = None


TAGS: Final = ToolFormat(
    name="tags",
    marker="<tool_call>",
    before_name='\n{"name": "',
    before_arguments='", "arguments": ',
    after_call="}\n</tool_call>",
    between='\n<tool_call>\n{"name": "',
    follows_text=True,
    marks=("<tool_call>", "</tool_call>"),
)
"""Of Hermes and Qwen."""

WORDS: Final = replace(TAGS, name="words", between='<tool_call>\n{"name": "', marks=())
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

MISTRAL_ARGS: Final = ToolFormat(
    name="mistral-args",
    marker="[TOOL_CALLS]",
    before_name="",
    before_arguments="[ARGS]",
    after_call="",
    between="[TOOL_CALLS]",
    follows_text=True,
    marks=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    short_ids=True,
)
"""Of Mistral since its v11 tokenizers."""

MISTRAL_IDS: Final = replace(
    MISTRAL_ARGS, name="mistral-ids", before_arguments=f"[CALL_ID]{CALL_ID}[ARGS]"
)

QWEN_XML: Final = ToolFormat(
    name="qwen-xml",
    marker="<tool_call>",
    before_name="\n<function=",
    before_arguments=">\n",
    after_call="</function>\n</tool_call>",
    between="\n<tool_call>\n<function=",
    follows_text=True,
    marks=("<tool_call>", "</tool_call>"),
    tags=ArgumentTags("<parameter=", ">\n", "\n</parameter>\n", end="</parameter>"),
)
"""Of Qwen3-Coder."""

GLM: Final = ToolFormat(
    name="glm",
    marker="<tool_call>",
    before_name="",
    before_arguments="\n",
    after_call="</tool_call>",
    between="\n<tool_call>",
    follows_text=True,
    marks=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    tags=ArgumentTags("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", end="</arg_value>"),
)
"""Of GLM-4.5."""

GLM_DENSE: Final = replace(
    GLM,
    name="glm-dense",
    before_arguments="",
    between="<tool_call>",
    tags=ArgumentTags("<arg_key>", "</arg_key><arg_value>", "</arg_value>", end="</arg_value>"),
)
"""The same without new lines."""

DEEPSEEK: Final = ToolFormat(
    name="deepseek",
    marker="<｜tool▁calls▁begin｜>",
    before_name="<｜tool▁call▁begin｜>",
    before_arguments="<｜tool▁sep｜>",
    after_call="<｜tool▁call▁end｜>",
    between="<｜tool▁call▁begin｜>",
    end="<｜tool▁calls▁end｜>",
    follows_text=True,
    marks=(
        "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
)  # fmt: skip
"""Of DeepSeek since V3.1."""

DEEPSEEK_FENCED: Final = replace(
    DEEPSEEK,
    name="deepseek-fenced",
    before_name="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    before_arguments="\n```json\n",
    after_call="\n```<｜tool▁call▁end｜>",
    between="\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
)
"""Of DeepSeek V3 and R1."""

NEMOTRON: Final = ToolFormat(
    name="nemotron",
    marker="<TOOLCALL>",
    before_name='[{"name": "',
    before_arguments='", "arguments": ',
    after_call="}",
    between=', {"name": "',
    end="]</TOOLCALL>",
    follows_text=True,
    marks=("<TOOLCALL>", "</TOOLCALL>"),
)

_TOOLS = re.compile(r"\btools\b")
# a format's signs, and those of others that resemble it
_SIGNS: tuple[tuple[ToolFormat, tuple[str, ...], tuple[str, ...]], ...] = (
    (TAGS, ("<tool_call>", '"name"', '"arguments"'),
     ("<function=", "<arg_key>", "[TOOL_CALLS]", "<TOOLCALL>")),
    (QWEN_XML, ("<tool_call>", "<function=", "<parameter=", "</parameter>"), ("[TOOL_CALLS]",)),
    (GLM, ("<tool_call>", "</arg_key>\n<arg_value>"), ("[TOOL_CALLS]",)),
    (GLM_DENSE, ("<tool_call>", "<arg_key>", "<arg_value>"), ("[TOOL_CALLS]",)),
    (MISTRAL, ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), ("[ARGS]", "[CALL_ID]")),
    (MISTRAL_IDS, ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[CALL_ID]", "[ARGS]"), ()),
    (MISTRAL_ARGS, ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[ARGS]"), ()),
    (DEEPSEEK_FENCED, ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"), ()),
    (DEEPSEEK, ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"), ()),
    (NEMOTRON, ("<TOOLCALL>", '"name"', '"arguments"'), ("<tool_call>",)),
    (LLAMA_3, ('"parameters"', '{"name": ', "ipython"), ("<tool_call>", "[TOOL_CALLS]")),
)  # fmt: skip


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
