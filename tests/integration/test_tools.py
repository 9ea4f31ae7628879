"""Tools over HTTP, from models that have learnt none of it: the official client is the judge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from tokenizers import AddedToken, Tokenizer

from chatserve.config import WorkerConfig
from chatserve.engine.prompt import PromptBuilder
from chatserve.engine.serving import load
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.models.templates.jinja import JinjaTemplate
from chatserve.server.edge import Edge
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import serving
from tests.unit.models.test_tool_templates import MISTRAL_TOOLS
from tests.weights import default_model

# no text without a bound: a random model would go on to the end of its context
PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", 'Zürich "<|im_end|>" 🙂']},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "days"],
    },
    "get_time": {"type": "object", "properties": {"utc": {"type": "boolean"}}},
    "stop-all_2": {"type": "object", "properties": {}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "?", "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris? Use a tool."}]
# a random model never comes to the mark of a call in free text, but where text is to be JSON
OK = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
      "additionalProperties": False}  # fmt: skip
JSON_OR_CALL: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": OK}}


@contextmanager
def worker(weights: Path, template: str | None = None) -> Iterator[str]:
    """A worker; `template`: in the place of the weights' own."""
    config = WorkerConfig(
        weights=str(weights), device="cpu", model_names=("m",), max_num_seqs=8, context_length=4096
    )
    engine, model = load(config)
    if template is not None:
        own = JinjaTemplate("own", template, model.tokenizer.special_tokens, model.tokenizer.names)
        prompts = PromptBuilder(model.tokenizer, own, model.context_length)
        model = replace(model, prompts=prompts)
    grammars = GrammarCompiler(model.tokenizer, model.vocab_size, model.stop_token_ids)

    def build() -> Edge:
        engine.start()
        return create_worker_app(engine, replace(model, grammars=grammars))

    with serving(build) as server:
        yield f"{server.url}/v1"
        server.call(engine.stop())
    grammars.close()


@pytest.fixture(scope="module")
def tiny_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=4096)
    with worker(folder) as url:
        yield url


@pytest.fixture(scope="module")
def default_url() -> Iterator[str]:
    with worker(default_model()) as url:
        yield url


@pytest.fixture
def client(tiny_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=tiny_url, api_key="none", max_retries=0) as client:
        yield client


def calls_of(message: ChatCompletionMessage) -> list[tuple[str, dict[str, Any]]]:
    """Every call of an answer, once its arguments are found to match."""
    calls = []
    for call in message.tool_calls or []:
        assert call.type == "function" and call.id.startswith("call_")
        arguments = json.loads(call.function.arguments)
        Draft202012Validator(PARAMETERS[call.function.name]).validate(arguments)
        calls.append((call.function.name, arguments))
    assert len({call.id for call in message.tool_calls or []}) == len(calls)
    return calls


def ask_all(url: str, num_seeds: int, **options: Any) -> list[Choice]:
    """Answers to the same question, five for each seed, side by side."""

    async def run() -> list[Choice]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def ask(seed: int) -> list[Choice]:
                reply: ChatCompletion = await client.chat.completions.create(
                    model="m", messages=QUESTION, tools=TOOLS, temperature=1, seed=seed, n=5,
                    **options,
                )  # fmt: skip
                assert reply.usage is not None and reply.usage.completion_tokens > 20
                return reply.choices

            return [each for answers in await asyncio.gather(*map(ask, range(num_seeds)))
                    for each in answers]  # fmt: skip

    return asyncio.run(run())


def check_required(url: str, num_seeds: int) -> None:
    told = set()
    for choice in ask_all(url, num_seeds, tool_choice="required", parallel_tool_calls=False):
        (call,) = calls_of(choice.message)
        told.add(str(call))
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert len(told) > 1, "the seeds all say the same"


def check_named(url: str, num_seeds: int) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    choices = ask_all(url, num_seeds, tool_choice=named)
    calls = [calls_of(choice.message) for choice in choices]
    assert all([name for name, _ in each] == ["get_weather"] for each in calls)
    assert len({str(each) for each in calls}) > 1


def test_required_on_a_random_model(tiny_url: str) -> None:
    check_required(tiny_url, 10)


def test_named_on_a_random_model(tiny_url: str) -> None:
    check_named(tiny_url, 10)


def save_with_control_token(folder: Path) -> int:
    """A random model with Mistral's template, which has a token in front of calls; its id."""
    tiny.save_model(folder, max_position_embeddings=4096)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = MISTRAL_TOOLS
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return int(tokenizer.token_to_id("[TOOL_CALLS]") or 0)


def test_a_format_with_a_token_of_its_own(tmp_path: Path) -> None:
    control = save_with_control_token(tmp_path)
    with worker(tmp_path) as url, openai.OpenAI(base_url=url, api_key="none") as client:
        options: dict[str, Any] = {
            "model": "m", "tools": TOOLS, "seed": 4, "max_tokens": 1500,
            "logit_bias": {str(control): 100}, "extra_body": {"return_token_ids": True},
        }  # fmt: skip
        reply = client.chat.completions.create(**options, messages=QUESTION)
        (choice,) = reply.choices
        ids = choice.model_extra and choice.model_extra["token_ids"]
        assert ids[0] == control and choice.finish_reason == "tool_calls"
        message = choice.message
        assert message.content is None and message.tool_calls
        for call in message.tool_calls:
            assert call.type == "function" and len(call.id) == 9
            Draft202012Validator(PARAMETERS[call.function.name]).validate(
                json.loads(call.function.arguments)
            )
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "4"} for call in message.tool_calls
        ]
        chat = [*QUESTION, message.model_dump(exclude_none=True), *results]
        more = {"return_token_ids": True, "ignore_eos": True}
        options |= {"logit_bias": {}, "max_tokens": 5, "tool_choice": "none", "extra_body": more}
        reply = client.chat.completions.create(**options, messages=chat)
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage and reply.usage.completion_tokens == 5


