"""The routes under /page/: what is kept, what is refused, and that other pages get nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from chatserve.options import KeepingOptions
from chatserve.server import conversation_store
from chatserve.server.controller import create_controller_app
from chatserve.server.conversation_store import ConversationStore
from chatserve.server.conversations import NUM_THREADS, PATH, VOTES_PATH, store_for
from chatserve.server.edge import AccessPolicy
from chatserve.server.registry import WorkerRegistry
from tests.asgi import Answer, RunningApp, running
from tests.fakes import FakeClock
from tests.unit.server.test_conversation_store import conversation

ONE = f"{PATH}/chat-one"
JSON = ("content-type", "application/json")
KEYS = {"key": ("authorization", "Bearer k1"), "other": ("authorization", "Bearer k2")}


class Site(RunningApp):
    def ask(self, method: str, path: str, payload: Any = None, *headers: tuple[str, str]) -> Answer:
        body = b"" if payload is None else json.dumps(payload).encode()
        kind = () if payload is None else (JSON,)
        return self.request(method, path, body, headers=(*kind, *headers))


@pytest.fixture
def store(tmp_path: Path) -> ConversationStore:
    return ConversationStore(tmp_path / "page" / "conversations.db", max_own_bytes=100_000)


def site(store: ConversationStore | None, **options: Any) -> Any:
    policy = AccessPolicy.build("127.0.0.1", control_token="t", **options)
    registry = WorkerRegistry(FakeClock())
    return create_controller_app(registry, control_token="t", policy=policy, conversations=store)


@pytest.fixture
def open_site(store: ConversationStore) -> Iterator[Site]:
    with running(site(store)) as app:
        yield Site(app._app, app.runner)


@pytest.fixture
def keyed_site(store: ConversationStore) -> Iterator[Site]:
    with running(site(store, api_keys=["k1", "k2"])) as app:
        yield Site(app._app, app.runner)


def test_from_the_first_to_the_last(open_site: Site) -> None:
    empty = open_site.ask("GET", PATH)
    assert json.loads(empty.body) == {"conversations": [], "is_kept": True}
    put = open_site.ask("PUT", ONE, conversation())
    assert put.status == 200
    summary = json.loads(put.body)
    assert summary["revision"] == 1
    assert json.loads(open_site.ask("GET", ONE).body) == conversation(revision=1)
    assert json.loads(open_site.ask("GET", PATH).body)["conversations"] == [summary]
    for _ in range(2):
        gone = open_site.ask("DELETE", ONE)
        assert (gone.status, gone.body) == (204, b"")
    missing = open_site.ask("GET", ONE)
    assert (missing.status, missing.error["code"]) == (404, "conversation_not_found")
    for answer in (empty, put, gone):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_search(open_site: Site) -> None:
    open_site.ask("PUT", ONE, conversation())

    def found(query: bytes) -> Any:
        scope_path = PATH
        from tests import asgi

        scope = asgi._scope("GET", scope_path, [("host", "127.0.0.1")])
        scope["query_string"] = query
        answer = open_site.runner.run(asgi._call(open_site._app, scope, [b""]))
        return answer.status, json.loads(answer.body)

    assert len(found(b"search=HELL")[1]["conversations"]) == 1
    assert found(b"search=no")[1]["conversations"] == []
    assert found(b"search=" + b"x" * 1001)[0] == 400


def test_a_late_change_gets_the_newer_one(open_site: Site) -> None:
    open_site.ask("PUT", ONE, conversation(title="first"))
    late = open_site.ask("PUT", ONE, conversation(title="late"))
    answer = json.loads(late.body)
    assert (late.status, answer["error"]["code"]) == (409, "conversation_changed")
    assert answer["conversation"] == conversation(title="first", revision=1)
    open_site.ask("DELETE", ONE)
    gone = open_site.ask("PUT", ONE, conversation(revision=1))
    assert (gone.status, gone.error["code"]) == (404, "conversation_not_found")


def test_keys_are_apart(keyed_site: Site) -> None:
    assert keyed_site.ask("GET", PATH).status == 401
    assert keyed_site.ask("PUT", ONE, conversation()).status == 401
    assert keyed_site.ask("PUT", ONE, conversation(), KEYS["key"]).status == 200
    # the same key, as Anthropic's SDK sends it
    assert keyed_site.ask("GET", ONE, None, ("x-api-key", "k1")).status == 200
    assert keyed_site.ask("GET", ONE, None, KEYS["other"]).status == 404
    listed = json.loads(keyed_site.ask("GET", PATH, None, KEYS["other"]).body)
    assert listed["conversations"] == []
    assert keyed_site.ask("DELETE", ONE, None, KEYS["other"]).status == 204
    assert keyed_site.ask("GET", ONE, None, KEYS["key"]).status == 200


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another id": ({"id": "chat-two"}, "id"),
    "revision": ({"revision": -1}, "revision"),
    "revision true": ({"revision": True}, "revision"),
    "revision huge": ({"revision": 2**53}, "revision"),
    "revision float": ({"revision": 1.0}, "revision"),
    "title": ({"title": None}, "title"),
    "title long": ({"title": "x" * 1001}, "title"),
    "time": ({"changed_at": "now"}, "changed_at"),
    "time bool": ({"created_at": True}, "created_at"),
    "time beyond all": ({"changed_at": 2**64 - 1}, "changed_at"),
    "models": ({"models": "m"}, "models"),
    "three models": ({"models": ["a", "b", "c"]}, "models"),
    "model long": ({"models": ["m" * 1001]}, "models"),
    "messages": ({"messages": {}}, "messages"),
    "too many": ({"messages": [{"role": "user", "content": ""}] * 10_001}, "messages"),
    "no message": ({"messages": ["hi"]}, "messages.0"),
    "no role": ({"messages": [{"content": "x"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content"),
}


@pytest.mark.parametrize(("fields", "param"), BAD.values(), ids=BAD)
def test_what_is_no_conversation(fields: dict[str, Any], param: str, open_site: Site) -> None:
    answer = open_site.ask("PUT", ONE, conversation(**fields))
    assert (answer.status, answer.error["param"]) == (400, param)
    assert json.loads(open_site.ask("GET", PATH).body)["conversations"] == []


@pytest.mark.parametrize(
    "name", ["short", "x" * 65, "chat.one", "chat one", "chät-one", "..", "%2e"]
)
def test_what_is_no_id(name: str, open_site: Site) -> None:
    answer = open_site.ask("PUT", f"{PATH}/{name}", conversation(name))
    assert answer.status == 400
    assert open_site.ask("GET", f"{PATH}/{name}").status == 404
    assert open_site.ask("DELETE", f"{PATH}/{name}").status == 204


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"[]", 400), (b"{", 400), (b'{"title": "\\ud800"}', 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400), (b" " * (4 * 1024 * 1024 + 1), 413),
    ],
)  # fmt: skip
def test_bodies_that_are_none(body: bytes, status: int, open_site: Site) -> None:
    for method, path in (("PUT", ONE), ("POST", VOTES_PATH)):
        assert open_site.request(method, path, body).status == status, method


def test_no_room(open_site: Site) -> None:
    answer = open_site.ask("PUT", ONE, conversation(text="x" * 100_000))
    assert (answer.status, answer.error["code"]) == (507, "storage_full")
    assert "the limit is 100,000" in answer.error["message"]


def test_a_file_that_cannot_be_used(open_site: Site, store: ConversationStore) -> None:
    store._path.parent.mkdir()
    store._path.mkdir()
    for answer in (open_site.ask("PUT", ONE, conversation()), open_site.ask("GET", PATH)):
        assert (answer.status, answer.error["code"]) == (503, "storage_unavailable")


def test_a_server_that_keeps_none() -> None:
    with running(site(None)) as app:
        alone = Site(app._app, app.runner)
        listed = json.loads(alone.ask("GET", PATH).body)
        assert listed == {"conversations": [], "is_kept": False}
        assert alone.ask("PUT", ONE, conversation()).error["code"] == "conversation_not_found"
        assert alone.ask("POST", VOTES_PATH, VOTE).error["code"] == "conversation_not_found"
        assert alone.ask("GET", ONE).status == 404
        assert alone.ask("DELETE", ONE).status == alone.ask("DELETE", VOTES_PATH).status == 204
        assert alone.ask("GET", VOTES_PATH).body == b""


def test_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    keyed, free = AccessPolicy(api_keys=(b"x",)), AccessPolicy()
    for host, policy in (("127.0.0.1", free), ("::1", free), ("0.0.0.0", keyed)):
        store = store_for(KeepingOptions(), host, policy)
        assert store is not None and store._path == tmp_path / "page" / "conversations.db"
    # strangers would read each other's
    assert store_for(KeepingOptions(), "0.0.0.0", free) is None
    assert store_for(KeepingOptions(store_conversations=False), "127.0.0.1", keyed) is None


VOTE: dict[str, Any] = {
    "conversation_id": "chat-one",
    "models": ["left-model", "right-model"],
    "vote": "left",
    "names_hidden": True,
    "messages": [
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
         {"role": "assistant", "content": "one\n"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "zwei"}],
    ],
    "voted_at": 1.5,
}  # fmt: skip


def test_votes_are_exported_as_fastchat_logs_them(open_site: Site) -> None:
    kinds = {
        "left": "leftvote", "right": "rightvote", "tie": "tievote", "both_bad": "bothbad_vote",
    }  # fmt: skip
    for kind in kinds:
        answer = open_site.ask("POST", VOTES_PATH, {**VOTE, "vote": kind})
        assert (answer.status, answer.body) == (201, b"")
    exported = open_site.ask("GET", VOTES_PATH)
    assert exported.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in exported.body.splitlines()]
    assert [line["type"] for line in lines] == list(kinds.values())
    # what FastChat's clean_battle_data.py reads of a line
    line = lines[0]
    assert line["models"] == ["left-model", "right-model"]
    assert isinstance(line["tstamp"], float) and line["ip"] == ""
    left, right = line["states"]
    assert left == {
        "template_name": "chatserve", "system_message": "s", "roles": ["user", "assistant"],
        "messages": [["user", "q"], ["assistant", "one\n"]], "offset": 0, "conv_id": "chat-one",
        "model_name": "left-model",
    }  # fmt: skip
    assert right["system_message"] == ""
    assert right["messages"][right["offset"] :] == [["user", "q"], ["assistant", "zwei"]]
    assert open_site.ask("DELETE", VOTES_PATH).status == 204
    assert open_site.ask("GET", VOTES_PATH).body == b""


def test_votes_are_sent_while_they_are_read(
    open_site: Site, store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation_store, "PIECE_BYTES", 2_000)
    for _ in range(20):
        open_site.ask("POST", VOTES_PATH, VOTE)
    pieces: list[bytes] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if body := message.get("body"):
            if not pieces:
                # what comes now is still to be read
                await asyncio.to_thread(store.add_vote, b"", {"type": "late"})
                await asyncio.to_thread(store.add_vote, b"another", {"type": "not mine"})
            pieces.append(body)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def export() -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
            "path": VOTES_PATH, "raw_path": VOTES_PATH.encode(), "query_string": b"",
            "headers": [(b"host", b"127.0.0.1")], "root_path": "", "scheme": "http",
        }  # fmt: skip
        await open_site._app(scope, receive, send)

    open_site.runner.run(export())
    lines = b"".join(pieces).splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["leftvote"] * 20 + ["late"]
    assert len(pieces) > 3 and max(map(len, pieces)) < 2_000 + len(lines[0]) + 1


def test_slow_searches_keep_nobody_else_from_a_thread(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, num_searching = threading.Event(), 0

    def search(*_: Any) -> list[Any]:
        nonlocal num_searching
        num_searching += 1
        assert may_end.wait(30)
        return []

    monkeypatch.setattr(store, "summaries", search)

    async def crowd(app: RunningApp) -> None:
        # more than asyncio's own pool would have
        searches = [asyncio.ensure_future(app.call("GET", PATH)) for _ in range(40)]
        try:
            while not num_searching:
                await asyncio.sleep(0.001)
            async with asyncio.timeout(10):
                assert await asyncio.to_thread(lambda: num_searching) <= NUM_THREADS
        finally:
            may_end.set()
        assert {each.status for each in await asyncio.gather(*searches)} == {200}

    with running(site(store)) as app:
        app.runner.run(crowd(app))
    assert num_searching == 40


BAD_VOTES: dict[str, tuple[dict[str, Any], str]] = {
    "vote": ({"vote": "up"}, "vote"),
    "vote list": ({"vote": []}, "vote"),
    "id": ({"conversation_id": 7}, "conversation_id"),
    "one model": ({"models": ["m"]}, "models"),
    "one side": ({"messages": [[]]}, "messages"),
    "side": ({"messages": [[], "x"]}, "messages.1"),
    "message": ({"messages": [[], [{"role": "user"}]]}, "messages.1.0.content"),
}


@pytest.mark.parametrize(("fields", "param"), BAD_VOTES.values(), ids=BAD_VOTES)
def test_what_is_no_vote(fields: dict[str, Any], param: str, open_site: Site) -> None:
    answer = open_site.ask("POST", VOTES_PATH, {**VOTE, **fields})
    assert (answer.status, answer.error["param"]) == (400, param)
    assert open_site.ask("GET", VOTES_PATH).body == b""


FOREIGN: tuple[tuple[tuple[str, str], ...], ...] = (
    (("sec-fetch-site", "cross-site"),),
    # another port of the same machine
    (("sec-fetch-site", "same-site"), ("origin", "http://127.0.0.1:3000")),
    (("origin", "https://evil.example"),),
    (("origin", "null"),),
    (("origin", "http://127.0.0.1:1"),),
    # listed pages may chat, and not read what was said here
    (("origin", "https://listed.example"), ("sec-fetch-site", "cross-site")),
    (("origin", "https://listed.example"),),
)
OWN: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("sec-fetch-site", "same-origin"), ("origin", "http://127.0.0.1")),
    (("sec-fetch-site", "none"),),
    (("origin", "http://127.0.0.1"),),
    # behind a proxy that ends TLS
    (("sec-fetch-site", "same-origin"), ("origin", "https://chat.example")),
)


def test_pages_of_other_sites_get_nothing_and_change_nothing(store: ConversationStore) -> None:
    with running(site(store, allow_origins=["https://listed.example"])) as app:
        alone = Site(app._app, app.runner)
        alone.ask("PUT", ONE, conversation())
        for headers in FOREIGN:
            for method, path, payload in (
                ("GET", PATH, None), ("GET", ONE, None), ("PUT", ONE, conversation(revision=1)),
                ("DELETE", ONE, None), ("POST", VOTES_PATH, VOTE), ("GET", VOTES_PATH, None),
                ("DELETE", VOTES_PATH, None), ("OPTIONS", ONE, None),
            ):  # fmt: skip
                asks = (("access-control-request-method", "PUT"),) if method == "OPTIONS" else ()
                answer = alone.ask(method, path, payload, *headers, *asks)
                assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
                assert not any(name.startswith("access-control-") for name in answer.headers)
        assert store.summaries(b"")[0]["revision"] == 1
        for headers in OWN:
            assert alone.ask("GET", ONE, None, *headers).status == 200, headers


def test_a_form_of_another_site_is_no_json(open_site: Site) -> None:
    """What a page may send anywhere without being asked: text/plain, forms, no body."""
    body = json.dumps(VOTE).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = open_site.request("POST", VOTES_PATH, body, headers=[("content-type", kind)])
        assert answer.status == 415
    assert open_site.request("POST", VOTES_PATH, body, headers=()).status == 415
    assert open_site.ask("GET", VOTES_PATH).body == b""
