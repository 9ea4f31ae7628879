"""Newer models' forms of calls over HTTP: random models, and the default one with such a template.

The templates are our own, with the markup of those models: see `tests.unit.models.tool_sources`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat.chat_completion import Choice
from tokenizers import AddedToken, Tokenizer

from chatserve.models.tool_format import GLM, MISTRAL_ARGS
from tests import tiny
from tests.integration.test_tools import (
    JSON_OR_CALL,
    QUESTION,
    TOOLS,
    calls_of,
    check_named,
    check_required,
    worker,
)
from tests.unit.models.tool_sources import SOURCES
from tests.weights import default_model

# Mistral's marks are special tokens without text; so are GLM's tags here, to see that they may be
SPECIAL = {
    "qwen-xml": (), "mistral-args": (*MISTRAL_ARGS.marks, "[INST]", "[/INST]"), "glm": GLM.marks,
}  # fmt: skip


def save(folder: Path, form: str) -> None:
    tiny.save_model(folder, max_position_embeddings=4096)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in SPECIAL[form]])
    tokenizer.save(str(path))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": SOURCES[form]}), "utf-8")


@pytest.fixture(scope="module", params=list(SPECIAL))
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp(request.param)
    save(folder, request.param)
    with worker(folder) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def checked_calls(choice: Choice) -> list[tuple[str, dict[str, Any]]]:
    """As `calls_of`; Mistral's ids are short."""
    for call in choice.message.tool_calls or []:
        if not call.id.startswith("call_"):
            assert len(call.id) == 9 and call.id.isalnum()
            call.id = f"call_{call.id}"
    return calls_of(choice.message)


def test_required_and_named(url: str, client: openai.OpenAI) -> None:
    told = set()
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        reply = client.chat.completions.create(
            model="m", messages=QUESTION, tools=TOOLS, tool_choice=choice, n=8, seed=1,
            temperature=1, parallel_tool_calls=False,
        )  # fmt: skip
        for each in reply.choices:
            (call,) = checked_calls(each)
            told.add(str(call))
            assert each.finish_reason == "tool_calls" and each.message.content is None
            assert choice == "required" or call[0] == "get_weather"
    assert len(told) > 1, "all say the same"


def test_streamed_equals_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "m", "messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "seed": 7,
        "logprobs": True,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert checked_calls(streamed) == checked_calls(whole) != []
    assert whole.logprobs and streamed.logprobs and whole.logprobs.content
    assert streamed.logprobs.content is not None
    tokens = [each.token for each in whole.logprobs.content]
    assert [each.token for each in streamed.logprobs.content] == tokens


def test_json_or_a_call(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="m", messages=QUESTION, tools=TOOLS, response_format=JSON_OR_CALL, n=8, seed=2,
        temperature=1, parallel_tool_calls=False,
    )  # fmt: skip
    for choice in reply.choices:
        if choice.finish_reason == "tool_calls":
            assert checked_calls(choice) and choice.message.content is None
        else:
            assert json.loads(choice.message.content or "").keys() == {"ok"}


def test_results_go_back(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "m", "tools": TOOLS}
    asked = client.chat.completions.create(
        **options, messages=QUESTION, tool_choice="required", seed=1
    )
    message = asked.choices[0].message
    assert message.tool_calls
    results = [{"role": "tool", "tool_call_id": c.id, "content": "4"} for c in message.tool_calls]
    answer = client.chat.completions.create(
        **options, messages=[*QUESTION, message.model_dump(exclude_none=True), *results],
        tool_choice="none", max_tokens=5, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.usage and answer.usage.completion_tokens == 5


@pytest.mark.weights
def test_the_default_model_with_such_a_template() -> None:
    """Its own tokens spell the marks."""
    with worker(default_model(), SOURCES["qwen-xml"]) as url:
        check_required(url, 1)
        check_named(url, 1)
