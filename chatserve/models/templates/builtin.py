"""The built-in templates: data only. The strings are wire format, byte for byte.

Sources: FastChat's conversation templates and trainer (Vicuna, Koala, Alpaca, Llama 2 and 3), the
public StackLLaMA demo, OpenAI's ChatML.
"""

from __future__ import annotations

import re

from chatserve.models.special_tokens import Special
from chatserve.models.templates import ChatTemplate
from chatserve.models.templates.plain import (
    ColonTemplate,
    HeaderTemplate,
    Llama2Template,
    QuestionTemplate,
    RoleMarks,
)

_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_EOS = Special("</s>")

# "USER:" in content becomes "USER :".
_USER_MARKS = RoleMarks(re.compile(r"\b(USER|ASSISTANT)(?=:)"), r"\1 ")
_GPT_MARKS = RoleMarks(re.compile(r"\b(USER|GPT)(?=:)"), r"\1 ")
# "### Human:" becomes "## # Human:", "###Assistant:" becomes "## #Assistant:".
_HASH_MARKS = RoleMarks(re.compile(r"###(?=\s*(?:Human|Assistant)\s*:)"), "## #")
_ALPACA_MARKS = RoleMarks(re.compile(r"###(?=\s*(?:Instruction|Response)\s*:)"), "## #")
# "[INST]" becomes "[ INST]", "<<SYS>>" becomes "< <SYS>>".
_INST_MARKS = RoleMarks(re.compile(r"(\[|<)(?=/?INST\]|</?SYS>>)"), r"\1 ")
# A line that starts "Question:" starts "Question :" instead.
_QUESTION_MARKS = RoleMarks(re.compile(r"(^|[\r\n])([ \t]*(?:Question|Answer))(?=:)"), r"\1\2 ")


def _vicuna_v0(name: str, separator: str) -> ColonTemplate:
    return ColonTemplate(
        name=name,
        system=_SYSTEM.format("human"),
        user="Human",
        assistant="Assistant",
        after_system=separator,
        after_user=separator,
        after_assistant=separator,
        marks=_HASH_MARKS,
        stop=("###",),
        stop_tokens=("</s>",),
    )


_TEMPLATES: tuple[ChatTemplate, ...] = (
    ColonTemplate(
        name="vicuna_v1.1",
        system=_SYSTEM.format("user"),
        user="USER",
        assistant="ASSISTANT",
        after_system=" ",
        after_user=" ",
        after_assistant=_EOS,
        marks=_USER_MARKS,
        stop_tokens=("</s>",),
    ),
    _vicuna_v0("vicuna_v0", "\n### "),
    _vicuna_v0("vicuna_v0_a", "###"),
    QuestionTemplate(
        name="stackllama",
        marks=_QUESTION_MARKS,
        stop=("\nQuestion:",),
        stop_tokens=("</s>",),
    ),
    HeaderTemplate(
        name="chatml",
        header_start=Special("<|im_start|>"),
        header_end="\n",
        before_content="",
        end=Special("<|im_end|>"),
        after_end="\n",
        stop_tokens=("<|im_end|>",),
    ),
    Llama2Template(name="llama-2", marks=_INST_MARKS),
    HeaderTemplate(
        name="llama-3",
        header_start=Special("<|start_header_id|>"),
        header_end=Special("<|end_header_id|>"),
        before_content="\n\n",
        end=Special("<|eot_id|>"),
        strips_content=True,
        stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
    ),
    ColonTemplate(
        name="alpaca",
        system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
        user="### Instruction",
        assistant="### Response",
        after_system="\n\n",
        after_user="\n\n",
        after_assistant=_EOS,
        marks=_ALPACA_MARKS,
        stop_tokens=("</s>",),
    ),
    ColonTemplate(
        name="koala_v1",
        system="BEGINNING OF CONVERSATION:",
        user="USER",
        assistant="GPT",
        after_system=" ",
        after_user=" ",
        after_assistant=_EOS,
        marks=_GPT_MARKS,
        stop_tokens=("</s>",),
    ),
)

ALIASES = {
    "vicuna_v1.3": "vicuna_v1.1",
    "vicuna_v1.5": "vicuna_v1.1",
    "zero_shot": "vicuna_v0",
}
BUILTIN: dict[str, ChatTemplate] = {template.name: template for template in _TEMPLATES}
