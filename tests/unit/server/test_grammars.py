"""From a request's response_format to the engine's params: compiled once, before anything runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from chatserve import environment
from chatserve.config import WorkerConfig
from chatserve.engine.grammar import Grammar, GrammarSpec
from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.server import worker_process
from chatserve.server.edge import AccessPolicy
from chatserve.server.generation import Generation
from chatserve.server.model_slot import ModelSlot
from chatserve.server.preparation import Prepared, prepare_chat, prepare_completion
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel


class FakeMatcher:
    is_finished = False

    def fill_mask(self, words: NDArray[np.uint32]) -> None: ...
    def accept(self, token_id: int) -> None: ...


class FakeGrammar:
    def matcher(self) -> FakeMatcher:
        return FakeMatcher()


class FakeGrammars:
    def __init__(self, error: InvalidRequest | None = None) -> None:
        self.error = error
        self.asked: list[tuple[str, str, bool]] = []
        self.is_prepared = self.is_closed = False

    async def compile(
        self, spec: GrammarSpec, *, after_space: bool = False, salt: bytes = b""
    ) -> Grammar:
        self.asked.append((spec.kind, spec.source, after_space))
        if self.error is not None:
            raise self.error
        return FakeGrammar()

    def prepare(self) -> None:
        self.is_prepared = True

    def close(self) -> None:
        self.is_closed = True


def chat(model: FakeModel, *roles: str, **fields: Any) -> Prepared:
    messages = [{"role": role, "content": "x"} for role in roles or ("user",)]
    body = {"model": "fake", "messages": messages, "guided_regex": "a", **fields}
    return prepare_chat(json.dumps(body).encode(), model)


def submit(engine: FakeEngine, prepared: Prepared) -> None:
    async def run() -> None:
        generation = await Generation.submit(engine, "id", prepared)
        await generation.aclose()

    asyncio.run(run())


def test_all_answers_of_a_request_share_one_grammar() -> None:
    grammars = FakeGrammars()
    model, engine = FakeModel(grammars=grammars), FakeEngine()
    body = {"model": "fake", "prompt": ["x", "y"], "n": 3, "guided_regex": "a"}
    submit(engine, prepare_completion(json.dumps(body).encode(), model))
    assert grammars.asked == [("regex", "a", False)]
    (grammar,) = {each.params.grammar for each in engine.submitted}
    assert isinstance(grammar, FakeGrammar) and len(engine.submitted) == 6


def test_without_one_nothing_is_compiled() -> None:
    grammars = FakeGrammars()
    engine = FakeEngine()
    prepared = chat(FakeModel(grammars=grammars), guided_regex=None)
    submit(engine, prepared)
    assert prepared.compile_grammar is None and not grammars.asked
    assert engine.submitted[0].params.grammar is None


@pytest.mark.parametrize("strips", [True, False])
def test_the_grammar_allows_for_the_space_that_is_taken_away(strips: bool) -> None:
    grammars = FakeGrammars()
    model, engine = FakeModel(grammars=grammars, strip_leading_space=strips), FakeEngine()
    submit(engine, chat(model))
    submit(engine, chat(model, "user", "assistant", continue_final_message=True))
    assert [after_space for _, _, after_space in grammars.asked] == [strips, False]
    assert [each.strip_leading_space for each in engine.submitted] == [strips, False]


def test_a_grammar_that_cannot_be_compiled_runs_nothing() -> None:
    engine = FakeEngine()
    refused = FakeGrammars(InvalidRequest("guided_regex is bad", param="guided_regex"))
    with pytest.raises(InvalidRequest, match="is bad"):
        submit(engine, chat(FakeModel(grammars=refused)))
    assert not engine.submitted


def test_a_server_without_grammars_refuses_by_name() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        chat(FakeModel(), guided_regex="a")
    assert caught.value.param == "guided_regex"


FORM = {"type": "json_object"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
ASKING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**CHAT, "response_format": FORM}),
    ("/v1/completions", {"prompt": ["a", "b"], "guided_regex": "a"}),
    ("/v1/responses", {"input": "x", "text": {"format": FORM}}),
    ("/v1/messages", {**CHAT, "max_tokens": 9, "output_config": {"format": SCHEMA}}),
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("path", "fields"), ASKING)
def test_who_leaves_while_a_grammar_compiles_is_let_go(
    path: str, fields: dict[str, Any], is_stream: bool
) -> None:
    class Endless(FakeGrammars):
        salt: bytes | None = None

        async def compile(
            self, spec: GrammarSpec, *, after_space: bool = False, salt: bytes = b""
        ) -> Grammar:
            self.salt = salt
            has_left.set()
            await asyncio.Event().wait()
            raise AssertionError

    has_left = asyncio.Event()
    grammars, engine = Endless(), FakeEngine()
    policy = AccessPolicy.build("127.0.0.1", api_keys=("mine",))
    app = create_worker_app(engine, FakeModel(grammars=grammars), policy=policy)
    body = json.dumps({"model": "fake", "stream": is_stream, **fields}).encode()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [
        (b"host", b"localhost"), (b"content-type", b"application/json"),
        (b"authorization", b"Bearer mine"),
    ]  # fmt: skip
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http",
    }  # fmt: skip

    async def ask() -> None:
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(ask())
    assert sent[0]["status"] == 499 and not engine.submitted
    assert grammars.salt == hashlib.sha256(b"mine").digest()


@pytest.mark.parametrize("is_wanted", [True, False])
def test_grammars_are_prepared_before_the_worker_is_ready(
    is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards there may be streams, which would stand still."""
    from chatserve.engine import serving

    grammars, model = FakeGrammars(), FakeModel()
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    monkeypatch.setattr(serving, "load", lambda *_: (FakeEngine(), model))
    monkeypatch.setattr(worker_process, "GrammarCompiler", lambda *_: grammars)
    monkeypatch.setattr(environment, "limit_spinning", lambda: None)
    config = WorkerConfig(weights="x", prepare_grammars=is_wanted)
    _, served = worker_process.load_engine(config, lambda _loaded, _total: None)
    assert served.grammars is cast(Any, grammars) and grammars.is_prepared == is_wanted


def test_what_the_grammars_have_started_ends_with_the_model() -> None:
    grammars = FakeGrammars()
    slot = ModelSlot(["fake"])
    slot.close()  # nothing is loaded yet
    slot.fill(FakeEngine(), FakeModel(grammars=grammars))
    slot.close()
    assert grammars.is_closed
