"""Chats with tools: templates that know them, judged by transformers, and all others in words."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from chatserve.engine.prompt import Message, PromptBuilder
from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import AddedToken, Rendered, Special, SpecialTokens
from chatserve.models.templates import ChatTemplate
from chatserve.models.templates.builtin import BUILTIN
from chatserve.models.templates.jinja import JinjaTemplate
from chatserve.models.templates.tools import has_tools, tool_format_of, with_tools
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from chatserve.models.tool_format import (
    DEEPSEEK,
    DEEPSEEK_FENCED,
    GLM,
    GLM_DENSE,
    LLAMA_3,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_IDS,
    NEMOTRON,
    QWEN_XML,
    TAGS,
    WORDS,
    ToolFormat,
    recognise,
)
from chatserve.protocol.tools import ToolCall
from tests.unit.models import tool_sources
from tests.unit.models.test_chat_template_jinja import LLAMA, QWEN, SMOL
from tests.unit.models.test_chat_template_jinja import MISTRAL as OLD_MISTRAL
from tests.unit.models.vocabularies import save_byte_level, transformers_tokenizer

HERMES_TOOLS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n\\nReturn a call as <tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set tool_call = tool_call.function %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""  # noqa: E501
LLAMA_TOOLS = """{{- bos_token }}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}{{- raise_exception("only one") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson }}{{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools is not none %}
            {{- 'Respond in the format {"name": function name, "parameters": dictionary}.\\n\\n' }}
            {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
        {%- endif %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL_TOOLS = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools and loop.last %}
            {{- "[AVAILABLE_TOOLS] " }}{{- tools | tojson }}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception("nine characters") }}{%- endif %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message.role == "assistant" %}
        {{- " " + message.content + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
SOURCES = {
    "hermes": HERMES_TOOLS, "llama": LLAMA_TOOLS, "mistral": MISTRAL_TOOLS, **tool_sources.SOURCES
}  # fmt: skip
SPECIAL = {
    "hermes": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
              "<|python_tag|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    **tool_sources.SPECIAL,
}  # fmt: skip
PLAIN = {"hermes": ["<tool_call>", "</tool_call>"], **tool_sources.PLAIN}
FORMATS = {
    "hermes": TAGS, "llama": LLAMA_3, "mistral": MISTRAL, "qwen-xml": QWEN_XML, "glm": GLM,
    "glm-dense": GLM_DENSE, "mistral-args": MISTRAL_ARGS, "mistral-ids": MISTRAL_IDS,
    "deepseek": DEEPSEEK, "deepseek-fenced": DEEPSEEK_FENCED, "nemotron": NEMOTRON,
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", SOURCES)

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "The weather — now.", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "enum": ["Zürich", "<x>"]}},
            "required": ["city"]}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


def call(call_id: str = "abcdefghi", /, **arguments: Any) -> ToolCall:
    return ToolCall(call_id, "get_weather", arguments)


CHAT = [
    Message("user", "Weather in Zürich?"),
    Message("assistant", "", [call(city="Zürich 🙂")]),
    Message("tool", '{"celsius": 4}', tool_call_id="abcdefghi", name="get_weather"),
    Message("assistant", "Cold."),
    Message("user", "And now?"),
]


@functools.cache
def folder_of(family: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    save_byte_level(
        folder, special=SPECIAL[family], plain=PLAIN.get(family, []),
        bos_token=SPECIAL[family][0], eos_token=SPECIAL[family][1], chat_template=SOURCES[family],
    )  # fmt: skip
    return folder


@functools.cache
def ours_of(family: str) -> tuple[Tokenizer, JinjaTemplate]:
    tokenizer = load_tokenizer(folder_of(family))
    markers = tokenizer.special_tokens
    return tokenizer, JinjaTemplate("own", SOURCES[family], markers, tokenizer.names)


def our_ids(family: str, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
    tokenizer, template = ours_of(family)
    return tokenizer.encode(with_tools(template, tools).render(messages), add_bos=False)


def judge_ids(family: str, messages: list[Message], tools: list[dict[str, Any]]) -> Any:
    chat = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "id": each.call_id,
                 "function": {"name": each.name, "arguments": each.arguments}}
                for each in message.tool_calls
            ]  # fmt: skip
        if message.role == "tool":
            turn |= {"tool_call_id": message.tool_call_id, "name": message.name}
        chat.append(turn)
    return transformers_tokenizer(folder_of(family)).apply_chat_template(
        chat, tools=tools or None, tokenize=True, return_dict=False, add_generation_prompt=True
    )


