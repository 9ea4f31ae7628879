"""Models that are loaded and unloaded while `chatserve serve` runs, as processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from chatserve.cli import main as cli
from chatserve.running_servers import running_servers
from tests import adapters, tiny
from tests.e2e.test_serve_process import SERVE, Process, Stream, chat, error_in, gone
from tests.fakes import ANSWER

WAIT_S = 60.0
SIZES = {"ok": 4, "seconds": 4, "endless": 4, "slow-load": 1, "too-big": 11, "seven": 7}


class Served:
    """A server with fake workers, where there is room for two of most."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.go, self.lost = folder / "go", folder / "lost"
        self.process = Process(
            *SERVE, "--port", "0", "--auto-load", "--max-loaded-bytes", "10", "--models",
            f"a=ok,b=seconds,c=ok,long=endless,slow={folder / 'slow-load'},miss=missing,"
            f"dead=crash,big=too-big,seven=seven,base={folder / 'ok'}",
            "--drain-timeout-s", "20", "--heartbeat-interval-s", "0.2",
            home=self.home, QUICK_RESTARTS="1", FAKE_BYTES=json.dumps(SIZES),
            CHATSERVE_CONTROL_TOKEN="token",
        )  # fmt: skip
        self.url = self.process.ready_url()

    def models(self) -> dict[str, dict[str, Any]]:
        rows = httpx.get(f"{self.url}/admin/models", timeout=WAIT_S).json()["models"]
        return {row["name"]: row for row in rows}

    def tell(self, verb: str, timeout_s: float = WAIT_S, **fields: Any) -> httpx.Response:
        headers = {"Authorization": "Bearer token"}
        url = f"{self.url}/admin/models/{verb}"
        return httpx.post(url, json=fields, headers=headers, timeout=timeout_s)

    def worker_of(self, name: str) -> psutil.Process:
        [found] = [p for p in self.process.children() if f"--model-names={name}" in p.cmdline()]
        return found

    def unload_all(self) -> None:
        for name, row in self.models().items():
            if row["state"] != "unloaded":
                assert self.tell("unload", model=name).status_code == 200
        assert not self.process.children()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("repertoire"))
    yield served
    served.process.end()


@pytest.fixture
def served(house: Served) -> Iterator[Served]:
    yield house
    for file in (house.go, house.lost):
        file.unlink(missing_ok=True)
    house.unload_all()


