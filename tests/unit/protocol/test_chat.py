"""What a chat may ask for: limits at their edges, types, refusals by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.errors import ChatserveError, InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import MAX_MESSAGES, ChatMessage, ChatRequest, parse_chat
from chatserve.protocol.sampling_request import MAX_LOGIT_BIAS

USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def refusal(**fields: Any) -> ChatserveError:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.message and "\n" not in caught.value.message
    return caught.value


def test_defaults_leave_everything_open() -> None:
    request = chat()
    assert request.messages == [ChatMessage("user", "hi")]
    assert (request.num_choices, request.is_stream, request.includes_usage) == (1, False, False)
    assert request.temperature is None and request.asked_tokens is None
    assert request.stop == () and request.logit_bias == {}


def test_null_means_default() -> None:
    nulls = dict.fromkeys(
        ["n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
         "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
         "seed", "stop", "logit_bias"]
    )  # fmt: skip
    assert chat(**nulls) == chat()


@pytest.mark.parametrize(
    ("field", "accepted", "refused"),
    [
        ("n", [1, 8], [0, -1, 9, True, 1.0, "1", [1]]),
        ("temperature", [0, 0.7, 2], [-0.1, 2.1, True, "0.7"]),
        ("top_p", [0.001, 1], [0, -1, 1.01, False]),
        ("top_k", [-1, 0, 40], [-2, 1.5, True, 2**63]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("repetition_penalty", [0.01, 2], [0, 0.009, -1, 2.1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1, "0"]),
        ("seed", [-(2**63), 2**63 - 1, 0], [2**63, -(2**63) - 1, 1.0, True]),
        ("max_tokens", [1, 10**9], [0, -1, 1.0, True]),
        ("max_completion_tokens", [1], [0, -1]),
        ("min_tokens", [0, 10**9], [-1, 1.0, True]),
        ("ignore_eos", [True, False], [1, "true"]),
        ("logprobs", [True, False], [0, 1, "true"]),
        ("stream", [True, False], [1, 0, "true"]),
        ("stop", ["a", ["a"], ["a"] * 16, "é" * 128, []],
         ["", [""], ["a"] * 17, "é" * 129, 1, [1], {"a": 1}]),
        ("stop_token_ids", [[], [0], [1] * 64], [[1] * 65, [-1], [True], ["1"], 1, "1", [1.0]]),
        ("logit_bias", [{}, {"0": 1}, {"5": -100, "6": 100.0}],
         [{"5": 101}, {"5": -101}, {"5": True}, {"5": "1"}, {"a": 1}, {"-1": 1}, {"1.0": 1},
          {"٣": 1}, {"9" * 10: 1}, [], "x"]),
        ("messages", [[USER] * MAX_MESSAGES],
         [[], [USER] * (MAX_MESSAGES + 1), None, "hi", {"role": "user"}, ["hi"], [[]], [None]]),
        ("model", ["a"], ["a" * 501, 1, None, ["a"]]),
    ],
)  # fmt: skip
def test_limits(field: str, accepted: list[Any], refused: list[Any]) -> None:
    for value in accepted:
        chat(**{field: value})
    for value in refused:
        param = refusal(**{field: value}).param
        assert param is not None and param.partition(".")[0].partition("[")[0] == field


def test_too_many_biases() -> None:
    assert len(chat(logit_bias={str(i): 1 for i in range(MAX_LOGIT_BIAS)}).logit_bias) == 1024
    assert "1025" in refusal(logit_bias={str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}).message


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"-1e999"])
def test_no_number_outside_the_reals(number: bytes) -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":%s}' % number
    with pytest.raises(InvalidRequest):
        parse_chat(body)


def test_a_name_is_a_label() -> None:
    for name in ("Bob", "", None):
        assert chat(messages=[{**USER, "name": name}]).messages == chat(messages=[USER]).messages


def test_message_names_value_and_limit() -> None:
    error = refusal(temperature=3)
    assert error.message == "temperature is 3: it should be less than or equal to 2"
    assert error.param == "temperature"


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_field(field: str) -> None:
    fields = {"model": "m", "messages": [USER]}
    del fields[field]
    with pytest.raises(InvalidRequest, match=f"{field} is missing"):
        parse_chat(json.dumps(fields).encode())


def test_unknown_field_is_named() -> None:
    error = refusal(temprature=1)
    assert isinstance(error, UnsupportedParameter)
    assert error.param == "temprature" and "temprature" in error.message


def test_unknown_fields_cost_one_error() -> None:
    error = refusal(**{f"x{i}": 0 for i in range(50_000)})
    assert error.param == "x0" and len(error.message) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tools", None), ("tool_choice", "auto"), ("tool_choice", None),
        ("parallel_tool_calls", None),
        ("functions", None), ("function_call", "none"), ("response_format", {"type": "text"}),
        ("modalities", ["text"]), ("service_tier", "auto"), ("store", False), ("store", True),
        ("user", "u"), ("metadata", {"a": "b"}), ("safety_identifier", "x"),
        ("prompt_cache_key", "k"), ("reasoning_effort", None), ("n", 1),
    ],
)  # fmt: skip
def test_value_that_changes_nothing_is_accepted(field: str, value: Any) -> None:
    assert chat(**{field: value}).model_copy(update={"n": None}) == chat()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]), ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]), ("audio", {"voice": "a"}),
        ("service_tier", "flex"), ("reasoning_effort", "low"), ("web_search_options", {}),
        ("prediction", {"type": "content"}), ("verbosity", "low"), ("echo", True),
        # a request neither brings a template nor says what one gets (CVE-2025-62426)
        ("chat_template", "{{ messages }}"), ("chat_template_kwargs", {"tokenize": True}),
        ("documents", [{"text": "x"}]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert isinstance(error, UnsupportedParameter)
    assert error.param == field and field in error.message


def test_labels_must_have_their_type() -> None:
    assert refusal(user=5).param == "user"
    assert refusal(metadata="x").param == "metadata"
    assert refusal(store=1).param == "store"


def test_usage_needs_a_stream() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).includes_usage
    assert chat(stream=True, stream_options={"include_obfuscation": False}).is_stream
    assert refusal(stream_options={"include_usage": True}).param == "stream_options"
    error = refusal(stream=True, stream_options={"include_obfuscation": True})
    assert error.param == "stream_options.include_obfuscation"
    assert refusal(stream=True, stream_options={"x": 1}).param == "stream_options.x"
    assert refusal(stream=True, stream_options=[]).param == "stream_options"
    param = refusal(stream=True, stream_options={"include_usage": 1}).param
    assert param == "stream_options.include_usage"


def test_usage_in_every_chunk_needs_usage() -> None:
    both = {"include_usage": True, "continuous_usage_stats": True}
    assert chat(stream=True, stream_options=both).has_usage_in_chunks
    assert not chat(stream=True, stream_options={"include_usage": True}).has_usage_in_chunks
    error = refusal(stream=True, stream_options={"continuous_usage_stats": True})
    assert error.param == "stream_options.continuous_usage_stats"


def test_logprobs() -> None:
    assert chat().num_top is None and chat(logprobs=False, top_logprobs=0).num_top is None
    assert chat(logprobs=True).num_top == 0
    assert chat(logprobs=True, top_logprobs=20).num_top == 20
    for value in (21, -1, True, "1"):
        assert refusal(logprobs=True, top_logprobs=value).param == "top_logprobs"
    assert "needs logprobs" in refusal(top_logprobs=1).message


def test_an_answer_that_has_begun() -> None:
    assert not chat().is_open and not chat(add_generation_prompt=True).is_open
    assert chat(continue_final_message=True).is_open
    assert chat(continue_final_message=True, add_generation_prompt=False).is_open
    for value in (True, False):
        error = refusal(continue_final_message=value, add_generation_prompt=value)
        assert error.param == "add_generation_prompt"
    assert refusal(add_generation_prompt=False).param == "add_generation_prompt"
    assert chat(continue_final_message=True, truncation="rolling").is_open


def test_one_limit_under_two_names() -> None:
    assert chat(max_tokens=5).asked_tokens == 5
    assert chat(max_completion_tokens=6).asked_tokens == 6
    assert chat(max_tokens=7, max_completion_tokens=7).asked_tokens == 7
    assert "only one" in refusal(max_tokens=5, max_completion_tokens=6).message


def content_of(content: Any) -> str:
    return chat(messages=[{"role": "user", "content": content}]).messages[0].content


def test_content_may_come_in_text_parts() -> None:
    assert content_of([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "a\nb"


@pytest.mark.parametrize(
    ("content", "param", "word"),
    [
        (None, "messages[0].content", "text"),
        (5, "messages[0].content", "text"),
        ([], "messages[0].content", "text"),
        (["a"], "messages[0].content[0]", "type"),
        ([{"text": "a"}], "messages[0].content[0]", "type"),
        ([{"type": "text"}], "messages[0].content[0].text", "text"),
        ([{"type": "text", "text": "a", "x": 1}], "messages[0].content[0].x", "x"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}],
         "messages[0].content[1]", "image_url"),
        ([{"type": "input_audio"}], "messages[0].content[0]", "input_audio"),
        ([{"type": "text", "text": "a"}] * 1025, "messages[0].content", "1025"),
    ],
)  # fmt: skip
def test_content_that_is_not_text(content: Any, param: str, word: str) -> None:
    error = refusal(messages=[{"role": "user", "content": content}])
    assert error.param == param and word in error.message


@pytest.mark.parametrize("role", ["function", "robot", ""])
def test_unknown_role(role: str) -> None:
    error = refusal(messages=[USER, {"role": role, "content": "x"}])
    assert error.param == "messages[1].role"


def test_developer_is_the_system_role() -> None:
    assert chat(messages=[{"role": "developer", "content": "x"}]).messages[0].role == "system"


def test_an_answer_of_ours_can_be_sent_back() -> None:
    answer = {
        "role": "assistant", "content": "x", "refusal": None, "annotations": None, "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    assert chat(messages=[USER, answer, USER]).messages[1] == ChatMessage("assistant", "x")
    error = refusal(messages=[{**answer, "function_call": {"name": "f"}}])
    assert error.param == "messages[0].function_call"


@pytest.mark.parametrize("field", ["role", "content"])
def test_message_without_a_field(field: str) -> None:
    message = {name: value for name, value in USER.items() if name != field}
    assert refusal(messages=[message]).param == f"messages[0].{field}"


def test_brackets_in_text_are_not_nesting() -> None:
    assert content_of("[" * 10_000) == "[" * 10_000
