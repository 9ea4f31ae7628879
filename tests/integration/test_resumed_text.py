"""Row 2: workers die at random tokens, and every answer is the one that nobody disturbed.

Real worker processes with a model, killed by SIGKILL; the controller does not know what hit it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chatserve.server import moves
from chatserve.server.moves import ResumePolicy
from chatserve.server.stream_memory import StreamMemory
from tests.faults.client import LoadClient, Record, Request
from tests.faults.history import Reply
from tests.faults.invariants import check
from tests.house import TOKEN, House
from tests.processes import environment
from tests.tiny import save_model

MODEL = "tiny"
NUM_TOKENS = 64
MESSAGES = [{"role": "user", "content": "Tell me a story"}]
STREAM = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
COUNTED = STREAM | {"max_tokens": NUM_TOKENS, "ignore_eos": True}
CHAT = COUNTED | {"messages": MESSAGES}
ASKED = [
    Request(CHAT | {"temperature": 0}),
    Request(CHAT | {"temperature": 0.8, "seed": 5}),
    Request(CHAT | {"temperature": 1.1, "seed": 6, "top_p": 0.9, "frequency_penalty": 0.7}),
    Request(CHAT | {"temperature": 0.8, "seed": 7, "n": 2}),
    Request(CHAT | {"temperature": 0.8, "seed": 8, "logprobs": True, "top_logprobs": 2}),
    Request(COUNTED | {"prompt": "Once", "temperature": 0.8, "seed": 9}, "/v1/completions"),
    Request(
        {"model": MODEL, "stream": True, "messages": MESSAGES, "max_tokens": NUM_TOKENS,
         "temperature": 0}, "/v1/messages",
    ),
    Request(
        {"model": MODEL, "stream": True, "input": "Tell me a story", "temperature": 0,
         "max_output_tokens": NUM_TOKENS}, "/v1/responses",
    ),
]  # fmt: skip


class Workers:
    """`tests.mortal_workers`, told what to do. `num_dead`: of themselves."""

    def __init__(self, weights: Path, seed: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mortal_workers", str(weights), seed],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(CHATSERVE_CONTROL_TOKEN=TOKEN),
        )  # fmt: skip
        self.num_dead = 0
        self._reader = threading.Thread(target=self._count)
        self._reader.start()

    def _count(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.num_dead += line == "died -9\n"

    def keep(self, url: str, number: int, low: int = 0, high: int = 0) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{url} {number} {low} {high}\n")
        self._process.stdin.flush()

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._reader.join(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("weights") / MODEL
    folder.mkdir()
    save_model(folder)
    workers = Workers(folder, "deaths")
    yield workers
    workers.end()


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    # these workers die whatever they are asked; that is no request's fault
    monkeypatch.setattr(moves, "MAX_FAILURES", 1000)
    monkeypatch.setattr(moves, "MAX_LOSSES", 1000)
    with ExitStack() as stack:
        yield House(stack, ResumePolicy(timeout_s=60))


def outcome(record: Record) -> Any:
    """All that two runs have in common."""
    reply = Reply(record)
    assert reply.is_done, reply.error
    # what was in a cache is another matter from run to run
    counts = [
        frame.json["usage"].get("completion_tokens", frame.json["usage"].get("output_tokens"))
        for frame in reply.frames
        if not frame.is_done and frame.json.get("usage")
    ]
    finishes = sorted(
        (index, reason) for frame in reply.frames for index, _, reason in frame.choices if reason
    )
    logprobs = [
        each["token"]
        for frame in reply.frames
        if not frame.is_done
        for choice in frame.json.get("choices", ())
        for each in (choice["logprobs"] or {}).get("content", ())
    ]
    return reply.texts, finishes, counts[-1:], logprobs


def disturbed(house: House, workers: Workers, *, num_workers: int, kills: int) -> int:
    """How many answers were compared until so many workers had died."""
    num_compared = 0
    workers.keep(house.url, 1)
    house.wait_for(house.registry.is_ready, "no worker")
    calm = answers(house)
    texts = [text for texts, *_ in calm[:6] for text in texts.values()]
    assert all(texts) and len(set(texts)) == len(texts)
    house.do(lambda: [house.registry.remove(each) for each in house.registry.worker_ids()])
    workers.keep(house.url, num_workers, 10, 300)
    last = workers.num_dead + kills
    while workers.num_dead < last:
        house.wait_for(house.registry.is_ready, "no worker")
        assert answers(house) == calm
        num_compared += len(calm)
    return num_compared


def answers(house: House) -> list[Any]:
    client = LoadClient(house.controller.port)
    records = asyncio.run(client.send_all(ASKED, at_once=len(ASKED)))
    assert check(records) == []
    return [outcome(record) for record in sorted(records, key=lambda each: each.number)]


@pytest.mark.parametrize("num_workers", [2, 1])
def test_no_death_changes_a_text(house: House, workers: Workers, num_workers: int) -> None:
    assert disturbed(house, workers, num_workers=num_workers, kills=10) >= len(ASKED)


@pytest.mark.soak
@pytest.mark.parametrize("num_workers", [2, 1])
def test_two_hundred_deaths_change_no_text(
    house: House, workers: Workers, num_workers: int
) -> None:
    num_compared = disturbed(house, workers, num_workers=num_workers, kills=200)
    print(f"200 kills, {num_workers} workers: {num_compared} answers as undisturbed")


def test_a_token_that_is_forgotten_is_seen(
    house: House, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teeth of the two above: the relay forgets one block in five."""
    keep = StreamMemory.keep
    count = 0

    def forgetful(self: StreamMemory, block: bytes) -> None:
        nonlocal count
        count += 1
        if count % 5:
            keep(self, block)

    monkeypatch.setattr(StreamMemory, "keep", forgetful)
    with pytest.raises(AssertionError):
        disturbed(house, workers, num_workers=2, kills=3)
