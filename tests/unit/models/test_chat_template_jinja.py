"""Templates that models bring: transformers' ids for honest chats, no forged turn, no way out."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chatserve.engine.prompt import Message
from chatserve.errors import InvalidRequest, ModelLoadError
from chatserve.models.chat_template import load_template_sources
from chatserve.models.special_tokens import AddedToken, Special, SpecialTokens
from chatserve.models.templates import jinja_bounds, jinja_sandbox
from chatserve.models.templates.jinja import JinjaTemplate
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from tests.hostile_templates import BOMBS, DOUBLING, ENDLESS
from tests.unit.models.test_tokenizer_json import LLAMA3
from tests.unit.models.vocabularies import (
    save_byte_level,
    save_metaspace,
    smollm2,
    transformers_tokenizer,
)

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops earlier thoughts, looks at the ends of what users say, writes JSON, uses a namespace.
QWEN = """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {{- '<|im_start|>system\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'user' %}
        {%- if message.content.startswith('<tool_call>') %}{{- 'TOOL' }}{%- endif %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 == ns.last - 1 %}
            {%- set content = '<think>\\n\\n</think>\\n\\n' + content %}
        {%- endif %}
        {%- generation %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = ["smol", "qwen", "llama", "mistral"]
ROLES = {
    "smol": ["system", "user", "assistant", "user"],
    "qwen": ["system", "user", "assistant", "user", "assistant", "user"],
    "llama": ["system", "user", "assistant", "user"],
    "mistral": ["user", "assistant", "user"],
}


@functools.cache
def folder_of(family: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    if family == "smol":
        save_byte_level(
            folder, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], chat_template=SMOL
        )
    elif family == "qwen":
        save_byte_level(
            folder, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            plain=["<think>", "</think>", "<tool_call>", "</tool_call>"],
            pattern=LLAMA3.replace("{1,3}", ""), nfc=True, chat_template=QWEN,
        )  # fmt: skip
    elif family == "llama":
        special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        special += [f"<|reserved_special_token_{i}|>" for i in range(250)]
        save_byte_level(
            folder, special=special, pattern=LLAMA3, ignore_merges=True,
            bos="<|begin_of_text|>", bos_token="<|begin_of_text|>", chat_template=LLAMA,
        )  # fmt: skip
    else:
        save_metaspace(
            folder, prepend_scheme="first", special=["[INST]", "[/INST]"], chat_template=MISTRAL
        )
    return folder


@functools.cache
def ours_of(family: str) -> tuple[Tokenizer, JinjaTemplate]:
    return template_of(folder_of(family))


@functools.cache
def judge_of(family: str) -> Any:
    return transformers_tokenizer(folder_of(family))


def template_of(folder: Path) -> tuple[Tokenizer, JinjaTemplate]:
    tokenizer = load_tokenizer(folder)
    source = load_template_sources(folder)["default"]
    return tokenizer, JinjaTemplate("own", source, tokenizer.special_tokens, tokenizer.names)


def chat(family: str, contents: Sequence[str]) -> list[Message]:
    return [Message(r, c) for r, c in zip(ROLES[family], contents, strict=False)]


def our_ids(family: str, messages: list[Message], *, add_generation_prompt: bool = True) -> Any:
    tokenizer, template = ours_of(family)
    rendered = template.render(messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode(rendered, add_bos=template.adds_bos)


def judge_ids(family: str, messages: list[Message], *, add_generation_prompt: bool = True) -> Any:
    chat = [{"role": m.role, "content": m.content} for m in messages]
    return judge_of(family).apply_chat_template(
        chat, tokenize=True, return_dict=False, add_generation_prompt=add_generation_prompt
    )


def special_of(family: str, ids: list[int]) -> list[int]:
    special = set(ours_of(family)[0].special_ids.values())
    return [token_id for token_id in ids if token_id in special]


HONEST = [
    ["Hello!"],
    ["You are terse.", "Hello!", "Hi there.", "How are you?"],
    ["  padded  ", "\n\nlines\n\n", " ", "tabs\t\tand  spaces "],
    ["中文", "😀🎉", "naïve", "Привет"],
    ["a < b", "x <", "im_end|> y", "end_header_id|>"],
    ["You think.", "Sum?", "<think>\n1+1\n</think>\n\n2", "Again?", "<think>x</think>3", "ok"],
    ["[INST", "INST] x", "s>", "</s"],
    ["{{ 7 * 7 }}", "{% raw %}", "{# x #}", "}}"],
    ["", "", ""],
]


@pytest.mark.parametrize("contents", HONEST)
@pytest.mark.parametrize("family", FAMILIES)
def test_honest_chat(family: str, contents: list[str]) -> None:
    for count in range(1, len(contents) + 1):
        messages = chat(family, contents[:count])
        for add in (True, False):
            assert our_ids(family, messages, add_generation_prompt=add) == judge_ids(
                family, messages, add_generation_prompt=add
            )


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_honest_chat(family: str, data: st.DataObject) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    messages = chat(family, data.draw(st.lists(text, min_size=1, max_size=6)))
    tokens = ours_of(family)[0].special_ids
    assume(not any(token in message.content for token in tokens for message in messages))
    assert our_ids(family, messages) == judge_ids(family, messages)


@pytest.mark.weights
def test_smollm2_template_from_gguf(tmp_path: Path) -> None:
    from chatserve.models.gguf_file import GGUFFile

    file = GGUFFile.open(smollm2())
    file.close()
    metadata = file.metadata
    tokenizer = load_tokenizer(smollm2(), metadata)
    source = load_template_sources(smollm2(), metadata)["default"]
    template = JinjaTemplate("own", source, tokenizer.special_tokens, tokenizer.names)
    save_smollm2(tmp_path, metadata)
    judge = transformers_tokenizer(tmp_path)
    for contents in HONEST:
        messages = chat("smol", contents)
        ids = tokenizer.encode(template.render(messages), add_bos=template.adds_bos)
        honest = [{"role": m.role, "content": m.content} for m in messages]
        expected = judge.apply_chat_template(
            honest, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert ids == expected


def save_smollm2(folder: Path, metadata: dict[str, Any]) -> None:
    """SmolLM2's tokenizer.json, put together by the library itself."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    library = Library(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    library.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    library.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == 3])
    library.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_special_token_as_content_in_every_role(family: str) -> None:
    tokenizer, _ = ours_of(family)
    roles = ROLES[family]
    expected = special_of(family, our_ids(family, chat(family, ["x"] * len(roles))))
    for text, token in tokenizer.special_tokens.by_text.items():
        for at, role in enumerate(roles):
            if role == "assistant" and not token.special:
                continue
            for forged in (text, f"a{text}b", f" {text}\n{text} "):
                contents = ["x"] * len(roles)
                contents[at] = forged
                ids = our_ids(family, chat(family, contents))
                assert special_of(family, ids) == expected, (text, role)


def test_assistant_keeps_its_own_plain_tokens() -> None:
    tokenizer, _ = ours_of("smol")
    assert not [t for t in tokenizer.special_tokens.by_text.values() if not t.special]
    think = ours_of("qwen")[0].special_ids["<tool_call>"]
    contents = ["x", "y", "<tool_call>", "z"]
    assert think in our_ids("qwen", chat("qwen", contents))
    assert our_ids("qwen", chat("qwen", contents)) == judge_ids("qwen", chat("qwen", contents))


FRAGMENTS = ["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "start|>", "<|", "<", "|>", ">",
             "<think>", "</think>", "<|eot_id|>", "<|eot_", "id|>", "[INST]", "[/INST]", "[", "]",
             "/INST]", "</s>", "<s>", "</", "s>", " ", "\n", "x", "\ufdd0", "\ufdd1"]  # fmt: skip


@pytest.mark.parametrize("family", ["smol", "llama", "mistral"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_scaffold_never_depends_on_content(family: str, data: st.DataObject) -> None:
    fragments = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
    roles = ROLES[family]
    contents = data.draw(st.lists(fragments, min_size=len(roles), max_size=len(roles)))
    ids = our_ids(family, chat(family, contents))
    expected = our_ids(family, chat(family, ["x"] * len(roles)))
    assert special_of(family, ids) == special_of(family, expected)
    rendered = ours_of(family)[1].render(chat(family, contents))
    trim = family == "llama"
    assert all((c.strip() if trim else c) in "".join(rendered) for c in contents)


def small(source: str, *tokens: AddedToken) -> JinjaTemplate:
    markers = tokens or (AddedToken("<|end|>", 1, True),)
    return JinjaTemplate("own", source, SpecialTokens(markers), {"bos_token": "<s>"})


USER = [Message("user", "hi")]
JOINED = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_token_split_over_two_messages_is_no_token() -> None:
    messages = [Message("user", "<|e"), Message("user", "nd|>")]
    assert small(JOINED).render(messages) == ["<|end|>"]
    assert not isinstance(small(JOINED).render(messages)[0], Special)


def test_token_completed_by_the_template_is_no_token() -> None:
    template = small("{{ messages[0].content | trim }}nd|>{{ '<|end|>' }}")
    rendered = template.render([Message("user", "<|e \n")])
    assert rendered == ["<|end|>", "<|end|>"]
    assert [isinstance(part, Special) for part in rendered] == [False, True]


def test_overlapping_tokens_are_all_broken() -> None:
    tokens = [AddedToken("<a>", 1, True), AddedToken("><b>", 2, True), AddedToken("a><", 3, True)]
    for text in ("<a><b>", "<<a><a>><b>", "a><b>"):
        rendered = small(JOINED, *tokens).render([Message("user", text)])
        assert rendered == [text]
        assert not isinstance(rendered[0], Special)


def test_longest_token_wins_in_the_scaffold() -> None:
    tokens = [AddedToken("<a>", 1, True), AddedToken("<a>b", 2, True)]
    assert small("x<a>bc<a>", *tokens).render(USER) == ["x", "<a>b", "c", "<a>"]


def test_noncharacters_in_content_survive() -> None:
    text = "".join(map(chr, range(0xFDD0, 0xFDEF))) + "<|end|>"
    assert small(JOINED).render([Message("user", text)]) == [text]


def test_content_with_every_noncharacter_is_refused() -> None:
    text = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(InvalidRequest, match="noncharacter"):
        small(JOINED).render([Message("user", text)])


def test_helpers_of_transformers_are_there() -> None:
    template = small(
        "{{ strftime_now('%Y')|length }}{{ {'é': '<'}|tojson }}{{ bos_token }}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "\n{% if true %}\nx\n{% endif %}\n"
    )
    assert "".join(template.render(USER)) == '4{"é": "<"}<s>01x\n'


def test_refusal_by_the_template_is_the_request_s_fault() -> None:
    _, template = ours_of("mistral")
    with pytest.raises(InvalidRequest, match="must alternate") as caught:
        template.render([Message("user", "a"), Message("user", "b")])
    assert caught.value.param == "messages"


def test_refusal_that_repeats_content_holds_no_sentinel() -> None:
    template = small("{{ raise_exception(messages[0].content) }}")
    with pytest.raises(InvalidRequest, match=r"this chat: <\|end\|> x$"):
        template.render([Message("user", "<|end|>\n\nx")])


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x",
        "{{ x | nosuchfilter }}",
        "{% include %}",
        "{{ 'a' if }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "x" * (1 << 20) + "y",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
    ids=["for", "open", "filter", "include", "if", "nested", "long", "deep"],
)
def test_template_that_is_no_jinja(source: str) -> None:
    with pytest.raises(ModelLoadError, match="--conv-template"):
        small(source)


@pytest.mark.parametrize("source", BOMBS)
def test_bomb_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template cannot render this chat"):
        small(source).render(USER)


@pytest.mark.parametrize("source", DOUBLING)
def test_value_that_doubles_without_a_loop_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"makes a value of more than [\d,]+ characters"):
        small(source).render(USER)


def test_namespaces_that_hold_each_other_twice_are_not_written_out() -> None:
    step = "{% set n = namespace(a=n, b=n) %}"
    template = small(f"{{% set n = 1 %}}{step * 40}{{{{ n }}}}")
    assert template.render(USER) == ["<Namespace>"]


def test_arithmetic_of_honest_templates_works() -> None:
    assert "".join(small("{{ 3 * 4 }} {{ '-' * 3 }} {{ 2 ** 10 }}").render(USER)) == "12 --- 1024"


def test_long_chats_are_not_taken_for_bombs() -> None:
    text = "word " * 600_000
    assert "".join(small(JOINED).render([Message("user", text)])) == text


def test_rendering_is_repeatable() -> None:
    template = small("{% set ns = namespace(x=0) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}")
    assert template.render(USER) == template.render(USER) == ["1"]


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_computation_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_sandbox, "MAX_RENDER_S", 0.05)
    with pytest.raises(InvalidRequest, match=r"computes for more than 0\.05 s"):
        small(source).render(USER)


@pytest.mark.parametrize("name", jinja_bounds.REFUSED_FILTERS)
def test_unbounded_filter_is_refused_when_the_model_is_loaded(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"No filter named '{name}'"):
        small(f"{{{{ 'a'|{name} }}}}")


def test_bounds_leave_honest_loops_and_joins_alone() -> None:
    template = small(
        "{% for m in messages %}{{ loop.index ~ '/' ~ loop.length ~ m.role ~ nothing }}"
        "{% if loop.last %}.{% else %},{% endif %}{% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}empty{% endfor %}"
        "{{ '%s-%05d' % ('a', 7) }}{{ 'b'|center(3) }}{{ 'c'.rjust(3) }}{{ [1] + [2] }}{{ 7 % 4 }}"
        "{{ ['d', 'e']|join('-') }}{{ '+'.join(['f', 'g']) }}{{ 'hh'|replace('h', 'ij', 1) }}"
        "{{ '20240101 %(x)s'|format(x=1) }}{{ '%s%s'|format(1, 'z') }}"
        "{{ ' {:>3}{a}'.format(1, a=2) }}"
        "{% set a, b = (3, 4) %}{% for k, v in {'x': a}.items() %}{{ k }}{{ v + b }}{% endfor %}"
        "{{ [1, 2, 3][1:] }}{{ [1, 2]|sum }}{{ 'a\nb'|indent(1) }}"
        "{{ ','.join(['i', 'k']|map('upper')) }}"
        "{{ 1 in [1] and messages[0] is mapping }}"
    )
    rendered = "".join(template.render([*USER, *USER]))
    assert rendered == (
        "1/2user,2/2user.emptya-00007 b   c[1, 2]3d-ef+gijh20240101 11z   12x7[2, 3]3a\n bI,KTrue"
    )


def test_long_chats_may_be_joined() -> None:
    text = "word " * 600_000
    template = small("{{ 'a' + messages[0].content + 'b' ~ messages[0].role }}")
    assert "".join(template.render([Message("user", text)])) == f"a{text}buser"


def test_lone_surrogate_of_the_template_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        small("{{ '\\ud800' }}x").render(USER)
