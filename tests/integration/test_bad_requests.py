"""Bad input over the whole API: refused by a 4xx that names the field, never a crash, and the
server answers the next request as if nothing had happened."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatserve.config import WorkerConfig
from chatserve.engine.sequence import SamplingParams, TokenEvent, TokenLogprobs
from chatserve.engine.serving import load
from chatserve.protocol.fields import MAX_NESTING
from chatserve.protocol.replies import ErrorReply
from chatserve.server.contract import ServedModel
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.openapi.document import OPERATIONS, document
from chatserve.server.openapi.operation import Operation
from chatserve.server.worker import create_worker_app
from tests import hostile, tiny
from tests.asgi import Answer, RunningApp, running
from tests.fakes import FakeEngine
from tests.schema_values import values_of
from tests.servers import http_request, send_raw, serving

KEY = "key"
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "fake", "prompt": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
TOOL_CHAT = {
    **CHAT, "tool_choice": "none", "parallel_tool_calls": False,
    "messages": [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": [CALL]},
                 {"role": "tool", "tool_call_id": "c", "name": "f", "content": "r"}],
    "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"x": {"type": "array", "items": {"$ref": "#/$defs/D"}}},
        "$defs": {"D": {"anyOf": [{"properties": {}}, {"type": "null"}]}}}}}],
}  # fmt: skip
FULL_CHAT = {
    **CHAT, "stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 3,
    "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["a", "b"],
    "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1, "user": "me",
    "logit_bias": {"5": 1}, "metadata": {"a": "b"},
}  # fmt: skip
FULL_TEXT = {
    "model": "fake", "prompt": ["hi", [1, 2]], "n": 2, "best_of": 2, "max_tokens": 3, "seed": 1,
    "stop": "x", "temperature": 0, "echo": False, "logit_bias": {},
}  # fmt: skip
POSTS: dict[str, Operation] = {each.path: each for each in OPERATIONS if each.body is not None}


def seeds() -> list[tuple[str, dict[str, Any]]]:
    """A valid body for every route, more for the ones with the most fields."""
    examples = [
        (path, {**each.body.example, **({"model": "fake"} if "model" in each.body.example else {})})
        for path, each in POSTS.items()
        if each.body is not None
    ]
    return [
        *examples,
        ("/v1/chat/completions", CHAT), ("/v1/chat/completions", FULL_CHAT),
        ("/v1/chat/completions", TOOL_CHAT),
        ("/v1/completions", TEXT), ("/v1/completions", FULL_TEXT),
    ]  # fmt: skip


class ScoringEngine(FakeEngine):
    """With a logprob for every token."""

    def _script(self, seq_id: str, num_prompt: int, params: SamplingParams) -> list[TokenEvent]:
        first, *rest = super()._script(seq_id, num_prompt, params)
        if params.prompt_logprobs is not None:
            first = replace(first, prompt_logprobs=(None, *[SCORE] * (num_prompt - 1)))
        events = [first, *rest]
        if params.logprobs is None:
            return events
        return [replace(each, logprobs=(SCORE,) * len(each.token_ids)) for each in events]


SCORE = TokenLogprobs(5, -1.5, ((5, -1.5), (6, -2.5)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """Tokenizer, template and limits are real; only the network is not asked."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, max_position_embeddings=1024)
    return load(WorkerConfig(weights=str(folder), device="cpu", model_names=("fake",)))[1]


def build(model: ServedModel) -> Edge:
    policy = AccessPolicy.build("127.0.0.1", api_keys=[KEY])
    return create_worker_app(ScoringEngine(["a", "b"]), model, policy=policy)


HEADERS = (("content-type", "application/json"), ("authorization", f"Bearer {KEY}"))


class Api:
    def __init__(self, app: RunningApp) -> None:
        self.app = app

    def send(self, path: str, body: bytes) -> Answer:
        return self.app.request("POST", path, body, headers=HEADERS)

    def post(self, path: str, payload: Any) -> Answer:
        return self.send(path, json.dumps(payload).encode())