@pytest.mark.weights
def test_required_and_named_on_the_default_model(default_url: str) -> None:
    check_required(default_url, 1)
    check_named(default_url, 1)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_streamed_equals_whole(client: openai.OpenAI, choice: Any) -> None:
    options: dict[str, Any] = {
        "model": "m", "messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "seed": 7,
        "n": 4, "logprobs": True, "response_format": JSON_OR_CALL,
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    answers: list[dict[str, Any]] = [{"content": "", "calls": [], "logprobs": 0} for _ in range(4)]
    usage = None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice_ in chunk.choices:
            answer = answers[choice_.index]
            answer["content"] += choice_.delta.content or ""
            answer["reason"] = choice_.finish_reason
            if choice_.logprobs and choice_.logprobs.content:
                answer["logprobs"] += len(choice_.logprobs.content)
            for delta in choice_.delta.tool_calls or []:
                assert delta.function is not None
                if delta.id is not None:
                    assert delta.index == len(answer["calls"]) and delta.type == "function"
                    answer["calls"].append([delta.function.name, ""])
                answer["calls"][delta.index][1] += delta.function.arguments or ""
    assert usage == whole.usage
    for told, given in zip(answers, whole.choices, strict=True):
        assert told["content"] == (given.message.content or "")
        assert told["calls"] == [
            [call.function.name, call.function.arguments]
            for call in given.message.tool_calls or []
            if call.type == "function"
        ]
        assert told["reason"] == given.finish_reason
        assert given.logprobs is not None and given.logprobs.content is not None
        assert told["logprobs"] == len(given.logprobs.content)
    assert any(told["calls"] for told in answers)


def test_the_helper_for_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="m", messages=QUESTION, tools=TOOLS, tool_choice="required", seed=3
    ) as stream:
        done = [each for each in stream if each.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert [(each.name, json.loads(each.arguments)) for each in done] == calls_of(message)
    assert done


def test_parallel_calls(tiny_url: str) -> None:
    named = {"type": "function", "function": {"name": "stop-all_2"}}
    allowed = {"mode": "required", "tools": [named]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    choices = ask_all(tiny_url, 1, tool_choice=choice)
    assert max(len(calls_of(choice.message)) for choice in choices) > 1


def test_auto_says_whatever_the_model_likes(tiny_url: str) -> None:
    for choice in ask_all(tiny_url, 1, max_tokens=20):
        assert choice.message.content and not choice.message.tool_calls


def test_auto_calls_or_answers(tiny_url: str) -> None:
    choices = ask_all(tiny_url, 3, response_format=JSON_OR_CALL, parallel_tool_calls=False)
    for choice in choices:
        if choice.finish_reason == "tool_calls":
            assert calls_of(choice.message) and choice.message.content is None
        else:
            assert json.loads(choice.message.content or "").keys() == {"ok"}
    assert {choice.finish_reason for choice in choices} == {"stop", "tool_calls"}


def num_prompt_tokens(client: openai.OpenAI, *messages: Any, **options: Any) -> int:
    reply: ChatCompletion = client.chat.completions.create(
        model="m", messages=[*QUESTION, *messages], max_tokens=1, **options
    )
    assert reply.usage is not None
    return reply.usage.prompt_tokens


def test_no_tools_are_shown_where_none_may_be_called(client: openai.OpenAI) -> None:
    plain = num_prompt_tokens(client)
    assert num_prompt_tokens(client, tools=TOOLS, tool_choice="none") == plain
    assert num_prompt_tokens(client, tools=TOOLS) > plain + 100
    reply = client.chat.completions.create(
        model="m", messages=QUESTION, tools=TOOLS, tool_choice="none", max_tokens=20
    )
    assert reply.choices[0].message.tool_calls is None and reply.choices[0].message.content


def test_a_call_and_its_result_are_part_of_the_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "m", "tools": TOOLS}
    asked = client.chat.completions.create(
        **options, messages=QUESTION, tool_choice="required", seed=1, parallel_tool_calls=False
    )
    message = asked.choices[0].message
    assert message.tool_calls and asked.usage is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "4 degrees"}
    chat = [*QUESTION, message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(
        **options, messages=chat, tool_choice="none", max_tokens=20
    )
    assert answer.choices[0].message.content and answer.choices[0].finish_reason
    more = num_prompt_tokens(client, *chat[1:], tools=TOOLS) - asked.usage.prompt_tokens
    assert more > asked.usage.completion_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex"),
    ],
)
def test_what_cannot_be_is_refused(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=QUESTION, tools=TOOLS, **fields)
    assert caught.value.param == param


def test_a_schema_that_nothing_matches_is_refused_as_tools(client: openai.OpenAI) -> None:
    never = {"properties": {"x": {"enum": []}}, "required": ["x"]}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": never}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=QUESTION, tools=[tool])
    assert caught.value.param == "tools"
