"""Servers that are not ours: what each leaves out, adds, refuses or calls otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chatserve.cli.answer import Answer, ModelInfo
from chatserve.cli.asking import ChatOptions, ask
from chatserve.cli.client import ChatClient
from chatserve.cli.joined_server import JoinedServer
from chatserve.environment import client_api_key
from chatserve.errors import (
    BadStream,
    ChatserveError,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    ModelNotFound,
    UsageError,
    WorkerLost,
)
from tests.fake_openai import FakeOpenAI, Handler, Stream

Refusal = tuple[int, Any]


class ForeignHandler(Handler):
    server: ForeignServer

    def do_GET(self) -> None:
        assert self.path == "/v1/models", "there is nothing else to ask for"
        status, table = self.server.listed
        self._answer(status, json.dumps(table).encode())

    def _refusal(self, question: str) -> tuple[int, dict[str, str], bytes] | None:
        if (said := self.server.refuse(self.body)) is None:
            return None
        status, table = said
        return status, {}, json.dumps(table).encode()


class ForeignServer(FakeOpenAI):
    """Without `/health/ready`; refuses what `refuse` says, and knows what `listed` says."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = ForeignHandler
        self.listed: Refusal = (200, {"data": [{"id": "m"}]})
        self.refuse: Callable[[dict[str, Any]], Refusal | None] = lambda body: None


@pytest.fixture
def server() -> Iterator[ForeignServer]:
    with ForeignServer() as server:
        yield server


@pytest.fixture
def client(server: ForeignServer) -> Iterator[ChatClient]:
    client = ChatClient(server.url, sleep=lambda _: None)
    yield client
    client.close()


def said(client: ChatClient, question: str = "hello", **sampling: Any) -> Answer:
    answer = Answer()
    for delta in client.stream([{"role": "user", "content": question}], "m", **sampling):
        answer.take(delta, 0.0)
    return answer


def events(*tables: Any, done: bool = True, field: bytes = b"data:") -> Callable[[Stream], None]:
    def play(stream: Stream) -> None:
        for table in tables:
            stream.raw(field + json.dumps(table).encode() + b"\n\n")
        if done:
            stream.raw(field + b"[DONE]\n\n")

    return play


def chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