@pytest.fixture(scope="module")
def api(model: ServedModel) -> Iterator[Api]:
    with running(build(model)) as app:
        yield Api(app)


def check(path: str, body: bytes, answer: Answer) -> None:
    """An answer, or a refusal in the right shape that names the field."""
    shown = (path, body[:500], answer.status, answer.body[:500])
    assert answer.status in (200, 400, 404, 413), shown
    if answer.status == 200 or POSTS[path].error is not ErrorReply:
        return
    error = answer.error
    assert error["type"] == "invalid_request_error" and error["code"], shown
    assert error["message"] and "\n" not in error["message"], shown
    assert len(error["message"]) < 1000, shown
    if is_object(body):
        assert error["param"] and isinstance(error["param"], str), shown


def is_object(body: bytes) -> bool:
    """Whether a field can be at fault: the body is an object, and not too deep for one."""
    try:
        return isinstance(orjson.loads(body), dict) and depth(body) <= MAX_NESTING
    except orjson.JSONDecodeError:
        return False


def depth(body: bytes) -> int:
    deepest = now = 0
    for byte in body:
        now += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, now)
    return deepest


def test_ten_thousand_spoilt_bodies(api: Api) -> None:
    random = Random(5)
    all_seeds = seeds()
    seen: Counter[int] = Counter()
    for number in range(10_000):
        path, seed = all_seeds[number % len(all_seeds)]
        body = hostile.spoilt(seed, random)
        answer = api.send(path, body)
        seen[answer.status] += 1
        check(path, body, answer)
    # neither is everything refused, nor nothing
    assert seen[200] > 500 and seen[400] > 5_000, seen
    assert api.post("/v1/chat/completions", CHAT).status == 200


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)  # fmt: skip
FLAT = st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=8), SCALARS, max_size=3)
JSON = SCALARS | FLAT | st.lists(FLAT, max_size=2)
NAMES = st.sampled_from([*hostile.FIELDS, "max_completion_tokens", "repetition_penalty"])


@settings(
    max_examples=2_500, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.dictionaries(NAMES | st.text(max_size=8), JSON, max_size=3), st.booleans())
def test_any_json_in_any_field(api: Api, fields: dict[str, Any], is_chat: bool) -> None:
    path, seed = ("/v1/chat/completions", CHAT) if is_chat else ("/v1/completions", TEXT)
    for payload in (fields, {**seed, **fields}):
        body = json.dumps(payload).encode("utf-8", "replace")
        check(path, body, api.send(path, body))


USER = {"role": "user", "content": "hi"}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
INT64 = 2**63
# route, field, what is allowed at least and at most, the next value beyond
LIMITS: list[tuple[str, str, float, float, float]] = [
    *((path, *limit) for path in (CHATS, TEXTS) for limit in (
        ("n", 1, 8, 1),
        ("temperature", 0, 2, 0.001),
        ("top_p", 0.0001, 1, 0.0001),
        ("top_k", -1, INT64 - 1, 1),
        ("min_p", 0, 1, 0.001),
        ("repetition_penalty", 0.01, 2, 0.001),
        ("presence_penalty", -2, 2, 0.001),
        ("frequency_penalty", -2, 2, 0.001),
        ("seed", -INT64, INT64 - 1, 1),
    )),
    (CHATS, "max_tokens", 1, 1000, 100),
    (CHATS, "max_completion_tokens", 1, 1000, 100),
    (TEXTS, "max_tokens", 0, 1000, 100),
    (TEXTS, "best_of", 1, 8, 1),
    (TEXTS, "logprobs", 0, 20, 1),
    (CHATS, "top_logprobs", 0, 20, 1),
]  # fmt: skip


