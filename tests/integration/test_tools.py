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

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.server.edge import Edge
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import serving
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
NUM_SEEDS = 50


@contextmanager
def worker(weights: Path) -> Iterator[str]:
    config = WorkerConfig(
        weights=str(weights), device="cpu", model_names=("m",), max_num_seqs=8, context_length=2048
    )
    engine, model = load(config)
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
    tiny.save_model(folder, max_position_embeddings=2048)
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


def ask_all(url: str, num_seeds: int, **options: Any) -> list[ChatCompletion]:
    """The same request with `num_seeds` seeds, side by side."""

    async def run() -> list[ChatCompletion]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            limit = asyncio.Semaphore(8)

            async def ask(seed: int) -> ChatCompletion:
                async with limit:
                    reply: ChatCompletion = await client.chat.completions.create(
                        model="m", messages=QUESTION, tools=TOOLS, temperature=1, seed=seed,
                        **options,
                    )  # fmt: skip
                    return reply

            return await asyncio.gather(*map(ask, range(num_seeds)))

    return asyncio.run(run())


def check_required(url: str, num_seeds: int) -> None:
    replies = ask_all(url, num_seeds, tool_choice="required", parallel_tool_calls=False)
    names = set()
    for reply in replies:
        (choice,) = reply.choices
        ((name, _),) = calls_of(choice.message)
        names.add(name)
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert reply.usage is not None and reply.usage.completion_tokens > 10
    assert len(names) > 1, "the seeds all say the same"


def check_named(url: str, num_seeds: int) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    replies = ask_all(url, num_seeds, tool_choice=choice)
    calls = [calls_of(reply.choices[0].message) for reply in replies]
    assert all([name for name, _ in each] == ["get_weather"] for each in calls)
    assert len({str(each) for each in calls}) > 1


def test_required_on_a_random_model(tiny_url: str) -> None:
    check_required(tiny_url, NUM_SEEDS)


def test_named_on_a_random_model(tiny_url: str) -> None:
    check_named(tiny_url, NUM_SEEDS)


@pytest.mark.weights
def test_required_on_the_default_model(default_url: str) -> None:
    check_required(default_url, 8)


@pytest.mark.weights
def test_named_on_the_default_model(default_url: str) -> None:
    check_named(default_url, 8)