STREAMS = {
    "no blank after the colon, no usage": events(chunk(content="Hi"), chunk("stop")),
    "null where others have nothing": events(
        {"choices": [], "usage": None}, chunk(role="assistant", content=None),
        {"choices": [{"delta": None, "finish_reason": None}], "usage": None},
        chunk(content="Hi"), {"choices": None, "usage": {"completion_tokens": 1}}, chunk("stop"),
    ),
    "usage in each event": events(
        *({**chunk(content=c), "usage": {"prompt_tokens": 4, "completion_tokens": n}}
          for n, c in enumerate("Hi", 1)), chunk("stop"),
    ),
    "no [DONE]": events(chunk(content="Hi"), chunk("stop"), done=False),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_other_servers_are_answers(
    name: str, client: ChatClient, server: ForeignServer
) -> None:
    server.scripts["hello"] = STREAMS[name]
    answer = said(client)
    assert (answer.text, answer.finish_reason) == ("Hi", "stop")


def test_a_stream_that_ends_before_its_reason_is_still_no_answer(
    client: ChatClient, server: ForeignServer
) -> None:
    server.scripts["hello"] = events(chunk(content="Hi"), done=False)
    with pytest.raises(WorkerLost):
        said(client)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_what_a_model_thinks_is_no_part_of_its_answer(
    name: str, client: ChatClient, server: ForeignServer
) -> None:
    server.scripts["hello"] = events(
        chunk(**{name: "Hm"}), chunk(**{name: "m. "}), chunk(content="Hi"), chunk("stop")
    )
    answer = said(client)
    assert (answer.text, answer.reasoning) == ("Hi", "Hmm. ")


WHOLE = {
    "choices": [{"message": {"content": "Hi", "reasoning_content": "Hm"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 4, "completion_tokens": 2},
}


@pytest.mark.parametrize("asked", [{"stream": False}, {}])
def test_an_answer_in_one_piece_asked_for_or_not(
    asked: dict[str, Any], client: ChatClient, server: ForeignServer
) -> None:
    server.refuse = lambda body: (200, WHOLE)
    answer = said(client, **asked)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("Hi", "Hm", "stop")
    assert (answer.num_prompt_tokens, answer.num_tokens) == (4, 2)
    assert ("stream_options" in server.bodies[0]) is not bool(asked)


@pytest.mark.parametrize("table", [[], {}, {"choices": []}, {"choices": [{"message": 5}]}, None])
def test_a_whole_answer_that_is_none(table: Any, client: ChatClient, server: ForeignServer) -> None:
    server.refuse = lambda body: (200, table)
    with pytest.raises(BadStream, match="no chat answer"):
        said(client, stream=False)


CONTEXT = (
    "This model's maximum context length is 2048 tokens. However, you requested 2100 tokens "
    "(1588 in the messages, 512 in the completion)."
)
ERRORS: list[tuple[str, int, Any, type[ChatserveError], str]] = [
    ("llama-server", 400, {"error": {"code": 400, "message": "too long",
     "type": "exceed_context_size_error", "n_ctx": 512}}, ContextLengthExceeded, "too long"),
    ("vLLM, now", 404, {"error": {"message": "no model x", "type": "NotFoundError", "param": None,
     "code": 404}}, ModelNotFound, "no model x"),
    ("vLLM, once", 400, {"object": "error", "message": CONTEXT, "type": "BadRequestError",
     "param": None, "code": 400}, ContextLengthExceeded, "1588 in the messages"),
    ("Ollama", 404, {"error": {"message": 'model "x" not found', "type": "not_found_error"}},
     ModelNotFound, 'model "x" not found'),
    ("Ollama's own", 404, {"error": "model 'x' not found"}, ModelNotFound, "model 'x' not found"),
    ("OpenAI", 400, {"error": {"message": "no", "type": "invalid_request_error", "param": "n",
     "code": "unsupported_value"}}, InvalidRequest, "no"),
    ("FastAPI", 422, {"detail": [{"loc": ["body", "n"], "msg": "too big"}]}, InvalidRequest,
     "body.n: too big"),
    ("Starlette", 404, {"detail": "Not Found"}, ModelNotFound, "Not Found"),
    ("Gemini", 400, [{"error": {"code": 400, "message": "bad", "status": "X"}}], InvalidRequest,
     "bad"),
    ("a string", 500, "oops", GenerationFailed, "answered with status 500"),
]  # fmt: skip


@pytest.mark.parametrize(("who", "status", "table", "kind", "message"), ERRORS, ids=str)
def test_errors_of_other_servers_say_what_they_say(
    who: str, status: int, table: Any, kind: type[ChatserveError], message: str,
    client: ChatClient, server: ForeignServer,
) -> None:  # fmt: skip
    server.refuse = lambda body: (status, table)
    with pytest.raises(ChatserveError) as caught:
        said(client)
    assert type(caught.value) is kind
    assert message in caught.value.message


def test_an_error_of_an_older_vllm_in_the_middle(client: ChatClient, server: ForeignServer) -> None:
    server.scripts["hello"] = events(
        chunk(content="Hi"), {"object": "error", "message": "EngineDeadError", "code": 500}
    )
    with pytest.raises(GenerationFailed, match="EngineDeadError"):
        said(client)


def _without(name: str, message: str, code: str | None, param: str | None) -> Any:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return lambda body: (400, {"error": error}) if name in body else None


@pytest.mark.parametrize(
    ("refused", "sent"),
    [
        (_without("stream_options", "extra fields: stream_options", None, None), {"max_tokens": 5}),
        (_without("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this "
                  "model. Use 'max_completion_tokens' instead.", "unsupported_parameter",
                  "max_tokens"), {"max_completion_tokens": 5}),
    ],
    ids=["stream_options", "max_completion_tokens"],
)  # fmt: skip
def test_what_a_server_does_not_know_it_is_asked_without_from_then_on(
    refused: Any, sent: dict[str, Any], client: ChatClient, server: ForeignServer
) -> None:
    server.refuse = refused
    assert said(client, max_tokens=5).text == "Hello there."
    assert said(client, max_tokens=5).text == "Hello there."
    assert len(server.bodies) == 3
    assert {**server.bodies[-1], **sent} == server.bodies[-1]


def test_another_refusal_is_told_at_once(client: ChatClient, server: ForeignServer) -> None:
    server.refuse = _without("model", "no such thing", "unsupported_parameter", "top_k")
    with pytest.raises(InvalidRequest, match="no such thing"):
        said(client, max_tokens=5)
    assert len(server.bodies) == 1


def test_a_wished_limit_goes_where_another_server_has_no_room_for_it(
    client: ChatClient, server: ForeignServer
) -> None:
    server.refuse = lambda body: (
        (400, {"object": "error", "message": CONTEXT, "code": 400})
        if "max_tokens" in body
        else None
    )
    joined, answer = JoinedServer(client, None), Answer()
    question = [{"role": "user", "content": "hello"}]
    deltas = ask(joined, question, ChatOptions(wished_max_tokens=512), answer)
    assert "".join(delta.text for delta in deltas) == "Hello there."
    with pytest.raises(ContextLengthExceeded):
        list(ask(joined, question, ChatOptions({"max_tokens": 512}), answer))


LISTS: list[Refusal] = [
    (404, {"detail": "Not Found"}), (405, {}), (200, {"models": []}), (500, "oops"),
    (200, {"data": [{"id": "x" * (5 * 1024 * 1024)}]}),
]  # fmt: skip


@pytest.mark.parametrize("listed", LISTS, ids=range(len(LISTS)))
def test_a_named_model_needs_no_list(
    listed: Refusal, client: ChatClient, server: ForeignServer
) -> None:
    server.listed = listed
    assert JoinedServer(client, "m").model() == ModelInfo("m")
    if listed[0] != 500:
        with pytest.raises(UsageError, match="name a model by --model NAME"):
            JoinedServer(client, None)


def test_of_many_models_some_are_named(client: ChatClient, server: ForeignServer) -> None:
    server.listed = 200, [{"id": f"m{n}", "max_model_len": n} for n in range(400)]
    with pytest.raises(UsageError, match=r"serves m0, .*, m19 and 380 more; choose one"):
        JoinedServer(client, None)
    assert JoinedServer(client, "m7").model() == ModelInfo("m7", context_length=7)


@pytest.mark.parametrize(
    ("variables", "url", "key"),
    [
        ({"CHATSERVE_API_KEY": "c", "OPENAI_API_KEY": "o"}, "http://one/v1", "c"),
        ({"OPENAI_API_KEY": "o"}, "http://one/v1", None),
        ({"OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "https://one/v1"}, "https://one:443", "o"),
        ({"OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "https://one/v1"}, "http://one/v1", None),
        ({"OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "https://one/v1"}, "https://one.two/v1", None),
        ({"OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "https://one/v1"}, "https://one:8/v1", None),
        ({"OPENAI_API_KEY": "o", "OPENAI_BASE_URL": "http://[x"}, "http://[x", None),
    ],
)
def test_a_key_goes_to_nobody_that_it_was_not_made_for(
    variables: dict[str, str], url: str, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHATSERVE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert client_api_key(url) == key
