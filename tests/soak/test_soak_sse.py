"""One stream cut at each of its bytes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.client import LoadClient, Record, Request
from tests.faults.house import fronts, house
from tests.faults.invariants import check, outcome
from tests.faults.proxy import BYTE_BY_BYTE, Fault, FaultProxy, Faults, clear
from tests.integration.test_faults_sse import request, wrong_texts

pytestmark = pytest.mark.soak


@pytest.mark.timeout(900)
def test_a_stream_cut_in_two_at_every_byte(tmp_path: Path) -> None:
    """And one that comes to the relay byte by byte."""
    with house(tmp_path) as rig:
        rig.start_controller()

        async def work() -> list[Record]:
            async with fronts(tmp_path) as standing:
                await asyncio.to_thread(lambda: rig.start_worker(**standing.environment))
                await asyncio.to_thread(rig.wait_for_workers, 1)
                before = standing.proxies[0]
                async with FaultProxy(rig.port) as behind:
                    client = LoadClient(behind.port)
                    whole = await client.send(request(0, choices=1))
                    number = len(whole.raw)
                    behind.plan = lambda place: Faults(down=Fault(pause_at=place))
                    await client.send_all(some(number), at_once=8)
                    behind.plan, before.weather = clear, BYTE_BY_BYTE
                    await client.send_all(some(50), at_once=8)
                    return client.records

        records = asyncio.run(work())
    assert check(records) == [] and wrong_texts(records) == []
    assert {outcome(record) for record in records} == {"done"}
    sizes = [[len(piece) for _, piece in record.pieces] for record in records]
    cuts = {cut for each in sizes for cut in itertools.accumulate(each)}
    assert len(cuts) > len(records[0].raw) * 9 // 10


def some(number: int) -> Iterator[Request]:
    return (request(0, choices=1) for _ in range(number))
