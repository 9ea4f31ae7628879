"""Adapters beside a base behind a real controller, worker and engine, asked by the real client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.protocol.control import bearer
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.heartbeat import HeartbeatSender
from chatserve.server.model_slot import ModelSlot
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_slot_app
from tests import adapters, tiny
from tests.fakes import FakeAdapters, FakeEngine, FakeModel
from tests.servers import RunningServer, serving
from tests.unit.engine.test_adapters import half_a_file, missing_file, wrong_base, wrong_rank

TOKEN, KEY = "control-token", "key"
WAIT_S = 20.0
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENDLESS = {str(id): -100 for id in (tiny.BOS_ID, tiny.START_ID, tiny.EOS_ID)}
ASKED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Say something."}],
    "temperature": 0,
    "max_tokens": 40,
    "logit_bias": ENDLESS,
}


class House:
    """A controller with a key, and workers that register with it."""

    def __init__(self, stack: ExitStack, expected: str) -> None:
        self._stack = stack
        self.beats: dict[str, Callable[[], None]] = {}
        self.registry = WorkerRegistry(time.monotonic, expected=[expected], expiry_s=3600)
        policy = AccessPolicy.build("127.0.0.1", api_keys=[KEY], control_token=TOKEN)
        self.controller: RunningServer = stack.enter_context(
            serving(
                lambda: create_controller_app(
                    self.registry, control_token=TOKEN, policy=policy, heartbeat_interval_s=60
                )
            )
        )

    def add(self, worker_id: str, engine: Any, model: Any, *, loads: bool = False) -> None:
        """A worker that is ready, or loads at first; heartbeats come only when it has news."""
        slot = ModelSlot(model.names) if loads else ModelSlot.filled(engine, model)
        senders: list[HeartbeatSender] = []

        async def on_change() -> None:
            await senders[0].deliver()

        def build() -> Edge:
            engine.start()
            policy = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])
            return create_slot_app(slot, policy=policy, control_token=TOKEN, on_change=on_change)

        worker = self._stack.enter_context(serving(build))
        self._stack.callback(lambda: worker.call(engine.stop()))
        senders.append(
            HeartbeatSender(
                self.controller.url, TOKEN, worker_id=worker_id, port=worker.port,
                status=slot.status,
            )
        )  # fmt: skip
        running = asyncio.run_coroutine_threadsafe(senders[0].run(), worker.loop)

        def stop() -> None:
            running.cancel()
            with suppress(BaseException):
                running.result(WAIT_S)

        self._stack.callback(stop)
        self.beats[worker_id] = lambda: worker.call(senders[0].deliver())
        self.wait_for(lambda: worker_id in self.registry._workers)
        if loads:
            slot.fill(engine, model)
            self.beats[worker_id]()

    def wait_for(self, condition: Any) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, self.registry.cards()
            time.sleep(0.002)

    def post(self, path: str, key: str | None = KEY, **body: Any) -> httpx.Response:
        headers = dict(bearer(key)) if key is not None else {}
        return httpx.post(
            f"{self.controller.url}/v1/{path}", json=body, headers=headers, timeout=WAIT_S
        )

    def load(self, name: str, path: Any, **body: Any) -> httpx.Response:
        return self.post("load_lora_adapter", lora_name=name, lora_path=str(path), **body)

    def unload(self, name: str) -> httpx.Response:
        return self.post("unload_lora_adapter", lora_name=name)

    def names(self) -> list[str]:
        return [card.name for card in self.registry.cards()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny.save_model(folder / "base", max_position_embeddings=1024)
    for seed, (name, targets) in enumerate((("sql", ALL), ("law", ("q_proj", "v_proj")))):
        pairs = adapters.random_pairs(adapters.tiny_shapes(targets), seed=seed)
        adapters.write(folder / "root" / name, pairs, lora_alpha=16, target_modules=targets)
    return folder


def config(folder: Path, *paths: str, root: str = "root") -> WorkerConfig:
    return WorkerConfig(
        weights=str(folder / "base"), device="cpu", dtype="float32", model_names=("tiny",),
        adapter=paths, adapter_root=str(folder / root),
    )  # fmt: skip


@pytest.fixture(scope="module")
def house(folder: Path) -> Iterator[House]:
    with ExitStack() as stack:
        house = House(stack, "tiny")
        # one by the command line, as `--adapter sql=…`; the other by request
        house.add("w", *load(config(folder, f"sql={folder / 'root' / 'sql'}")))
        assert house.load("law", "law").status_code == 200
        yield house


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[openai.OpenAI]:
    url = f"{house.controller.url}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def merged(folder: Path) -> Mapping[str, str]:
    """What the base says, and the base with each adapter merged into its weights."""
    texts = {}
    for name, paths in {
        "tiny": [], "tiny:sql": [str(folder / "root" / "sql")],
        "tiny:law": [str(folder / "root" / "law")],
    }.items():  # fmt: skip
        with ExitStack() as stack:
            alone = House(stack, "tiny")
            alone.add("w", *load(config(folder, *paths)))
            reply = alone.post("chat/completions", model="tiny", **ASKED)
            texts[name] = reply.json()["choices"][0]["message"]["content"]
    assert len(set(texts.values())) == 3
    return texts


def said(client: openai.OpenAI, model: str, *, stream: bool) -> str:
    if not stream:
        reply = client.chat.completions.create(model=model, **ASKED)
        assert reply.model == model
        return reply.choices[0].message.content or ""
    chunks = client.chat.completions.create(model=model, stream=True, **ASKED)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_each_stream_of_a_mixed_batch_says_what_its_merged_model_says(
    client: openai.OpenAI, merged: Mapping[str, str]
) -> None:
    asked = [(name, stream) for stream in (True, False) for name in merged for _ in range(2)]
    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(lambda each: said(client, each[0], stream=each[1]), asked))
    assert texts == [merged[name] for name, _ in asked]


def test_the_models_are_listed_with_their_base(client: openai.OpenAI) -> None:
    cards = {model.id: model.to_dict() for model in client.models.list()}
    assert list(cards) == ["tiny", "tiny:sql", "tiny:law"]
    assert [card["parent"] for card in cards.values()] == [None, "tiny", "tiny"]
    assert {card["root"] for card in cards.values()} == {"tiny"}
    prints = {name: card["chatserve"]["fingerprint"] for name, card in cards.items()}
    assert len(set(prints.values())) == 3
    reply = client.chat.completions.create(model="tiny:law", **ASKED)
    assert reply.system_fingerprint == prints["tiny:law"]
    assert client.models.retrieve("tiny:sql").id == "tiny:sql"
    with pytest.raises(openai.NotFoundError, match="there is tiny, tiny:law, tiny:sql"):
        client.chat.completions.create(model="tiny:xml", **ASKED)


def test_loaded_and_unloaded_during_traffic(
    house: House, client: openai.OpenAI, merged: Mapping[str, str]
) -> None:
    stop = threading.Event()

    def traffic(name: str) -> set[str]:
        texts = set()
        while not stop.is_set():
            texts.add(said(client, name, stream=True))
        return texts

    with ThreadPoolExecutor(3) as pool:
        running = {name: pool.submit(traffic, name) for name in merged}
        try:
            for _ in range(3):
                card = house.load("tiny:more", "sql")
                assert (card.status_code, card.json()["id"]) == (200, "tiny:more")
                assert said(client, "tiny:more", stream=False) == merged["tiny:sql"]
                assert house.load("more", "law", load_inplace=True).status_code == 200
                assert said(client, "tiny:more", stream=True) == merged["tiny:law"]
                gone = house.unload("more")
                assert gone.json() == {"id": "tiny:more", "object": "model", "deleted": True}
                with pytest.raises(openai.NotFoundError, match="there is tiny, "):
                    said(client, "tiny:more", stream=True)
        finally:
            stop.set()
        texts = {name: future.result() for name, future in running.items()}
    assert texts == {name: {text} for name, text in merged.items()}


def test_a_stream_under_way_ends_with_the_adapter_that_it_began_with(
    house: House, client: openai.OpenAI, merged: Mapping[str, str]
) -> None:
    assert house.load("brief", "sql").status_code == 200
    asked = {**ASKED, "max_tokens": 400}
    expected = client.chat.completions.create(model="tiny:sql", **asked)
    chunks = client.chat.completions.create(model="tiny:brief", stream=True, **asked)
    text = next(chunks).choices[0].delta.content or ""
    assert house.unload("brief").status_code == 200
    text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected.choices[0].message.content


@pytest.mark.parametrize("fault", [wrong_rank, wrong_base, missing_file, half_a_file])
def test_a_failed_load_leaves_the_old_one_serving(
    house: House, client: openai.OpenAI, folder: Path, merged: Mapping[str, str], fault: Any
) -> None:
    broken = folder / "root" / f"broken-{fault.__name__}"
    fault(broken)
    before = client.models.retrieve("tiny:sql").to_dict()
    for name in ("sql", "fresh"):
        reply = house.load(name, broken, load_inplace=True)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_refused")
        assert reply.json()["error"]["param"] == "lora_path"
        assert str(broken) in reply.json()["error"]["message"]
    assert said(client, "tiny:sql", stream=False) == merged["tiny:sql"]
    assert client.models.retrieve("tiny:sql").to_dict() == before
    assert house.names() == ["tiny", "tiny:sql", "tiny:law"]


def test_other_refusals(house: House, folder: Path) -> None:
    refusals: list[tuple[httpx.Response, int, str, str]] = [
        (house.load("sql", "law"), 409, "adapter_conflict", "load_inplace"),
        (house.load("x", folder / "base"), 400, "adapter_refused", "--adapter-root"),
        (house.load("x", "../base"), 400, "adapter_refused", "--adapter-root"),
        (house.load("a b", "law"), 400, "adapter_refused", "no name for an adapter"),
        (house.load("other:x", "law"), 404, "model_not_found", "there is tiny"),
        (house.unload("x"), 404, "model_not_found", "loaded are: sql, law"),
        (house.post("load_lora_adapter", lora_name="x"), 400, "invalid_value", "lora_path"),
    ]
    for reply, status, code, part in refusals:
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, code), error
        assert part in error["message"]
    assert house.names() == ["tiny", "tiny:sql", "tiny:law"]


@pytest.mark.parametrize("key", [None, "x", "wrong"])
@pytest.mark.parametrize("path", ["load_lora_adapter", "unload_lora_adapter"])
def test_without_a_key_nothing_changes(house: House, key: str | None, path: str) -> None:
    reply = house.post(path, key, lora_name="sql", lora_path="law")
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert house.names() == ["tiny", "tiny:sql", "tiny:law"]


def test_a_web_page_cannot_load(house: House) -> None:
    url = f"{house.controller.url}/v1/load_lora_adapter"
    body = b'{"lora_name": "x", "lora_path": "law"}'
    page = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    assert httpx.post(url, content=body, headers=page).status_code == 401
    assert httpx.post(url, content=body, headers=page | dict(bearer(KEY))).status_code == 415
    asked = httpx.options(url, headers=page | {"Access-Control-Request-Method": "POST"})
    assert asked.status_code >= 400 and "access-control-allow-origin" not in asked.headers


# ---- several workers ----


@pytest.fixture
def street() -> Iterator[House]:
    with ExitStack() as stack:
        yield House(stack, "fake")


def test_every_worker_of_a_base_is_told(street: House) -> None:
    tables = [FakeAdapters(), FakeAdapters()]
    for index, table in enumerate(tables):
        street.add(f"w{index}", FakeEngine(), FakeModel(adapters=table))
    street.add("other", FakeEngine(), FakeModel(names=("other",)))
    vague = street.load("sql", "x")
    assert vague.status_code == 400 and "fake, other; write BASE:sql" in vague.text
    assert street.load("fake:sql", "x").status_code == 200
    assert [table.paths for table in tables] == [["x"], ["x"]]
    assert {worker.worker_id for worker in street.registry.ready("fake:sql")} == {"w0", "w1"}
    assert street.unload("fake:sql").status_code == 200
    assert street.names() == ["fake", "other"]


def test_what_one_worker_refuses_no_other_keeps(street: House) -> None:
    from chatserve.errors import DoesNotFit

    good, bad = FakeAdapters(), FakeAdapters()
    street.add("good", FakeEngine(), FakeModel(adapters=good))
    street.add("bad", FakeEngine(), FakeModel(adapters=bad))
    assert street.load("law", "old").status_code == 200
    bad.refusal = DoesNotFit("no room")
    reply = street.load("sql", "x")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "out_of_memory")
    assert list(good.loaded()) == ["law"] and "fake:sql" not in street.names()
    assert street.load("law", "new", load_inplace=True).status_code == 503
    assert good.paths == bad.paths == ["old"], "nothing else has been served meanwhile"
    assert list(good.loaded()) == list(bad.loaded()) == ["law"]


def test_a_replacement_that_one_worker_refuses_replaces_nothing(
    folder: Path, merged: Mapping[str, str]
) -> None:
    (folder / "elsewhere").mkdir()
    sql, law = (folder / "root" / name for name in ("sql", "law"))
    with ExitStack() as stack:
        house = House(stack, "tiny")
        for worker_id, root in (("a", "root"), ("b", "elsewhere")):
            house.add(worker_id, *load(config(folder, f"sql={sql}", root=root)))
        before = house.registry._workers["a"].status.models
        reply = house.load("sql", law, load_inplace=True)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_refused")
        refused_by = house.registry._workers["b"].base_url
        assert "does not lie below" in reply.json()["error"]["message"]
        assert f"(said by {refused_by}; no worker has changed" in reply.json()["error"]["message"]
        for worker_id in "ab":
            house.beats[worker_id]()
            assert house.registry._workers[worker_id].status.models == before
        for _ in range(4):  # the workers take turns
            said = house.post("chat/completions", model="tiny:sql", **ASKED).json()
            assert said["choices"][0]["message"]["content"] == merged["tiny:sql"]


def test_a_worker_that_was_away_gets_what_it_has_missed(street: House) -> None:
    tables = {"stays": FakeAdapters("old"), "goes": FakeAdapters("old")}
    for worker_id, table in tables.items():
        street.add(worker_id, FakeEngine(), FakeModel(adapters=table))
    assert street.load("sql", "x").status_code == 200
    street.controller.loop.call_soon_threadsafe(street.registry.eject, "goes")
    street.wait_for(lambda: len(street.registry.ready("fake")) == 1)
    assert street.load("law", "y").status_code == 200
    assert street.load("sql", "z", load_inplace=True).status_code == 200
    assert street.unload("old").status_code == 200
    assert set(tables["goes"].loaded()) == {"old", "sql"} and tables["goes"].paths == ["x"]

    def is_back() -> bool:
        street.beats["goes"]()
        return len(street.registry.ready("fake:law")) == 2

    street.wait_for(is_back)
    street.wait_for(lambda: set(tables["goes"].loaded()) == {"sql", "law"})
    street.wait_for(lambda: len(street.registry.ready("fake:sql")) == 2)
    assert sorted(tables["goes"].paths) == ["x", "y", "z"]
    assert street.names() == ["fake", "fake:sql", "fake:law"]


@pytest.mark.parametrize("loads", [True, False])
def test_a_worker_that_starts_anew_gets_what_the_old_one_had(street: House, loads: bool) -> None:
    old, new = FakeAdapters(), FakeAdapters()
    street.add("old", FakeEngine(), FakeModel(adapters=old))
    assert street.load("sql", "x").status_code == 200
    street.controller.loop.call_soon_threadsafe(street.registry.remove, "old")
    street.add("new", FakeEngine(), FakeModel(adapters=new), loads=loads)
    street.wait_for(lambda: street.registry.ready("fake:sql"))
    assert new.paths == ["x"]
    # nor is it told again what has been unloaded since
    assert street.unload("sql").status_code == 200
    third = FakeAdapters()
    street.add("third", FakeEngine(), FakeModel(adapters=third))
    assert street.load("law", "y").status_code == 200
    assert third.paths == ["y"]


def test_a_new_worker_that_refuses_is_not_asked_for_it(street: House) -> None:
    from chatserve.errors import ModelLoadError

    street.add("old", FakeEngine(), FakeModel())
    assert street.load("sql", "x").status_code == 200
    street.controller.loop.call_soon_threadsafe(street.registry.remove, "old")
    table = FakeAdapters(refusal=ModelLoadError("the folder is gone"))
    street.add("new", FakeEngine(), FakeModel(adapters=table))
    street.wait_for(lambda: street.names() == ["fake"])
    reply = street.post("chat/completions", model="fake:sql", messages=ASKED["messages"])
    assert reply.status_code == 404