@pytest.mark.parametrize(("path", "field", "low", "high", "step"), LIMITS)
def test_numbers_at_their_limits(
    api: Api, path: str, field: str, low: float, high: float, step: float
) -> None:
    seed = CHAT | {"logprobs": True} if field == "top_logprobs" else CHAT if path == CHATS else TEXT
    for value in {low, high, low - step, high + step, -1, 0, -INT64 - 1, INT64, 2**64}:
        payload = {**seed, field: value}
        answer = api.post(path, payload)
        if low <= value <= high:
            assert answer.status == 200, (value, answer.body)
        else:
            assert (answer.status, answer.error["param"]) == (400, field), value


def lists(field: str, entry: Any, most: int) -> list[tuple[str, Any, bool]]:
    return [(field, [], False), (field, [entry] * most, True), (field, [entry] * (most + 1), False)]


@pytest.mark.parametrize(
    ("field", "value", "is_allowed"),
    [
        *lists("messages", USER, 1024),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": ""}] * 1024}], True),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}], False),
        ("stop", [], True), ("stop", ["x"] * 16, True), ("stop", ["x"] * 17, False),
        ("stop", "", False), ("stop", "x" * 256, True), ("stop", "x" * 257, False),
        ("stop", "é" * 128, True), ("stop", "é" * 129, False),
        ("logit_bias", {}, True), ("logit_bias", {"5": 100}, True),
        ("logit_bias", {"5": -100}, True), ("logit_bias", {"5": 100.01}, False),
        ("logit_bias", {"5": -101}, False),
        ("logit_bias", {"319": 1}, True), ("logit_bias", {"320": 1}, False),
        ("logit_bias", {"-1": 1}, False), ("logit_bias", {str(i): 1 for i in range(1025)}, False),
        ("model", "x" * 501, False), ("model", "", False),
    ],
)  # fmt: skip
def test_lists_and_texts_at_their_limits(
    api: Api, field: str, value: Any, is_allowed: bool
) -> None:
    answer = api.post(CHATS, {**CHAT, field: value})
    shown = answer.body[:300]
    if is_allowed:
        # a thousand messages are allowed, and more than this model holds
        assert answer.status == 200 or answer.error["code"] == "context_length_exceeded", shown
    else:
        assert answer.status in (400, 404), shown
        assert answer.error["param"].startswith(field), shown


@pytest.mark.parametrize(
    ("value", "is_allowed"),
    [
        ([], False), ("", False), (["x"] * 64, True), (["x"] * 65, False), ([0], True),
        ([-1], False), ([258], True), ([320], False), ([[5]] * 64, True), ([[]], False),
        ([5] * 1023, True), ([5] * 1024, False), ("x" * 1023, True),
        ("x" * 1024, False), ("x" * 100_000, False),
    ],
)  # fmt: skip
def test_prompts_at_their_limits(api: Api, value: Any, is_allowed: bool) -> None:
    answer = api.post(TEXTS, {"model": "fake", "prompt": value, "max_tokens": 1})
    if is_allowed:
        assert answer.status == 200, answer.body[:300]
    else:
        assert (answer.status, answer.error["param"]) == (400, "prompt"), answer.body[:300]


CONTENT_TYPES = (
    "", "text/plain", "application/json; charset=utf-16", "application/json; charset=latin-1",
    "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "application/xml",
    "application/json, application/json", "application/jsonp", "application/json+x", "json",
    "text/html; charset=application/json", "*/*", "application/json\x00", "application /json",
)  # fmt: skip


