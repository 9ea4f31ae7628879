"""Streams go on at another worker with a real engine: whatever was asked for, and wherever cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.worker import create_worker_app
from tests import adapters, tiny
from tests.journals import TOKEN, Unit, resume, stream, without_times
from tests.servers import serving

Urls = tuple[str, str]
"""Of two workers of the same weights."""

POLICY = AccessPolicy.build("127.0.0.1", api_keys=(TOKEN,), control_token=TOKEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=1024)
    adapters.write(folder / "lora", adapters.random_pairs(adapters.tiny_shapes()))
    return folder


@pytest.fixture(scope="module")
def urls(folder: Path) -> Iterator[Urls]:
    torch.set_num_threads(1)
    config = WorkerConfig(
        weights=str(folder), device="cpu", load_8bit=True, model_names=("m",), max_num_seqs=8,
        adapter=(f"lora={folder / 'lora'}",), speculation=False,
    )  # fmt: skip
    with ExitStack() as stack:

        def worker(config: WorkerConfig) -> str:
            engine, model = load(config)
            if not model.description["kernels"]:
                pytest.skip("the CPU kernels are not here: rows depend on their neighbours")
            grammars = GrammarCompiler(model.tokenizer, model.vocab_size, model.stop_token_ids)
            stack.callback(grammars.close)

            def build() -> Edge:
                engine.start()
                return create_worker_app(
                    engine, replace(model, grammars=grammars), policy=POLICY, control_token=TOKEN
                )

            server = stack.enter_context(serving(build))
            stack.callback(lambda: server.call(engine.stop()))
            return server.url

        yield worker(config), worker(config)


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Zürich 🙂"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "?", "parameters": PARAMETERS}
OK = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
      "additionalProperties": False}  # fmt: skip
ENDLESS = {str(each): -100 for each in (tiny.BOS_ID, tiny.START_ID, tiny.EOS_ID)}
# some letters, and the two halves of an ö
LETTERS = {**dict.fromkeys(map(str, b"ab o"), 12), "195": 14, "182": 14}
ASK = {"model": "m", "stream": True, "max_tokens": 14}
CHAT = {**ASK, "messages": [{"role": "user", "content": "What is the weather?"}]}
TOOLS = [{"type": "function", "function": FUNCTION}]
JSON = {"type": "json_schema", "json_schema": {"name": "n", "schema": OK}}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/v1/chat/completions", {**CHAT, "temperature": 0, "logit_bias": ENDLESS}),
    "sampled": ("/v1/chat/completions", {**CHAT, "n": 2, "logit_bias": ENDLESS}),
    "penalties": (
        "/v1/chat/completions",
        {
            **CHAT, "logit_bias": LETTERS, "presence_penalty": 1.5, "frequency_penalty": 0.5,
            "repetition_penalty": 1.2, "min_tokens": 9, "top_p": 0.9, "seed": 3,
        },
    ),
    "logprobs": (
        "/v1/chat/completions",
        {
            **CHAT, "logit_bias": LETTERS, "logprobs": True, "top_logprobs": 3, "seed": 7,
            "return_token_ids": True, "stop": ["ö ö", "bbb"],
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "adapter": ("/v1/chat/completions", {**CHAT, "model": "m:lora", "ignore_eos": True}),
    "schema": ("/v1/chat/completions", {**CHAT, "response_format": JSON, "max_tokens": 60}),
    "called": (
        "/v1/chat/completions",
        {**CHAT, "tools": TOOLS, "tool_choice": "required", "max_tokens": 90, "n": 2, "seed": 1},
    ),
    "lazy": (
        "/v1/chat/completions",
        {**CHAT, "tools": TOOLS, "response_format": JSON, "max_tokens": 90, "logprobs": True},
    ),
    "prompts": (
        "/v1/completions",
        {**ASK, "prompt": ["one", "two", "one"], "n": 2, "echo": True, "ignore_eos": True},
    ),
    "completion": (
        "/v1/completions",
        {**ASK, "prompt": "x", "logprobs": 2, "logit_bias": LETTERS, "stop": ["o a"]},
    ),
    "message": (
        "/v1/messages",
        {**CHAT, "stop_sequences": ["ö b", "aö"], "max_tokens": 24},
    ),
    "tool_use": (
        "/v1/messages",
        {
            **CHAT, "max_tokens": 90, "tool_choice": {"type": "any"},
            "tools": [{"name": "weather", "input_schema": PARAMETERS}],
        },
    ),
    "response": (
        "/v1/responses",
        {
            "model": "m", "input": "hi", "stream": True, "max_output_tokens": 14,
            "include": ["message.output_text.logprobs"], "top_logprobs": 2,
        },
    ),
    "function_call": (
        "/v1/responses",
        {
            "model": "m", "input": "hi", "stream": True, "max_output_tokens": 90,
            "tool_choice": "required", "tools": [{"type": "function", **FUNCTION}],
        },
    ),
}  # fmt: skip

NUM_CUTS = 5
"""Of each stream; the unit tests cut everywhere."""


def by_choice(units: Sequence[Unit]) -> dict[bytes, list[Unit]]:
    """Choices go on side by side: which of them is first in a step does not matter."""
    sorted_units = defaultdict(list)
    for unit in without_times(units):
        sorted_units[b" ".join(unit.block.split(b" ")[1:2])].append(unit)
    return sorted_units


@pytest.mark.parametrize("name", REQUESTS)
def test_from_any_cut_a_stream_goes_on_as_if_it_had_none(urls: Urls, name: str) -> None:
    path, body = REQUESTS[name]
    first, second = urls
    # what is sampled may end at once: then another answer is asked for
    tries = (stream(first, path, body) for _ in range(20))
    whole = next(units for units in tries if len(units) > 4)
    assert whole[-1].block == b":e\n\n"
    assert b'"error":{' not in b"".join(unit.frames for unit in whole)
    for place in range(1, len(whole), max(1, len(whole) // NUM_CUTS)):
        again = resume(second, path, body, whole[:place])
        assert again[0].block == whole[0].block and not again[0].frames
        assert by_choice(again[1:]) == by_choice(whole[place:]), place


def test_a_stream_may_move_with_each_token(urls: Urls) -> None:
    path, body = REQUESTS["logprobs"]
    whole = stream(urls[0], path, body)
    said = whole[:1]
    while said[-1].block != b":e\n\n":
        said += resume(urls[len(said) % 2], path, body, said)[1:2]
    assert said == whole
