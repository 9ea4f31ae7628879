"""Structured output over HTTP: the best adversary is a model with random weights."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.server.edge import Edge
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import RunningServer, serving
from tests.weights import default_model

MESSAGES = [{"role": "user", "content": "hi"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {"on": {"type": "string", "format": "date-time"},
     "id": {"type": "string", "format": "uuid"}}, "required": ["on", "id"],
     "additionalProperties": False},
    {"anyOf": [{"type": "boolean"}, {"type": "number", "minimum": -1, "maximum": 1}]},
]  # fmt: skip


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def serve(weights: str, **options: Any) -> Iterator[RunningServer]:
    config = WorkerConfig(weights=weights, device="cpu", model_names=("m",), **options)
    engine, model = load(config)
    with closing(GrammarCompiler(model.tokenizer, model.vocab_size)) as grammars:
        model = dataclasses.replace(model, grammars=grammars)

        def build() -> Edge:
            engine.start()
            return create_worker_app(engine, model)

        with serving(build) as server:
            yield server
            server.call(engine.stop())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=2048)
    yield from serve(str(folder), dtype="float32", max_num_seqs=8)


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def ask(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 250, "seed": 1, **fields}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    choices: list[dict[str, Any]] = reply.json()["choices"]
    return choices


def text(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda each: json.dumps(each)[:30])
def test_answers_of_random_weights_match_their_schema(
    http: httpx.Client, schema: dict[str, Any]
) -> None:
    choices = ask(http, n=8, temperature=1, response_format=schema_format(schema))
    whole = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert len(whole) >= 6
    for choice in whole:
        jsonschema.validate(json.loads(text(choice)), schema)


def test_regex_choice_and_grammar(http: httpx.Client) -> None:
    for choice in ask(http, n=4, guided_regex=r"[a-f]{2,9}-\d+;"):
        assert re.fullmatch(r"[a-f]{2,9}-[0-9]+;", text(choice))
    options = ["Zürich", "Rome", "New York"]
    for fields in ({"guided_choice": options}, {"structured_outputs": {"choice": options}}):
        assert {text(choice) for choice in ask(http, n=8, **fields)} <= set(options)
    for choice in ask(http, n=4, guided_grammar='root ::= ("ab" | "c"){2,5} "."'):
        assert re.fullmatch(r"(ab|c){2,5}\.", text(choice))
    body = {"model": "m", "prompt": ["x", "y"], "guided_regex": "[xyz]{3}", "echo": True}
    completions = http.post("/v1/completions", json=body).json()["choices"]
    assert all(re.fullmatch("[xy][xyz]{3}", each["text"]) for each in completions)


def test_length_is_said_where_the_budget_ends_inside(http: httpx.Client) -> None:
    (cut,) = ask(http, max_tokens=5, response_format=schema_format(PERSON))
    assert cut["finish_reason"] == "length"
    (whole,) = ask(http, response_format=schema_format(PERSON))
    assert whole["finish_reason"] == "stop" and text(whole).startswith(text(cut))


def test_a_budget_that_just_suffices_is_a_stop(http: httpx.Client) -> None:
    (choice,) = ask(http, max_tokens=3, guided_regex="[ab]{3}")
    assert (choice["finish_reason"], len(text(choice))) == ("stop", 3)


def test_stop_strings_work_inside(http: httpx.Client) -> None:
    (choice,) = ask(http, stop=['"age"'], response_format=schema_format(PERSON))
    assert choice["finish_reason"] == "stop"
    assert text(choice).startswith("{") and '"age"' not in text(choice)


def test_the_grammar_says_when_an_answer_ends(http: httpx.Client) -> None:
    """Neither min_tokens nor ignore_eos makes an answer longer than what it must match."""
    ban = {str(tiny.EOS_ID): -100}
    for fields in ({"min_tokens": 50}, {"ignore_eos": True}, {"logit_bias": ban}):
        for choice in ask(http, n=4, guided_regex="[ab]{1,3}", **fields):
            assert choice["finish_reason"] == "stop" and re.fullmatch("[ab]{1,3}", text(choice))


def test_neighbours_say_what_they_say_alone(http: httpx.Client) -> None:
    kinds: list[dict[str, Any]] = [
        {"max_tokens": 60},
        {"response_format": schema_format(PERSON)},
        {"max_tokens": 60, "temperature": 0},
        {"guided_regex": "[a-z]{60}"},
    ]
    alone = [text(*ask(http, **kind)) for kind in kinds]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none") as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="m",
                        messages=[{"role": "user", "content": "hi"}],
                        seed=1,
                        extra_body={"max_tokens": 250, **kind},
                    )
                    for kind in kinds
                )
            )
        return [reply.choices[0].message.content or "" for reply in replies]

    assert asyncio.run(together()) == alone


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    legs: int


def test_the_official_client_parses(http: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none") as client:
        parsed = client.chat.completions.parse(
            model="m", messages=[{"role": "user", "content": "hi"}], response_format=Pet, seed=3,
            logit_bias={str(each): 30 for each in (ord("}") - 33,)}, max_tokens=300,
        )  # fmt: skip
    assert isinstance(parsed.choices[0].message.parsed, Pet)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": schema_format({"type": "array", "uniqueItems": True})},
         "response_format.json_schema.schema.uniqueItems"),
        ({"response_format": schema_format({"$ref": "#"})}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_regex": "(?<=a)b"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"grammar": 'start: "a" | foo'}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_json": "{"}, "guided_json"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_a_400_that_names_it(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    for path, prompt in (
        ("chat/completions", {"messages": MESSAGES}),
        ("completions", {"prompt": "x"}),
    ):
        reply = http.post(f"/v1/{path}", json={"model": "m", "stream": True, **prompt, **fields})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param)
        assert param in error["message"] and "\n" not in error["message"]


@pytest.mark.weights
def test_the_default_model_completes_its_objects() -> None:
    """Greedy, and with blanks as it likes them."""
    questions = (
        "Give me a JSON object with the name and age of a person.",
        "Describe a cat as JSON.",
        "What is the capital of France? Answer in JSON.",
    )
    for server in serve(str(default_model()), max_num_seqs=8):
        with httpx.Client(base_url=server.url, timeout=120) as http:
            for question in questions:
                messages = [{"role": "user", "content": question}]
                (choice,) = ask(
                    http, messages=messages, temperature=0, response_format=schema_format(PERSON)
                )
                assert choice["finish_reason"] == "stop"
                jsonschema.validate(json.loads(text(choice)), PERSON)
                (choice,) = ask(
                    http, messages=messages, temperature=0, response_format={"type": "json_object"}
                )
                # how much there is to say is up to how this processor rounds
                said = text(choice)
                assert said.startswith("{") and not re.search(r"\s{30}", said)
                if choice["finish_reason"] == "stop":
                    assert isinstance(json.loads(said), dict)
                else:
                    assert choice["finish_reason"] == "length" and said.count('"') > 4
