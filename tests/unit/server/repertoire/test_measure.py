"""What a model will take, as `chatserve plan` says it; and settings as they are written."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from chatserve.config import ServeConfig
from chatserve.errors import UsageError
from chatserve.options import ModelOptions
from chatserve.server.repertoire.measure import Estimate, Planned, estimate_of
from chatserve.server.repertoire.settings import loading_policy, seconds_of
from tests import tiny


def form(name: str, total: int, held_as: str = "bfloat16") -> dict[str, Any]:
    return {"form": name, "total_bytes": total, "weights_bytes": 10, "held_as": held_as}


PLAN: dict[str, Any] = {
    "places": [
        {
            "memory_bytes": 99,
            "forms": [form("half", 30), form("8-bit", 20), {"form": "4-bit", "reason": "no"}],
        }
    ]
}


def test_the_form_is_that_of_a_worker_with_these_flags() -> None:
    assert estimate_of(PLAN, ModelOptions()) == Estimate(30, 99)
    assert estimate_of(PLAN, ModelOptions(load_8bit=True)) == Estimate(20, 99)
    assert estimate_of(PLAN, ModelOptions(dtype="float32")) == Estimate(40, 99)
    assert estimate_of(PLAN, ModelOptions(load_4bit=True)) is None
    packed = {"places": [{**PLAN["places"][0]}]}
    packed["places"][0]["forms"] = [form("file", 15), *PLAN["places"][0]["forms"]]
    assert estimate_of(packed, ModelOptions()) == Estimate(15, 99)


def test_real_headers_are_measured_and_what_is_none_is_not(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "tiny")
    measure = Planned(ModelOptions(device="cpu", context_length=128))

    async def measured() -> tuple[Estimate | None, Estimate | None]:
        return await measure(str(tmp_path / "tiny")), await measure(str(tmp_path / "none"))

    found, nothing = asyncio.run(measured())
    assert found is not None and nothing is None
    assert 10**8 < found.num_bytes < 10**9 and found.free_bytes > 0


def test_times_and_sizes() -> None:
    policy = loading_policy(
        ServeConfig(auto_load=True, max_loaded_bytes="16GB", keep_alive="30m", drain_timeout_s=3)
    )
    assert policy.max_bytes == 16 * 10**9 and policy.keep_alive_s == 1800
    assert policy.drain_s == 3 and policy.auto_load
    assert [seconds_of(each) for each in ("90", "1.5h", "2d", "0s")] == [90, 5400, 172800, 0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_loaded_bytes": "much"}, "no size of memory"),
        ({"keep_alive": "soon", "auto_load": True}, "no time"),
        ({"keep_alive": "-1", "auto_load": True}, "no time"),
        ({"keep_alive": "30m"}, "--auto-load"),
    ],
)
def test_settings_that_say_nothing(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        loading_policy(ServeConfig(**settings))
