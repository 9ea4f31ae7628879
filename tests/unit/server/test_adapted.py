"""Names, cards and fingerprints of a base with adapters; who may change them; who forgets them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from chatserve.config import MAX_CARDS
from chatserve.engine.adapters import AdapterPlace
from chatserve.errors import AdapterRefused, InvalidRequest, ModelNotFound, NoWorkerAvailable
from chatserve.protocol.adapters import (
    LOAD_PATH,
    SETTLE_PATH,
    STAGE_PATH,
    UNLOAD_PATH,
    LoadAdapter,
    UnloadAdapter,
    parse,
)
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.protocol.fields import MAX_BODY_BYTES
from chatserve.server import heartbeat
from chatserve.server.adapted import adapter_name, fingerprint_of, names_of
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.generation import Generation
from chatserve.server.heartbeat import HeartbeatSender
from chatserve.server.model_slot import ModelSlot
from chatserve.server.preparation import Prepared, prepare_chat, prepare_completion
from chatserve.server.registry import WorkerRegistry
from tests.asgi import request
from tests.fakes import FakeAdapters, FakeClock, FakeEngine, FakeModel
from tests.unit.server.test_edge import HOST, JSON, Echo

MODEL = FakeModel(names=("fake", "other:7b"), adapters=FakeAdapters("sql", "law"))
WIDE = {ord(digit): chr(0x1F600 + int(digit)) for digit in "0123456789"}
CHANGES = (LOAD_PATH, UNLOAD_PATH, STAGE_PATH, SETTLE_PATH)
NAMES = ["fake", "other:7b", "fake:sql", "fake:law", "other:7b:sql", "other:7b:law"]


def prepared(name: str) -> Prepared:
    return prepare_completion(json.dumps({"model": name, "prompt": "hi"}).encode(), MODEL)


# ---- requests ----


@pytest.mark.parametrize("name", NAMES)
def test_a_request_names_base_and_adapter(name: str) -> None:
    adapter = name.rpartition(":")[2] if name not in MODEL.names else None
    found = prepared(name).adapter
    assert (found and found.name) == adapter
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
    assert prepare_chat(json.dumps(body).encode(), MODEL).adapter is found


@pytest.mark.parametrize(
    "name", ["sql", "fake:", "fake:xml", ":sql", "fake::sql", "other:sql", "fake:sql:law", "7b:sql"]
)
def test_names_that_nobody_has(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        prepared(name)
    assert caught.value.param == "model" and ", ".join(NAMES) in caught.value.message


def test_the_engine_gets_the_adapter() -> None:
    engine = FakeEngine()

    async def submit(name: str) -> None:
        await (await Generation.submit(engine, "r", prepared(name))).aclose()

    for name in ("fake", "fake:sql"):
        asyncio.run(submit(name))
    assert [each.adapter and each.adapter.name for each in engine.submitted] == [None, "sql"]


def test_each_adapter_has_a_fingerprint_of_its_own() -> None:
    prints = {fingerprint_of(MODEL, adapter) for adapter in MODEL.adapters.loaded().values()}
    assert len(prints) == 2 and fingerprint_of(MODEL, None) == "fp_fake" not in prints
    other = FakeModel(fingerprint="fp_other")
    assert fingerprint_of(other, MODEL.adapters.loaded()["sql"]) not in prints


def test_cards_name_their_base() -> None:
    slot = ModelSlot.filled(FakeEngine(), MODEL)
    cards = {card.name: card for card in slot.cards()}
    assert list(cards) == NAMES == names_of(MODEL)
    assert [card.parent for card in cards.values()] == [
        None, None, "fake", "fake", "other:7b", "other:7b",
    ]  # fmt: skip
    sql, base = cards["fake:sql"], cards["fake"]
    assert sql.description["trained_on"] == "trained/on" and sql.context_length == 1000
    assert sql.description["fingerprint"] != base.description["fingerprint"] == "fp_fake"
    assert [card.name for card in slot.status().models] == NAMES


@pytest.mark.parametrize("num_names", [1, 25, 26, 100, MAX_CARDS // 2, MAX_CARDS])
def test_heartbeats_have_room_for_all_adapters_that_are_let_in(num_names: int) -> None:
    """The widest: names of 4 bytes a character, as long as they may be."""
    names = [f"{index:04}".translate(WIDE) * 34 for index in range(num_names)]
    place = AdapterPlace.beside(names)
    assert (
        place.most == {1: 64, 25: 64, 26: 61, 100: 15, MAX_CARDS // 2: 1, MAX_CARDS: 0}[num_names]
    )
    adapters = [f"{index:02}" + "x" * 61 for index in range(place.most)]
    for number, adapter in enumerate(adapters, 1):
        place.check(adapter, number)
    with pytest.raises(AdapterRefused, match=f"the limit is {place.most}"):
        place.check("one-more", place.most + 1)
    with pytest.raises(AdapterRefused, match="longer than 200 characters"):
        AdapterPlace.beside(["n" * 136]).check("x" * 64, 1)
    loaded = FakeAdapters(*adapters, base="\U0001f999" * 200)
    status = ModelSlot.filled(FakeEngine(), FakeModel(names=names, adapters=loaded)).status()
    assert len(status.models) == num_names * (1 + place.most)
    message = heartbeat.Heartbeat(worker_id="w", status=status)
    assert len(message.to_json()) < MAX_BODY_BYTES


# ---- bodies ----


@pytest.mark.parametrize(
    ("lora_name", "name"), [("sql", "sql"), ("fake:sql", "sql"), ("other:7b:sql", "sql")]
)
def test_adapters_are_named_alone_or_with_their_base(lora_name: str, name: str) -> None:
    assert adapter_name(("fake", "other:7b"), lora_name) == name


@pytest.mark.parametrize("lora_name", ["stranger:sql", "7b:sql"])
def test_another_base_is_refused(lora_name: str) -> None:
    with pytest.raises(ModelNotFound, match="base that is not served here; there is fake, other"):
        adapter_name(("fake", "other:7b"), lora_name)


LOAD = {"lora_name": "sql", "lora_path": "x"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None), (b"{", None), (b"[]", None), ({"lora_name": "sql"}, "lora_path"),
        ({"lora_path": "x"}, "lora_name"), ({**LOAD, "lora_path": ""}, "lora_path"),
        ({**LOAD, "lora_name": 5}, "lora_name"), ({**LOAD, "load_inplace": "yes"}, "load_inplace"),
        ({**LOAD, "lora_path": "x" * 4097}, "lora_path"), ({**LOAD, "url": "http://x"}, "url"),
    ],
    ids=str,
)  # fmt: skip
def test_bodies_that_are_refused(body: Any, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(LoadAdapter, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.param == param


def test_bodies_go_on_as_they_came() -> None:
    asked = parse(LoadAdapter, json.dumps({**LOAD, "load_inplace": True}).encode())
    assert parse(LoadAdapter, asked.to_json()) == asked
    assert parse(UnloadAdapter, b'{"lora_name": "sql"}').lora_name == "sql"


# ---- who may ----


def post(app: Edge, path: str, key: str | None = None) -> int:
    headers = [HOST, JSON, *([("authorization", f"Bearer {key}")] if key else [])]
    return request(app, method="POST", path=path, headers=headers, body=[b"{}"]).status


def edge(**options: Any) -> Edge:
    return Edge(Echo(), AccessPolicy.build("127.0.0.1", **options))


@pytest.mark.parametrize("path", CHANGES)
def test_a_server_without_keys_changes_nothing(path: str) -> None:
    app = edge()
    assert post(app, "/v1/chat/completions") == 200
    assert [post(app, path, key) for key in (None, "x")] == [401, 401]
    app = edge(control_token="token")
    assert [post(app, path, key) for key in (None, "x", "token")] == [401, 401, 200]


@pytest.mark.parametrize("path", CHANGES)
def test_a_key_or_the_control_token_opens(path: str) -> None:
    app = edge(api_keys=["a", "b"], control_token="token")
    keys = (None, "", "c", "a", "b", "token")
    assert [post(app, path, key) for key in keys] == [401, 401, 401, 200, 200, 200]


# ---- who knows ----


def status(*names: str) -> WorkerStatus:
    parents = {name: name.rpartition(":")[0] or None for name in names}
    cards = [ModelCard(name=name, created=1, parent=parents[name]) for name in names]
    return WorkerStatus(state="ready", models=cards)


@pytest.fixture
def registry() -> WorkerRegistry:
    return WorkerRegistry(FakeClock(), expected=["m"])


def listed(registry: WorkerRegistry) -> list[str]:
    return [card.name for card in registry.cards()]


def test_adapters_come_and_go_with_heartbeats(registry: WorkerRegistry) -> None:
    registry.register("a", "http://127.0.0.1:1", status("m"))
    with pytest.raises(ModelNotFound, match="there is m"):
        registry.pick("m:sql")
    registry.heartbeat("a", status("m", "m:sql", "m:law"))
    assert listed(registry) == ["m", "m:sql", "m:law"]
    registry.pick("m:sql").release()
    registry.heartbeat("a", status("m", "m:law"))
    with pytest.raises(ModelNotFound, match="there is m, m:law"):
        registry.pick("m:sql")


def test_an_adapter_that_another_worker_serves_stays(registry: WorkerRegistry) -> None:
    for worker_id, port in (("a", 1), ("b", 2)):
        registry.register(worker_id, f"http://127.0.0.1:{port}", status("m", "m:sql"))
    registry.heartbeat("a", status("m"))
    assert listed(registry) == ["m", "m:sql"]
    for _ in range(3):
        with registry.pick("m:sql") as lease:
            assert lease.worker.worker_id == "b"
    assert {worker.worker_id for worker in registry.ready("m")} == {"a", "b"}
    registry.forget("m:sql")
    assert listed(registry) == ["m", "m:sql"], "somebody serves it"
    registry.remove("b")
    with pytest.raises(NoWorkerAvailable):
        registry.pick("m:sql")
    registry.forget("m:sql")
    assert listed(registry) == ["m"]


class Posts(HeartbeatSender):
    """Keeps what would be sent until the test answers it."""

    def __init__(self, status: Callable[[], WorkerStatus]) -> None:
        super().__init__("http://127.0.0.1:1", "t", worker_id="w", port=1, status=status)
        self.sent: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()

    async def _send(self, session: Any, path: str, message: Any, kind: Any) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.sent.put_nowait((message, answer))
        return await answer


def test_delivery_waits_for_a_heartbeat_that_began_after_the_change() -> None:
    async def main() -> None:
        names = ["m"]
        sender = Posts(lambda: status(*names))
        running = asyncio.create_task(sender.run())
        _, registered = await sender.sent.get()
        names.append("m:sql")
        delivered = asyncio.create_task(sender.deliver())
        await asyncio.sleep(0)
        registered.set_result(heartbeat.Registered(heartbeat_interval_s=1000))
        message, beat = await sender.sent.get()
        assert [card.name for card in message.status.models] == ["m", "m:sql"]
        assert not delivered.done(), "the registration did not say so yet"
        beat.set_result(heartbeat.HeartbeatReply(is_known=True))
        await delivered
        # a controller that is gone holds nobody up
        delivered = asyncio.create_task(sender.deliver())
        _, beat = await sender.sent.get()
        beat.set_exception(heartbeat.Unreachable("gone"))
        await delivered
        running.cancel()
        _, farewell = await sender.sent.get()
        farewell.set_exception(heartbeat.Unreachable("gone"))
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