@pytest.mark.parametrize("kind", CONTENT_TYPES)
def test_hostile_content_types(api: Api, kind: str) -> None:
    body = json.dumps(CHAT).encode()
    headers = (("content-type", kind), HEADERS[1])
    answer = api.app.request("POST", CHATS, body, headers=headers)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"a":' * 60_000 + b"1" + b"}" * 60_000, 400),
        (b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}", 400),
        (b'{"model":"fake","messages":[' + b"0," * 1_000_000 + b"0]}", 400),
        (b'{"model":"' + b"x" * 4_000_000 + b'","messages":[{"role":"user","content":"hi"}]}', 400),
        (b" " * 4_194_305, 413),
        (b"9" * 4_000_000, 400),
        (b'"' + b"\\u0041" * 600_000 + b'"', 400),
    ],
    ids=["brackets", "deep list", "deep object", "300,000 fields", "a million messages",
         "long model", "over the limit", "long number", "long text"],
)  # fmt: skip
def test_huge_and_deep_bodies(api: Api, body: bytes, status: int) -> None:
    for path in (CHATS, TEXTS):
        assert api.send(path, body).status == status
    assert api.post(CHATS, CHAT).status == 200


def answers_of(sock: Any, number: int) -> Iterator[tuple[int, bytes]]:
    """Status and body of so many answers that come one after the other."""
    data = b""
    for _ in range(number):
        while b"\r\n\r\n" not in data:
            data += sock.recv(65536)
        head, _, data = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(data) < length:
            data += sock.recv(65536)
        yield int(head.split()[1]), data[:length]
        data = data[length:]


def test_a_sample_over_one_connection_of_a_real_server(model: ServedModel) -> None:
    random = Random(6)
    all_seeds = [seed for seed in seeds() if not seed[1].get("stream")]
    key = {"Authorization": f"Bearer {KEY}"}
    with serving(lambda: build(model)) as server:
        sock = send_raw(server.port, b"")
        with sock:
            for number in range(200):
                path, seed = all_seeds[number % len(all_seeds)]
                body = hostile.spoilt(seed, random)
                # an answer to a stream has no length, and there are many tests of those
                body = body.replace(b'"stream"', b'"steam"')
                sock.sendall(http_request("POST", path, body or b" ", headers=key))
                sock.sendall(http_request("POST", CHATS, CHAT, headers=key))
                (status, reply), (good, _) = answers_of(sock, 2)
                check(path, body, Answer(status, {}, reply))
                assert good == 200


# what the document says in words and no schema can: fields that do not go together, sizes in
# bytes, ids and lengths that the model at hand does not have
BEYOND_THE_SCHEMA = re.compile(
    r"context_length_exceeded|there is no token|token ids of|only one|needs |with |must be at most"
    r"|stop text must have|is for |give either|cannot be below|is not offered|together|empty"
    r"|\.arguments|ask for at most|as many of both|is no regex|send one|the contrary of"
    r"|can be held to|previous_response_not_found|no tool named|keeps no responses|it must be 1 to"
    r"|tokens at most|two tools named|is a text that|give one|cannot be streamed|zero in its first"
    r"|less than n|in quotes"
)
SCHEMAS = document()["components"]["schemas"]


@pytest.mark.parametrize("path", [path for path, each in POSTS.items() if each.access != "keyed"])
def test_what_the_document_allows_has_no_wrong_shape(api: Api, path: str) -> None:
    operation = POSTS[path]
    assert operation.body is not None
    schema = dict(SCHEMAS[operation.body.kind.__name__])
    properties = {**schema["properties"]}
    if "model" in properties:
        properties["model"] = {"const": "fake"}
    if "messages" in properties:
        # which turn may follow which is beyond any schema, and has tests of its own
        properties["messages"] = {"const": [USER]}
    if path == "/v1/responses":
        properties["input"] = {"const": "hi"}
    bodies = values_of({**schema, "properties": properties}, SCHEMAS)
    seen: Counter[int] = Counter()

    @settings(
        max_examples=80, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(bodies)
    def check_one(body: Any) -> None:
        answer = api.post(path, body)
        seen[answer.status] += 1
        if answer.status != 200:
            assert answer.status == 400, (body, answer.body)
            assert BEYOND_THE_SCHEMA.search(answer.body.decode()), (body, answer.body)

    check_one()
    assert seen[200] > 5, seen
