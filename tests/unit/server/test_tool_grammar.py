"""What an answer may be when there are tools: text or calls, and nothing in between."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import UnsupportedParameter
from chatserve.grammar.matcher import Matcher, pristine_matcher
from chatserve.grammar.source import to_llguidance
from chatserve.grammar.vocabulary import Vocabulary
from chatserve.models.tool_format import LLAMA_3, MISTRAL, TAGS, WORDS, ToolFormat
from chatserve.protocol.chat import ChatRequest, read_chat
from chatserve.server.tool_grammar import MAX_CALLS, tool_grammar
from tests.grammars import BYTES, END_ID, Language, allowed_ids

TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {
        "properties": {"x": {"type": "integer"}, "s": {"type": "string"}}, "required": ["x"]}}},
    {"type": "function", "function": {"name": "ff"}},
]  # fmt: skip
F: dict[ToolFormat, str] = {
    TAGS: '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
    LLAMA_3: '{"name": "f", "parameters": {"x": 1}}',
    MISTRAL: '[{"name": "f", "arguments": {"x": 1}}]',
}
TWO: dict[ToolFormat, str] = {
    TAGS: f'{F[TAGS]}\n<tool_call>\n{{"name": "ff", "arguments": {{}}}}\n</tool_call>',
    WORDS: f'{F[TAGS]}<tool_call>\n{{"name": "ff", "arguments": {{}}}}\n</tool_call>',
    MISTRAL: '[{"name": "f", "arguments": {"x": 1}}, {"name": "ff", "arguments": {}}]',
}
FORMATS = pytest.mark.parametrize("tool_format", [TAGS, LLAMA_3, MISTRAL], ids=lambda f: f.name)
NAMED = {"type": "function", "function": {"name": "ff"}}


def request(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "x"}]
    return read_chat({"model": "m", "messages": messages, "tools": TOOLS, **fields})


def language(tool_format: ToolFormat, *, after_space: bool = False, **fields: Any) -> Language:
    spec = tool_grammar(request(**fields), tool_format, after_space=after_space)
    return Language(spec.kind, spec.source)


@FORMATS
def test_auto_is_text_or_calls_whose_arguments_match(tool_format: ToolFormat) -> None:
    answers = language(tool_format)
    for text in ("", "hi\n there", "{", '{"x": 1}', "[1]", "<tool", "🙂 </tool_call>", "NAME"):
        assert text in answers
    call = F[tool_format]
    # in front of a call of TAGS is text; behind any text the others are text, too
    assert call in answers and f"hi {call}" in answers
    for wrong in (
        call.replace("1", '"1"'), call.replace('"f"', '"g"'), call.replace('"x"', '"y"'),
        call.replace("1}", '1, "z": 2}'), call[:-1], f"{call} hi", f"{call}{call}",
    ):  # fmt: skip
        assert wrong not in answers


def test_text_may_look_like_a_call_of_another_format() -> None:
    assert F[LLAMA_3] in language(TAGS) and F[MISTRAL] in language(TAGS)
    assert F[TAGS] in language(LLAMA_3) and f"hi {F[LLAMA_3]}" in language(LLAMA_3)


@FORMATS
def test_required_has_no_text(tool_format: ToolFormat) -> None:
    answers = language(tool_format, tool_choice="required")
    assert F[tool_format] in answers
    assert F[tool_format].replace('"x": 1', "").replace('"f"', '"ff"') in answers
    assert "" not in answers and "hi" not in answers and f"hi {F[tool_format]}" not in answers


@FORMATS
def test_named_is_that_tool_once(tool_format: ToolFormat) -> None:
    answers = language(tool_format, tool_choice=NAMED)
    call = F[tool_format].replace('"x": 1', "").replace('"f"', '"ff"')
    assert call in answers and F[tool_format] not in answers
    if tool_format in TWO:
        twice = TWO[tool_format].replace('"x": 1', "").replace('"f"', '"ff"')
        assert twice not in answers


def test_some_tools_may_be_allowed() -> None:
    allowed: dict[str, Any] = {"mode": "auto", "tools": [NAMED]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert F[TAGS] not in language(TAGS, tool_choice=choice)
    assert "hi" in language(TAGS, tool_choice=choice)
    allowed["mode"] = "required"
    assert "hi" not in language(TAGS, tool_choice=choice)


@pytest.mark.parametrize("tool_format", TWO, ids=lambda f: f.name)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_several_calls_where_they_may_be_parallel(tool_format: ToolFormat, choice: str) -> None:
    assert TWO[tool_format] in language(tool_format, tool_choice=choice)
    single = language(tool_format, tool_choice=choice, parallel_tool_calls=False)
    assert F.get(tool_format, F[TAGS]) in single and TWO[tool_format] not in single


def test_a_new_line_behind_a_call_is_no_call_where_that_was_not_learnt() -> None:
    assert TWO[TAGS] not in language(WORDS) and TWO[WORDS] not in language(TAGS)


def test_calls_come_to_an_end() -> None:
    answers = language(TAGS)
    assert "\n".join([F[TAGS]] * MAX_CALLS) in answers
    assert "\n".join([F[TAGS]] * (MAX_CALLS + 1)) not in answers


@FORMATS
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_behind_the_space_that_is_taken_away(tool_format: ToolFormat, choice: str) -> None:
    answers = language(tool_format, tool_choice=choice, after_space=True)
    assert f" {F[tool_format]}" in answers and F[tool_format] not in answers
    assert (" hi" in answers) == (choice == "auto") and "hi" not in answers


def test_json_that_is_asked_for_or_a_call() -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answers = language(TAGS, response_format=wanted)
    assert json.dumps({"s": F[TAGS]}) in answers and F[TAGS] in answers
    assert (
        "hi" not in answers
        and '{"s": 1}' not in answers
        and f'{{"s": "x"}}{F[TAGS]}' not in answers
    )
    assert '{"a": 1}' in language(TAGS, response_format={"type": "json_object"})
    # a call is all the answer that there may be
    assert '{"s": "x"}' not in language(TAGS, response_format=wanted, tool_choice="required")


@pytest.mark.parametrize(
    ("tool_format", "fields"),
    [(TAGS, {"guided_regex": "a"}), (LLAMA_3, {"response_format": {"type": "json_object"}})],
)
def test_text_that_could_be_a_call(tool_format: ToolFormat, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter, match="cannot be combined with tools") as caught:
        language(tool_format, **fields)
    assert caught.value.param == next(iter(fields))
    assert F[tool_format] in language(tool_format, tool_choice="required", **fields)


@pytest.mark.parametrize("after_space", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_token_that_some_models_write_first(choice: str, after_space: bool) -> None:
    control = END_ID + 1
    vocabulary = Vocabulary((*BYTES.tokens, b"", b""), BYTES.end_ids).build()
    spec = tool_grammar(
        request(tool_choice=choice), MISTRAL, control_id=control, after_space=after_space
    )
    text = to_llguidance(spec.kind, spec.source, after_space=False)
    matcher = Matcher(pristine_matcher(vocabulary, text, is_json=True))
    ids = allowed_ids(matcher, len(BYTES.tokens) + 2)
    assert control in ids and control + 1 not in ids
    matcher.accept(control)
    assert {chr(each) for each in allowed_ids(matcher, len(BYTES.tokens) + 2)} == {" ", "["}
    for byte in F[MISTRAL].encode():
        matcher.accept(byte)
    assert matcher.is_finished