@contextlib.contextmanager
def streamed(served: Served, model: str) -> Iterator[Iterator[str]]:
    """The lines of an answer as they come."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx.stream(
        "POST", f"{served.url}/v1/chat/completions", json=body, timeout=WAIT_S
    ) as response:
        assert response.status_code == 200
        yield (line for line in response.iter_lines() if line)


def test_ten_who_ask_at_once_start_one_worker(served: Served) -> None:
    assert not served.process.children()
    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda _: chat(served.url, "a", timeout_s=WAIT_S), range(10)))
    for reply in replies:
        assert reply.json()["choices"][0]["message"]["content"] == "".join(ANSWER)
    assert len(served.process.children()) == 1
    cards = {each["id"]: each for each in httpx.get(f"{served.url}/v1/models").json()["data"]}
    assert cards["a"]["chatserve"]["state"] == "ready" and cards["a"]["chatserve"]["bytes"] == 4
    assert cards["b"]["chatserve"]["state"] == "unloaded"
    assert set(cards["a"]) == {"id", "object", "created", "owned_by", "root", "parent", "chatserve"}
    assert set(cards["b"]) == set(cards["a"])


@pytest.mark.soak  # the policy has tests of its own; this is about processes
def test_the_one_not_used_for_longest_makes_room_and_its_memory_is_back(served: Served) -> None:
    for name in ("a", "b", "a"):
        assert chat(served.url, name, timeout_s=WAIT_S).status_code == 200
    worker = served.worker_of("b")
    assert chat(served.url, "c", timeout_s=WAIT_S).status_code == 200
    assert gone([worker], 0)
    rows = served.models()
    assert [rows[name]["state"] for name in "abc"] == ["ready", "unloaded", "ready"]
    assert rows["a"]["memory_bytes"] > 10**6 and rows["b"]["memory_bytes"] is None


def test_who_is_busy_is_not_unloaded_and_refusals_have_numbers(served: Served) -> None:
    assert served.tell("load", model="long").status_code == 200
    with Stream(served.url, "long"):
        now = chat(served.url, "seven", timeout_s=WAIT_S)
        never = chat(served.url, "big", timeout_s=WAIT_S)
        assert served.models()["long"]["state"] == "ready"
    assert (now.status_code, now.json()["error"]["code"]) == (503, "no_room_for_model")
    assert "seven needs 7 bytes and 6 bytes can be had; long is busy in 4" in now.text
    assert int(now.headers["retry-after"]) > 0
    assert (never.status_code, never.json()["error"]["code"]) == (400, "cannot_load_model")
    assert "big needs 11 bytes, --max-loaded-bytes allows 10 bytes" in never.text


def test_a_stream_is_told_how_far_the_load_is(served: Served) -> None:
    with streamed(served, "slow") as lines:
        told = next(line for line in lines if line.startswith(": loading 25"))
        assert told == ": loading 25 100"
        assert served.models()["slow"]["state"] == "loading"
        served.go.touch()
        rest = list(lines)
    assert rest[-1] == "data: [DONE]" and not any("error" in line for line in rest)


def test_an_unload_during_the_load_is_told_to_who_waits(served: Served) -> None:
    with streamed(served, "slow") as lines:
        next(line for line in lines if line.startswith(": loading 25"))
        worker = served.worker_of("slow")
        assert served.tell("unload", model="slow").json()["state"] == "unloaded"
        assert gone([worker], 0)
        rest = list(lines)
    assert '"code":"model_conflict"' in rest[-1] and "[DONE]" not in "".join(rest)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("miss", "miss cannot be loaded: no such folder: missing; check the path"),
        pytest.param(
            "dead", "dead cannot be loaded: worker dead keeps crashing; its last error: ",
            marks=pytest.mark.soak,
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_says_why_and_others_go_on(
    served: Served, name: str, words: str
) -> None:
    assert chat(served.url, "a", timeout_s=WAIT_S).status_code == 200
    with streamed_or_refused(served, name) as error:
        assert error["code"] == "model_not_loaded" and error["message"].startswith(words)
    assert chat(served.url, "a", timeout_s=WAIT_S).status_code == 200
    assert served.models()[name]["state"] == "failed"


@contextlib.contextmanager
def streamed_or_refused(served: Served, model: str) -> Iterator[dict[str, str]]:
    """The error that a stream ends with, be it before its begin or after."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    if reply.status_code == 200:
        assert error_in(reply.content) == "model_not_loaded"
        event = reply.text[reply.text.index('data: {"error"') + len("data: ") :].strip()
        yield json.loads(event)["error"]
    else:
        yield reply.json()["error"]


def test_an_unload_lets_answers_end_and_who_comes_meanwhile_gets_the_next_worker(
    served: Served,
) -> None:
    assert served.tell("load", model="b").status_code == 200
    worker = served.worker_of("b")
    with Stream(served.url, "b") as stream, ThreadPoolExecutor(2) as pool:
        unloading = pool.submit(served.tell, "unload", model="b")
        while served.models()["b"]["state"] != "draining":
            assert not unloading.done()
        late = pool.submit(chat, served.url, "b", timeout_s=WAIT_S)
        assert b"[DONE]" in stream.rest()
        assert unloading.result().status_code == 200
        assert gone([worker], 0)
        assert late.result().status_code == 200
    assert served.worker_of("b").pid != worker.pid


def load_adapter(url: str, name: str, path: str) -> httpx.Response:
    headers = {"Authorization": "Bearer token"}
    body = {"lora_name": name, "lora_path": path, "load_inplace": True}
    return httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers=headers, timeout=WAIT_S)


def test_who_asks_for_an_adapter_brings_its_base_back_and_waits_for_both(served: Served) -> None:
    served.go.touch()
    assert served.tell("load", model="base").status_code == 200
    assert load_adapter(served.url, "base:sql", "held").status_code == 200
    assert served.tell("unload", model="base").status_code == 200
    served.go.unlink()
    with streamed(served, "base:sql") as lines, ThreadPoolExecutor(1) as pool:
        while served.models()["base"]["state"] != "ready":
            pass
        whole = pool.submit(chat, served.url, "base:sql", timeout_s=WAIT_S)
        # the base is there, and its adapter is not
        assert chat(served.url, "base", timeout_s=WAIT_S).status_code == 200
        assert next(lines).startswith(":") and not whole.done()
        assert chat(served.url, "base:other", timeout_s=WAIT_S).status_code == 404
        served.go.touch()
        rest = list(lines)
        assert rest[-1] == "data: [DONE]" and '"model":"base:sql"' in "".join(rest)
        assert whole.result().status_code == 200
    assert served.tell("unload", model="base").status_code == 200
    served.go.unlink()
    served.lost.touch()
    for _ in range(2):  # also when it is known already
        refused = chat(served.url, "base:sql", timeout_s=WAIT_S)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "model_not_loaded")
        assert error["message"] == (
            "base:sql cannot be loaded: no such folder: base:sql; load it again"
        )
    served.lost.unlink()
    served.go.touch()
    assert load_adapter(served.url, "base:sql", "held").status_code == 200
    assert chat(served.url, "base:sql", timeout_s=WAIT_S).status_code == 200