@FAMILIES
@pytest.mark.parametrize("tools", [TOOLS, []], ids=["tools", "none"])
def test_a_template_with_its_own_format_is_rendered_as_by_transformers(
    family: str, tools: list[dict[str, Any]]
) -> None:
    for count in (1, 3, 5):
        messages = CHAT[:count]
        assert our_ids(family, messages, tools) == judge_ids(family, messages, tools)
    assert tool_format_of(ours_of(family)[1]) is FORMATS[family]


FORGED = [
    Message("user", "x"),
    Message("assistant", "x", [call(city="x")]),
    Message("tool", "x", tool_call_id="abcdefghi", name="get_weather"),
    Message("user", "x"),
]


@FAMILIES
def test_no_special_token_of_tools_calls_and_results(family: str) -> None:
    tokenizer, _ = ours_of(family)
    special = set(tokenizer.special_ids.values())

    def special_of(messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        return [each for each in our_ids(family, messages, tools) if each in special]

    honest = special_of(FORGED, TOOLS)
    for text in tokenizer.special_ids:
        for bad in (text, f"a{text}b", text[:-1], text[1:], f'"{text}'):
            function = {"name": "f", "description": bad, "parameters": {
                "properties": {bad: {"enum": [bad], "description": bad}}}}  # fmt: skip
            tools = [{"type": "function", "function": function}, TOOLS[1]]
            asked = Message("assistant", "x", [call(**{bad: [bad, {bad: bad}]})])
            told = Message("tool", bad, tool_call_id="abcdefghi", name="get_weather")
            assert special_of([FORGED[0], asked, told, FORGED[3]], tools) == honest, bad
            ids = our_ids(family, [FORGED[0], asked, told, FORGED[3]], tools)
            text = tokenizer.decode(ids, shows_special=True)
            assert json.dumps(bad, ensure_ascii=False) in text


def test_arguments_as_a_text_where_the_template_wants_that() -> None:
    tokenizer, whole = ours_of("deepseek")
    source = tool_sources.DEEPSEEK.replace("arguments | tojson", "arguments + ''")
    template = JinjaTemplate("own", source, tokenizer.special_tokens, tokenizer.names)
    bad = "Bern <｜tool▁call▁end｜>"
    messages = [CHAT[0], Message("assistant", "", [call(city=bad)]), *CHAT[2:]]
    rendered = with_tools(template, TOOLS).render(messages)
    assert rendered == with_tools(whole, TOOLS).render(messages)
    with pytest.raises(InvalidRequest, match="must be a text"):
        broken = source.replace("{{- bos_token }}", "{{ raise_exception('it must be a text') }}")
        JinjaTemplate("own", broken, tokenizer.special_tokens, {}).render(messages)


def test_escapes_do_not_hide_what_keeps_special_tokens_apart() -> None:
    tokens = SpecialTokens([AddedToken("<|im_end|>", 1, special=True)])
    source = '{{ tools | tojson(ensure_ascii=True) }}<tool_call> "name" "arguments"'
    template = JinjaTemplate("own", source, tokens, {})
    text = "".join(with_tools(template, [{"a": "ü <|im_end|> \\ufdd0"}]).render([]))
    assert text.startswith('[{"a": "\\u00fc <|im_end|> \\\\ufdd0"}]')


def test_ids_of_other_servers_are_shortened_where_a_template_wants_that() -> None:
    messages = [
        Message("user", "x"),
        Message("assistant", "", [call("call_1"), call("call_2")]),
        Message("tool", "1", tool_call_id="call_2", name="get_weather"),
    ]
    _, template = ours_of("mistral")
    text = "".join(with_tools(template, TOOLS).render(messages))
    ids = [part[:9] for part in text.split('id": "')[1:]]
    assert len(set(ids)) == 2 and ids[2] == ids[1] and all(each.isalnum() for each in ids)


@pytest.mark.parametrize(
    ("source", "tool_format"),
    [
        (SMOL, None), (LLAMA, None), (OLD_MISTRAL, None), (QWEN, None),
        (HERMES_TOOLS, TAGS), (LLAMA_TOOLS, LLAMA_3), (MISTRAL_TOOLS, MISTRAL),
        (HERMES_TOOLS + "<function=", None), (HERMES_TOOLS + "<arg_key>", None),
        (MISTRAL_TOOLS + "[ARGS]", MISTRAL_ARGS), (MISTRAL_TOOLS + "[CALL_ID]", None),
        (HERMES_TOOLS.replace("tools", "things"), None),
    ],
)  # fmt: skip
def test_formats_are_recognised_by_what_the_template_says(
    source: str, tool_format: ToolFormat | None
) -> None:
    assert recognise(source) is tool_format


SECTION = """\
You can call the tools that are listed here, each with the JSON Schema of its arguments:
<tools>
{"name": "get_weather", "description": "The weather — now.", "parameters": {"type": "object", \
"properties": {"city": {"type": "string", "enum": ["Zürich", "<x>"]}}, "required": ["city"]}}
{"name": "now"}
</tools>
To call one, answer with its name and its arguments as JSON, between these tags:
<tool_call>
{"name": "NAME", "arguments": {...}}
</tool_call>
Another call may follow right behind it. The results come back between <tool_response> and \
</tool_response>. Without need for a tool answer in plain text."""
CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🙂"}}\n</tool_call>'
GIVEN = '<tool_response>\n{"celsius": 4}\n</tool_response>'


def text_of(rendered: Rendered) -> str:
    return "".join(rendered)


def smol() -> JinjaTemplate:
    texts = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = SpecialTokens(AddedToken(text, i, special=True) for i, text in enumerate(texts))
    return JinjaTemplate("own", SMOL, tokens, {})


def test_smollm2_gets_the_tools_in_words() -> None:
    assert tool_format_of(smol()) is WORDS
    assert text_of(with_tools(smol(), TOOLS).render(CHAT)) == (
        f"<|im_start|>system\n{SECTION}<|im_end|>\n"
        "<|im_start|>user\nWeather in Zürich?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALLED}<|im_end|>\n"
        f"<|im_start|>user\n{GIVEN}<|im_end|>\n"
        "<|im_start|>assistant\nCold.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_vicuna_gets_them_behind_its_own_system_message() -> None:
    vicuna = BUILTIN["vicuna_v1.1"]
    own = text_of(vicuna.render([])).removesuffix(" ASSISTANT:")
    assert text_of(with_tools(vicuna, TOOLS).render(CHAT)) == (
        f"{own}\n\n{SECTION} USER: Weather in Zürich? ASSISTANT: {CALLED}</s>"
        f"USER: {GIVEN} ASSISTANT: Cold.</s>USER: And now? ASSISTANT:"
    )
    given = [Message("system", "Be brief."), CHAT[0]]
    assert text_of(with_tools(vicuna, TOOLS).render(given)) == (
        f"Be brief.\n\n{SECTION} USER: Weather in Zürich? ASSISTANT:"
    )


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_template_has_a_place_for_tools(name: str) -> None:
    text = text_of(with_tools(BUILTIN[name], TOOLS).render(CHAT))
    # content that holds a template's own role marks is changed by a space
    assert '"name": "get_weather"' in text and CALLED in text and GIVEN in text
    assert tool_format_of(BUILTIN[name]) is WORDS


def test_history_of_tools_without_tools() -> None:
    text = text_of(with_tools(smol(), []).render(CHAT))
    assert CALLED in text and GIVEN in text and "You can call" not in text
    assert has_tools(CHAT) and not has_tools(CHAT[3:])


def test_results_and_what_is_said_to_them_are_one_message() -> None:
    messages = [
        Message("user", "x"),
        Message("assistant", "Wait.", [call("a", city="x"), call("b")]),
        Message("tool", "1", tool_call_id="a"),
        Message("tool", "2", tool_call_id="b"),
        Message("user", "And?"),
        Message("user", "Well?"),
    ]
    text = text_of(with_tools(BUILTIN["llama-2"], []).render(messages))
    assert text.endswith(
        'Wait.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "x"}}\n'
        '</tool_call><tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call> '
        "</s><s>[INST] <tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>\n"
        "And?\nWell? [/INST]"
    )


def test_a_template_without_system_messages_gets_them_in_the_question() -> None:
    tokens = SpecialTokens([])
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    template = JinjaTemplate("own", source, tokens, {})
    text = text_of(with_tools(template, TOOLS).render(CHAT))
    assert text.startswith(f"[user]{SECTION}\n\nWeather in Zürich?[assistant]{CALLED}[user]")
    with pytest.raises(InvalidRequest, match="no system"):
        with_tools(template, TOOLS).render([Message("system", "x"), *CHAT])


MARKS = ["<tools>", "<tool_call>", "</tool_call>", "</tool_response>"]


@pytest.mark.parametrize(
    ("name", "bad"),
    [*((name, mark) for name in ("chatml", "vicuna_v1.1") for mark in MARKS),
     ("vicuna_v1.1", "USER:"), ("llama-2", "[/INST]"), ("llama-2", "</s>"),
     ("chatml", "<|im_end|>")],
)  # fmt: skip
def test_words_cannot_be_forged(name: str, bad: str) -> None:
    template = BUILTIN[name]

    def rendered(text: str) -> Rendered:
        function = {"name": "f", "description": text, "parameters": {"properties": {text: {}}}}
        messages = [
            Message("system", text), Message("user", text),
            Message("assistant", text, [call(**{text: text})]),
            Message("tool", text, tool_call_id="abcdefghi"), Message("user", text),
        ]  # fmt: skip
        return with_tools(template, [{"type": "function", "function": function}]).render(messages)

    honest, forged = rendered("x"), rendered(bad)
    assert [part for part in forged if isinstance(part, Special)] == [
        part for part in honest if isinstance(part, Special)
    ]
    # a special token that is no `Special` is text
    if bad not in template.special_tokens:
        assert text_of(forged).count(bad) == text_of(honest).count(bad)


def test_json_that_holds_a_mark_says_the_same() -> None:
    text = text_of(with_tools(smol(), []).render([Message("assistant", "", [call(a="<tools>")])]))
    line = next(line for line in text.splitlines() if line.startswith("{"))
    assert json.loads(line)["arguments"] == {"a": "<tools>"} and "<tools>" not in line


def test_tools_reach_the_prompt() -> None:
    tokenizer, template = ours_of("mistral")
    builder = PromptBuilder(tokenizer, template, 4096, "Be brief.")
    assert builder.tool_format is MISTRAL
    assert builder.tool_control_id == tokenizer.special_ids["[TOOL_CALLS]"]
    own: ChatTemplate = BUILTIN["vicuna_v1.1"]
    words = PromptBuilder(tokenizer, own, 4096, "Be brief.")
    assert words.tool_format is WORDS and words.tool_control_id is None
    messages = CHAT[:1]
    whole = words.chat(messages, tools=TOOLS)
    assert tokenizer.decode(whole).startswith(f"Be brief.\n\n{SECTION} USER: Weather")
    assert words.chat_ids(messages, tools=TOOLS) == whole
    assert words.rolling_chat(messages, 10, tools=TOOLS).ids == whole
    opened = words.chat([*messages, Message("assistant", "We")], is_open=True, tools=TOOLS)
    assert tokenizer.decode(opened) == tokenizer.decode(whole) + " We"


@pytest.mark.parametrize("family", ["mistral-args", "deepseek", "glm", "qwen-xml", "hermes"])
def test_marks_without_a_text_are_known_by_their_ids(family: str) -> None:
    tokenizer, template = ours_of(family)
    marks = PromptBuilder(tokenizer, template, 4096).tool_marks
    is_special = family in ("mistral-args", "deepseek")
    assert set(marks) == (set(FORMATS[family].marks) if is_special else set())
    assert marks == {mark: tokenizer.special_ids[mark] for mark in marks}


def test_turns_with_tools_are_dropped_whole() -> None:
    tokenizer, _ = ours_of("hermes")
    words = PromptBuilder(tokenizer, BUILTIN["chatml"], 2000)
    room = len(words.chat([CHAT[4]], tools=TOOLS))
    tight = PromptBuilder(tokenizer, BUILTIN["chatml"], room + 20)
    rolled = tight.rolling_chat(CHAT, 20, tools=TOOLS)
    assert rolled.messages_dropped == (0, 1, 2, 3)
    assert rolled.ids == words.chat([CHAT[4]], tools=TOOLS)
