"""/v1/responses and /v1/messages with a real network: tools, formats, stops, counts, truncation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import MessageParam
from pydantic import BaseModel

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.server.edge import Edge
from chatserve.server.response_store import ResponseStore
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import serving

# no text without a bound: a random model would go on to the end of its context
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
SMALL: dict[str, Any] = {**PARAMETERS, "properties": {"city": {"enum": ["Paris", "Rome"]}}}


class Answer(BaseModel):
    is_good: bool


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=2048)
    config = WorkerConfig(weights=str(folder), device="cpu", model_names=("m",), max_num_seqs=4)
    engine, model = load(config)
    grammars = GrammarCompiler(model.tokenizer, model.vocab_size, model.stop_token_ids)
    store = ResponseStore(folder / "responses.db")

    def build() -> Edge:
        engine.start()
        return create_worker_app(engine, replace(model, grammars=grammars), response_store=store)

    with serving(build) as server:
        yield server.url
        server.call(engine.stop())
    grammars.close()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


TOOL: Any = {"type": "function", "name": "weather", "parameters": SMALL, "strict": True}
ASKED: list[MessageParam] = [{"role": "user", "content": "weather?"}]
CLAUDE_TOOL: Any = {"name": "weather", "description": "of a city", "input_schema": SMALL}


def test_a_response_calls_a_tool_and_reads_what_it_gave(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "m", "tools": [TOOL], "max_output_tokens": 300}
    first = client.responses.create(
        **ask, input="weather?", tool_choice="required", parallel_tool_calls=False
    )
    assert first.status == "completed"
    [call] = first.output
    assert call.type == "function_call" and call.name == "weather" and call.call_id
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = client.responses.create(
        **{**ask, "max_output_tokens": 5}, input=[result], previous_response_id=first.id
    )
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]


def test_a_streamed_call(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="m", input="weather?", tools=[TOOL], max_output_tokens=300,
        tool_choice={"type": "function", "name": "weather"},
    ) as stream:  # fmt: skip
        events = list(stream)
        final = stream.get_final_response()
    names = [event.type for event in events]
    assert names[2] == "response.output_item.added"
    assert names[-3:] == [
        "response.function_call_arguments.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip
    [call] = final.output
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert call.type == "function_call" and "".join(deltas) == call.arguments


def test_a_message_calls_a_tool_and_reads_what_it_gave(claude: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"model": "m", "max_tokens": 300, "tools": [CLAUDE_TOOL]}
    choice: Any = {"type": "tool", "name": "weather"}
    with claude.messages.stream(**ask, messages=ASKED, tool_choice=choice) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    [use] = first.content
    assert use.type == "tool_use" and use.name == "weather"
    assert use.input["city"] in ("Paris", "Rome")
    turns: list[MessageParam] = [
        *ASKED,
        {"role": "assistant", "content": [use.to_dict()]},  # type: ignore[list-item]
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}],
        },
    ]
    counted = claude.messages.count_tokens(model="m", messages=turns, tools=[CLAUDE_TOOL])
    second = claude.messages.create(**{**ask, "max_tokens": 5}, messages=turns)
    usage = second.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    plain = claude.messages.count_tokens(model="m", messages=ASKED)
    assert counted.input_tokens > plain.input_tokens


def test_a_parsed_response(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="m", input="good?", text_format=Answer, max_output_tokens=100
    )
    assert isinstance(parsed.output_parsed, Answer)
    with client.responses.stream(
        model="m", input="good?", text_format=Answer, max_output_tokens=100
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Answer)


def test_a_parsed_message(claude: anthropic.Anthropic) -> None:
    message = claude.messages.parse(model="m", max_tokens=100, messages=ASKED, output_format=Answer)
    assert isinstance(message.parsed_output, Answer)


def test_which_stop_sequence(claude: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {
        "model": "m", "max_tokens": 30, "messages": ASKED, "extra_body": {"temperature": 0},
    }  # fmt: skip
    [block] = claude.messages.create(**ask).content
    assert block.type == "text" and len(block.text) > 10
    stop = block.text[4:6]
    place = block.text.index(stop)
    cut = claude.messages.create(**ask, stop_sequences=["no such text", stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert "".join(b.text for b in cut.content if b.type == "text") == block.text[:place]


def test_a_prompt_that_is_too_long(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    long: list[MessageParam] = [{"role": "user", "content": "x" * 3000}]
    assert claude.messages.count_tokens(model="m", messages=long).input_tokens > 3000
    begun: list[MessageParam] = [*long, {"role": "assistant", "content": "a"}]
    with pytest.raises(anthropic.BadRequestError, match=r"2,?048"):
        claude.messages.count_tokens(model="m", messages=begun)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x" * 3000)
    assert (refused.value.param, refused.value.code) == ("input", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="m", input="x" * 1500, max_output_tokens=1000)
    assert refused.value.param == "max_output_tokens"
    rolled = client.responses.create(
        model="m", truncation="auto", max_output_tokens=2, instructions="brief",
        input=[{"role": "user", "content": "x" * 1500}, {"role": "assistant", "content": "y"},
               {"role": "user", "content": "z" * 1000}],
    )  # fmt: skip
    assert rolled.usage is not None
    assert rolled.usage.to_dict()["input_items_dropped"] == [0, 1]


def test_logprobs(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="m", input="hi", include=["message.output_text.logprobs"], top_logprobs=2,
        max_output_tokens=5,
    )  # fmt: skip
    [message] = response.output
    assert message.type == "message" and message.content[0].type == "output_text"
    told = message.content[0].logprobs
    assert told and all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in told)
    assert (
        b"".join(bytes(each.bytes) for each in told)
        .decode(errors="replace")
        .startswith(response.output_text[:1])
    )


def test_a_schema_is_refused_by_its_name_here(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    bad = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(
            model="m",
            input="x",
            text={"format": {"type": "json_schema", "name": "x", "schema": bad}},
        )
    assert str(refused.value.param).startswith("text.format.schema")
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
        claude.messages.create(
            model="m", max_tokens=5, messages=ASKED,
            output_config={"format": {"type": "json_schema", "schema": bad}},
        )  # fmt: skip