def test_nobody_changes_anything_without_the_token(served: Served) -> None:
    for path in ("models/load", "models/unload", "workers/drain"):
        url = f"{served.url}/admin/{path}"
        assert httpx.post(url, json={"model": "a"}).status_code == 401
        wrong = {"Authorization": "Bearer wrong"}
        assert httpx.post(url, json={"model": "a"}, headers=wrong).status_code == 401
    assert not served.process.children()


def test_the_commands_find_the_server(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(served.home))
    for name in ("missing", "ok"):
        (tmp_path / name).mkdir()
    assert cli.main(["load", "a"]) == 0
    assert capsys.readouterr().out.startswith("a is ready (")
    assert cli.main(["load", str(tmp_path / "missing"), "--name", "gone"]) == 3
    assert "no such folder: missing" in capsys.readouterr().err
    assert cli.main(["load", "big"]) == 4
    assert cli.main(["load", "not/here\x07"]) == 3
    assert "\x07" not in capsys.readouterr().err
    assert cli.main(["ps", "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in told["models"]}
    assert told["url"] == served.url and rows["a"]["weights"] == "ok"
    assert rows["gone"]["error"]["exit_code"] == 3
    # another path, and the same name
    assert cli.main(["load", str(tmp_path / "ok"), "--name", "gone"]) == 0
    assert cli.main(["unload", "gone"]) == 0
    capsys.readouterr()
    assert cli.main(["unload", "a"]) == 0
    assert cli.main(["ps"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a is unloaded"
    assert out[1].split()[:3] == ["NAME", "STATE", "SIZE"]
    assert ["a", "unloaded"] in [line.split()[:2] for line in out[2:]]
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    assert cli.main(["ps"]) == 2
    assert "no server of yours runs" in capsys.readouterr().err


@pytest.mark.soak
def test_a_server_that_is_killed_in_the_middle_of_a_load_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    served = Served(tmp_path)
    try:
        assert served.tell("load", model="slow", wait=False).status_code == 202
        while served.models()["slow"]["loaded_bytes"] != 25:
            pass
        children = served.process.children()
        [found] = running_servers()
        assert "slow" in [model.name for model in found.models]
        served.process.popen.kill()
        assert gone(children, 20)
        assert running_servers() == []
    finally:
        served.process.end()


def test_real_weights_come_when_they_are_asked_for_and_go_when_they_are_not(
    tmp_path: Path,
) -> None:
    tiny.save_model(tmp_path / "tiny")
    pairs = adapters.random_pairs(adapters.tiny_shapes(["q_proj"]))
    adapters.write(tmp_path / "sql", pairs, target_modules=["q_proj"])
    process = Process(
        "-m", "chatserve", "serve", "--port", "0", "--models", str(tmp_path / "tiny"),
        "--auto-load", "--keep-alive", "0s", "--device", "cpu", "--adapter-root", str(tmp_path),
        home=tmp_path / "home", OMP_NUM_THREADS="1", CHATSERVE_CONTROL_TOKEN="token",
    )  # fmt: skip
    try:
        url = process.ready_url()
        reply = chat(url, "tiny", max_tokens=4, ignore_eos=True, timeout_s=WAIT_S)
        assert reply.json()["usage"]["completion_tokens"] == 4
        assert gone(process.children(), WAIT_S)
        [card] = httpx.get(f"{url}/v1/models").json()["data"]
        # by its headers, before it was ever loaded: what Python and PyTorch take is the most of it
        assert 10**8 < card["chatserve"]["bytes"] < 10**9
        # who is being answered keeps it there until it has the adapter
        with Stream(url, "tiny", ignore_eos=True):
            assert load_adapter(url, "tiny:sql", "sql").status_code == 200
        assert gone(process.children(), WAIT_S)
        reply = chat(url, "tiny:sql", max_tokens=4, ignore_eos=True, timeout_s=WAIT_S)
        assert (reply.status_code, reply.json()["model"]) == (200, "tiny:sql")
    finally:
        process.end()
