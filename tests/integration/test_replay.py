"""An answer is logged as it is given, and repeated by `chatserve replay`: the same tokens from the
same model, the first difference from another one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from chatserve.cli.commands import replay
from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.errors import BadStream, NoWorkerAvailable, UsageError
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.server import replay_log
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.recording import RecordingEngine
from chatserve.server.replay_log import LoggedAnswer, ReplayLog, newest
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import RunningServer, serving

KEY = "sk-secret-of-a-client"
CHAT: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12,
    "temperature": 1, "logit_bias": {str(tiny.EOS_ID): -100}, "top_p": 0.9,
    "extra_body": {"min_tokens": 3},
}  # fmt: skip


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "on": {"format": "date"}},
    "required": ["name", "on"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PERSON}} for name in "ab"]
CONSTRAINED: dict[str, dict[str, Any]] = {
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "person", "schema": PERSON},
        }
    },
    "regex": {"guided_regex": "[a-f]{5,9}"},
    "choice": {"guided_choice": ["a bc", "a bd", "zz"]},
    "gbnf": {"guided_grammar": 'root ::= "a" [0-9]+'},
    "lark": {"guided_grammar": "start: /[g-p]{5,9}/"},
    "tools": {"tools": TOOLS, "tool_choice": "required"},
    "one tool": {
        "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "b"}},
    },
    "tools or text": {"tools": TOOLS},
}  # fmt: skip


@contextmanager
def worker(folder: Path, log: ReplayLog, *, after_space: bool = False) -> Iterator[RunningServer]:
    config = WorkerConfig(
        weights=str(folder), device="cpu", dtype="float32", model_names=("tiny",), self_check=False
    )
    engine, model = load(config)
    grammars = GrammarCompiler(model.tokenizer, model.vocab_size)
    model = replace(model, strip_leading_space=after_space, grammars=grammars)
    recording = RecordingEngine(engine, model, log)

    def build() -> Edge:
        recording.start()
        policy = AccessPolicy.build("127.0.0.1", api_keys=[KEY])
        return create_worker_app(recording, model, policy=policy)

    with closing(grammars), serving(build) as server:
        yield server
        server.call(recording.stop())


class House:
    """A server with a log, and one of other weights."""

    def __init__(
        self, path: Path, log: ReplayLog, url: str, other_url: str, spaced_url: str
    ) -> None:
        self.path, self.log = path, log
        self.url, self.other_url, self.spaced_url = url, other_url, spaced_url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

    def ask(self, url: str, **fields: Any) -> dict[str, Any]:
        answer = httpx.post(
            f"{url}/v1/chat/completions", json=fields, trust_env=False, timeout=60,
            headers={"Authorization": f"Bearer {KEY}"},
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        reply: dict[str, Any] = answer.json()
        return reply

    def logged(self, answer_id: str) -> list[LoggedAnswer]:
        """What the log has of an answer, once it is written."""
        self.log.flush()
        return replay_log.find(self.path, answer_id)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("replay")
    tiny.save_model(root / "tiny", max_position_embeddings=2048)
    tiny.save_model(root / "other", seed=1, max_position_embeddings=2048)
    path = root / "replay.db"
    with ExitStack() as stack:
        log = stack.enter_context(closing(ReplayLog(path)))
        unread = stack.enter_context(closing(ReplayLog(root / "unread.db")))
        server = stack.enter_context(worker(root / "tiny", log))
        other = stack.enter_context(worker(root / "other", unread))
        spaced = stack.enter_context(worker(root / "tiny", log, after_space=True))
        yield House(path, log, server.url, other.url, spaced.url)


@pytest.fixture(autouse=True)
def home(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(house.path.parent))
    monkeypatch.setenv("CHATSERVE_API_KEY", KEY)


def test_an_answer_without_a_seed_is_repeated(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = house.client.chat.completions.create(**CHAT, n=3)
    logged = house.logged(answer.id)
    assert [each.choice for each in logged] == [0, 1, 2]
    assert len({each.sampling["seed"] for each in logged}) == 1
    assert len({tuple(each.token_ids) for each in logged}) == 3
    assert replay.main([answer.id, "--base-url", house.url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{answer.id} choice {choice}: all 12 tokens are the same, "
        f"fingerprint {answer.system_fingerprint}"
        for choice in range(3)
    ]


def test_another_model_differs_at_a_named_token(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = house.client.chat.completions.create(**CHAT)
    [logged] = house.logged(answer.id)
    assert replay.main([answer.id, "--base-url", house.other_url]) == 1
    text = capsys.readouterr().out
    assert replay.main([answer.id, "--base-url", house.other_url, "--json"]) == 1
    [found] = map(json.loads, capsys.readouterr().out.splitlines())
    position, now = found["position"], found["token_now"]
    then = logged.token_ids[position]
    assert found["token"]["id"] == then != now["id"]
    assert found["fingerprint"] == answer.system_fingerprint != found["fingerprint_now"]
    assert f"token {position} of 12 differs: then " in text and f"({then}), now " in text
    assert f"then {found['fingerprint']}, now {found['fingerprint_now']}" in text
    assert json.dumps(now["text"]) in text
    # all before it is the same
    body = {
        "model": "tiny", "prompt": logged.prompt_ids, "max_tokens": 12, "return_token_ids": True,
        **logged.sampling,
    }  # fmt: skip
    reply = httpx.post(
        f"{house.other_url}/v1/completions", json=body,
        headers={"Authorization": f"Bearer {KEY}"}, trust_env=False,
    ).json()  # fmt: skip
    said = reply["choices"][0]["token_ids"]
    assert said[:position] == logged.token_ids[:position] and said[position] == now["id"]


def test_a_stream_is_logged_like_a_whole_answer(house: House) -> None:
    chunks = list(house.client.chat.completions.create(**CHAT, seed=7, stream=True))
    [logged] = house.logged(chunks[0].id)
    assert (logged.sampling["seed"], logged.finish_reason) == (7, "length")
    assert len(logged.token_ids) == 12
    assert replay.main([chunks[0].id, "--base-url", house.url, "--json"]) == 0


def test_several_prompts_have_an_entry_each(house: House) -> None:
    answer = house.client.completions.create(
        model="tiny", prompt=["a", "a", "bc"], max_tokens=5, n=2, temperature=1
    )
    logged = house.logged(answer.id)
    assert [(each.id, each.choice) for each in logged] == [
        (f"{answer.id}-{prompt}", choice) for prompt in range(3) for choice in range(2)
    ]
    # prompts that are alike do not say the same
    assert logged[0].prompt_ids == logged[2].prompt_ids
    assert logged[0].sampling["seed"] != logged[2].sampling["seed"]
    assert replay.main([answer.id, "--base-url", house.url]) == 0
    assert replay.main([f"{answer.id}-1", "--base-url", house.url]) == 0


def test_a_client_that_left_leaves_what_it_was_told(house: House) -> None:
    bias = {**CHAT["logit_bias"], str(tiny.BOS_ID): -100, str(tiny.START_ID): -100}
    with house.client.chat.completions.create(
        **{**CHAT, "max_tokens": 400, "logit_bias": bias}, stream=True
    ) as stream:
        answer_id = next(iter(stream)).id
    for _ in range(2000):
        if logged := house.logged(answer_id):
            break
    assert logged[0].finish_reason is None and len(logged[0].token_ids) < 400
    if logged[0].token_ids:
        assert replay.main([answer_id, "--base-url", house.url]) == 0


def test_no_key_is_in_the_log(house: House) -> None:
    answer = house.client.chat.completions.create(**CHAT)
    assert house.logged(answer.id)
    content = b"".join(file.read_bytes() for file in house.path.parent.glob("replay.db*"))
    assert answer.id.encode() in content and KEY.encode() not in content


def test_the_newest_are_listed(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    answer = house.client.chat.completions.create(**CHAT)
    [logged] = house.logged(answer.id)
    assert replay.main([]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{answer.id}  choice 0  ")
    assert first.endswith(f"{len(logged.prompt_ids)} + 12 tokens  length  {logged.fingerprint}")


def of_grammar(house: House, url: str, fields: dict[str, Any]) -> tuple[str, LoggedAnswer]:
    """An answer that has to match one: its id, and what the log has of it."""
    common = {
        "model": "tiny", "messages": CHAT["messages"], "max_tokens": 40, "temperature": 1.5,
        "seed": 11,
    }  # fmt: skip
    answer_id = house.ask(url, **common, **fields)["id"]
    [logged] = house.logged(answer_id)
    assert logged.grammar is not None
    return answer_id, logged


@pytest.mark.parametrize("after_space", [False, True])
@pytest.mark.parametrize("name", CONSTRAINED)
def test_an_answer_that_had_to_match_something(
    house: House, name: str, after_space: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    url = house.spaced_url if after_space else house.url
    answer_id, logged = of_grammar(house, url, CONSTRAINED[name])
    assert logged.grammar is not None
    kind = "tools" if "tool" in name else name
    # tools' own grammar has the space in it
    told = after_space and kind != "tools"
    assert (logged.grammar["kind"], logged.grammar["after_space"]) == (kind, told)
    # repeated by a server that would not add a space itself
    assert replay.main([answer_id, "--base-url", house.url]) == 0
    number = len(logged.token_ids)
    assert f"choice 0: all {number} tokens are the same" in capsys.readouterr().out
    # without it the model says something else
    house.log.add(replace(logged, id="free", grammar=None))
    house.log.flush()
    if name != "tools or text":
        assert replay.main(["free", "--base-url", house.url]) == 1
        assert "choice 0: token " in capsys.readouterr().out


def test_another_grammar_differs_at_a_named_token(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    _, logged = of_grammar(house, house.url, {"guided_regex": "ab[cd]e+f{3}"})
    assert logged.grammar is not None
    narrower = {**logged.grammar, "source": "abx"}
    house.log.add(replace(logged, id="odd", grammar=narrower))
    house.log.flush()
    assert replay.main(["odd", "--base-url", house.url, "--json"]) == 1
    [found] = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["position"], found["token_now"]["text"]) == (2, "x")


def test_a_replay_is_known_by_its_id(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    answer_id, logged = of_grammar(house, house.url, CONSTRAINED["choice"])
    assert replay.main([answer_id, "--base-url", house.url]) == 0
    house.log.flush()
    [again] = newest(house.path, 1)
    assert again.id.startswith("replay-")
    assert (again.grammar, again.token_ids) == (logged.grammar, logged.token_ids)
    assert replay.main([again.id, "--base-url", house.url]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("replay-")


def test_a_server_that_knows_no_replays(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_id, logged = of_grammar(house, house.url, CONSTRAINED["choice"])
    reply = {
        "id": "cmpl-1", "system_fingerprint": "x",
        "choices": [{"index": 0, "token_ids": logged.token_ids}],
    }  # fmt: skip
    monkeypatch.setattr("chatserve.cli.client.ChatClient.post", lambda *_, **__: reply)
    with pytest.raises(BadStream, match="to which the server has not held its answer"):
        replay.main([answer_id])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": []}, "ended before its first token"),
    ],
)
def test_what_cannot_be_repeated(house: House, changes: dict[str, Any], message: str) -> None:
    house.client.chat.completions.create(**CHAT)
    house.log.flush()
    fields = json.loads(newest(house.path, 1)[0].to_json())
    house.log.add(LoggedAnswer(**{**fields, "id": "odd", **changes}))
    house.log.flush()
    with pytest.raises(UsageError, match=message):
        replay.main(["odd", "--base-url", house.url])


def test_an_unknown_id_and_no_log(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"chatcmpl-none is not in the replay log"):
        replay.main(["chatcmpl-none"])
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="there is no replay log"):
        replay.main(["chatcmpl-none"])


def test_a_server_that_is_not_there(house: House) -> None:
    answer = house.client.chat.completions.create(**CHAT)
    assert house.logged(answer.id)
    with pytest.raises(NoWorkerAvailable, match="cannot reach"):
        replay.main([answer.id, "--base-url", "http://127.0.0.1:9"])


def test_ids_that_were_generated_are_returned_where_they_are_asked_for(house: House) -> None:
    def ids(reply: Any) -> list[list[int]]:
        return [choice.token_ids for choice in reply.choices]

    asked: dict[str, Any] = {"extra_body": {"return_token_ids": True}}
    options = {**CHAT, "n": 2, "seed": 3, **asked}
    whole: Any = house.client.chat.completions.create(**options)
    logged = house.logged(whole.id)
    assert ids(whole) == [each.token_ids for each in logged]
    assert whole.prompt_token_ids == logged[0].prompt_ids
    streamed: list[list[int]] = [[], []]
    prompts = []
    for chunk in house.client.chat.completions.create(**options, stream=True):
        prompts.append(getattr(chunk, "prompt_token_ids", None))
        for choice in chunk.choices:
            streamed[choice.index] += getattr(choice, "token_ids", [])
    assert streamed == ids(whole)
    assert prompts[:2] == [whole.prompt_token_ids] * 2 and not any(prompts[2:])
    text: Any = house.client.completions.create(
        model="tiny", prompt=[[1, 2], [3]], max_tokens=4, n=2,
        logit_bias={str(tiny.EOS_ID): -100}, **asked,
    )  # fmt: skip
    assert [choice.prompt_token_ids for choice in text.choices] == [[1, 2], [1, 2], [3], [3]]
    assert [len(each) for each in ids(text)] == [4, 4, 4, 4]
    plain = house.client.chat.completions.create(**CHAT).model_dump()
    assert "token_ids" not in plain["choices"][0] and "prompt_token_ids" not in plain


def test_a_worker_with_the_flag_keeps_a_log(tmp_path: Path) -> None:
    from chatserve.server.model_slot import ModelSlot
    from chatserve.server.worker_process import _fill
    from tests.fakes import FakeEngine, FakeModel

    engine = FakeEngine()
    for log in (None, ReplayLog(tmp_path / "replay.db")):
        slot = ModelSlot(("fake",))
        asyncio.run(
            _fill(
                slot, WorkerConfig(), lambda *_: (engine, FakeModel()), log, on_ready=lambda: None
            )
        )
        assert isinstance(slot.engine, RecordingEngine) == (log is not None)
        if log is not None:
            log.close()
