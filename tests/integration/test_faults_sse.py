"""Streams through networks that cut anywhere: every event is read, the text is byte for byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from chatserve.protocol.sse import DONE_FRAME
from tests.faults.client import LoadClient, Record, Request
from tests.faults.engine import Script
from tests.faults.history import Reply
from tests.faults.house import MODEL, Fronts, fronts, house
from tests.faults.invariants import check, outcome
from tests.faults.proxy import Fault, FaultProxy, Faults
from tests.servers import STREAM_HEAD, chunked

CHOICES = 8
REQUESTS = 250


def request(number: int, *, say: int = 4, choices: int = CHOICES) -> Request:
    script = Script(f"r{number}", say=say, step_s=0, is_garbage=True)
    body = {
        "model": MODEL, "stream": True, "n": choices, "max_tokens": say,
        "prompt": script.prompt,
    }  # fmt: skip
    return Request(body, "/v1/completions", text=script.text())


def small_pieces(number: int) -> Faults:
    return Faults(down=Fault(seed=number))


def wrong_texts(records: Sequence[Record]) -> list[str]:
    """Of every choice, against what its tokens say."""
    found = []
    for record in records:
        assert isinstance(record.request.body, dict)
        script = Script.of(record.request.body["prompt"].encode())
        texts = Reply(record).texts
        for choice in range(record.request.body["n"]):
            if texts.get(choice, "").encode() != script.text(choice).encode():
                found.append(f"{record.number}, choice {choice}")
    return found


class Cuts:
    """Where the pieces that a client got were cut, by what stood on both sides."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.in_characters = self.in_frame_ends = self.in_line_ends = self.in_escapes = 0
        for record in records:
            raw, place = record.raw, 0
            for _, piece in record.pieces[:-1]:
                place += len(piece)
                self.in_characters += raw[place] & 0xC0 == 0x80
                self.in_frame_ends += raw[place - 1 : place + 1] == b"\n\n"
                self.in_line_ends += raw[place - 1 : place + 1] == b"\r\n"
                self.in_escapes += raw[place - 1 : place] == b"\\"


def test_two_thousand_outputs_of_random_bytes_cut_everywhere(tmp_path: Path) -> None:
    with house(tmp_path) as rig:
        rig.start_controller()

        async def work() -> list[Record]:
            async with fronts(tmp_path) as standing:
                await asyncio.to_thread(add_worker, standing)
                for proxy in standing.proxies:
                    proxy.plan = small_pieces
                async with FaultProxy(rig.port, small_pieces) as proxy:
                    client = LoadClient(proxy.port)
                    await client.send_all(map(request, range(REQUESTS)), at_once=4)
                    return client.records

        def add_worker(standing: Fronts) -> None:
            rig.start_worker(**standing.environment)
            rig.wait_for_workers(1)

        records = asyncio.run(work())
    assert check(records) == []
    assert {outcome(record) for record in records} == {"done"}
    assert wrong_texts(records) == []
    cuts = Cuts(records)
    assert min(cuts.in_characters, cuts.in_frame_ends, cuts.in_line_ends, cuts.in_escapes) > 20


def test_teeth_a_relay_that_decodes_piece_by_piece_is_found() -> None:
    """What a careless one does: each piece becomes text of its own."""
    sent = request(3, choices=1)
    assert isinstance(sent.body, dict)
    texts = [text for text, _ in Script.of(sent.body["prompt"].encode()).pieces(0)]
    chunks = [{"id": "a", "choices": [choice(text)]} for text in texts if text]
    chunks.append({"id": "a", "choices": [choice("") | {"finish_reason": "stop"}]})
    frames = [f"data: {json.dumps(each, ensure_ascii=False)}\n\n".encode() for each in chunks]
    body = b"".join(frames) + DONE_FRAME
    good = Record(0, sent, 0.0, [(0.0, STREAM_HEAD + chunked(body) + chunked(b""))], "closed")
    assert check([good]) == wrong_texts([good]) == []
    careless = "".join(body[i : i + 3].decode("utf-8", "replace") for i in range(0, len(body), 3))
    raw = STREAM_HEAD + chunked(careless.encode()) + chunked(b"")
    bad = Record(0, sent, 0.0, [(0.0, raw)], "closed")
    assert check([bad]) and wrong_texts([bad])


def choice(text: str) -> dict[str, object]:
    return {"index": 0, "text": text, "finish_reason": None}
