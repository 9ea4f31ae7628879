"""A model as a worker would load it; its speed against a bandwidth that is given."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatserve.config import WorkerConfig
from chatserve.doctor import speed
from chatserve.doctor.bandwidth import Bandwidth
from chatserve.doctor.speed import Decode, check_speed, check_weights, try_model
from chatserve.engine.serving import load
from chatserve.models.weight_bytes import WeightBytes
from chatserve.options import ModelOptions
from tests import tiny
from tests.unit.models.vocabularies import smollm2

# the random weights of these tests read nothing
OPTIONS = ModelOptions(device="cpu", dtype="float32", offline=True, self_check=False)
PACKED = ModelOptions(device="cpu", load_8bit=True, offline=True, self_check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save_model(path)
    return path


def test_a_model_is_tried(folder: Path) -> None:
    decode, (found,) = try_model(str(folder), OPTIONS)
    assert decode is not None and decode.tokens_per_s > 0 and decode.num_steps == 64
    size = decode.weights.total
    assert found.status == "ok" and found.facts["bytes"] == {"cpu": size}
    assert f"{folder}: {size / 1e6:.1f} MB on cpu, float32, loaded in " in found.text
    assert found.facts["device"] == "cpu" and found.facts["native"]


def test_the_kernels_in_use_are_named(folder: Path) -> None:
    decode, (found,) = try_model(str(folder), PACKED)
    assert decode is not None
    level = decode.description["kernels"]
    assert level and f"int8 on own CPU kernels ({level})" in found.text


def test_a_slow_model_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_DECODE_S", 0)
    decode, _ = try_model(str(folder), OPTIONS)
    assert decode is not None and decode.num_steps == speed._MIN_STEPS


def test_short_contexts_are_enough(folder: Path, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, max_position_embeddings=4096)
    decode, _ = try_model(str(tmp_path), OPTIONS)
    assert decode is not None and decode.description["kv_tokens"] == 512
    options = ModelOptions(device="cpu", dtype="float32", context_length=90)
    decode, _ = try_model(str(folder), options)
    assert decode is not None and decode.description["kv_tokens"] == 96


@pytest.mark.parametrize("name", ["none", "no/such/model"])
def test_weights_that_are_not_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    decode, (found,) = try_model(str(tmp_path / name), OPTIONS)
    assert decode is None and found.status == "fail"
    assert (found.text, found.way_out) == (
        f"{tmp_path / name}: no such folder or file", "check the spelling"
    )  # fmt: skip


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"half")
    decode, (found,) = try_model(str(tmp_path), OPTIONS)
    assert decode is None and found.status == "fail" and "model.safetensors" in found.text


def test_what_fell_back_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save_model(tmp_path, "gpt_neox")
    decode, (weights, *fallen) = try_model(str(tmp_path), OPTIONS)
    assert decode is not None and not weights.facts["native"]
    assert [finding.status for finding in fallen] == ["warn"]
    assert "runs through transformers" in fallen[0].text and fallen[0].way_out
    # as a finding, not as a log line beside the findings
    assert not caplog.records
    assert logging.getLogger("chatserve").propagate


def test_no_kernels_are_a_fallback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_KERNELS", "off")
    _, (weights, *fallen) = try_model(str(folder), PACKED)
    assert weights.facts["kernels"] is None
    assert any("CHATSERVE_KERNELS=off" in finding.text for finding in fallen)


def test_weights_that_read_nothing_are_not_merely_slow(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, max_position_embeddings=4096)
    _, (_, damaged) = try_model(str(tmp_path), replace(OPTIONS, self_check=True))
    assert damaged.name == "reading" and damaged.status == "warn"
    assert "hardly better than chance" in damaged.text
    assert damaged.way_out == f"chatserve repair {tmp_path}"


def test_an_operator_that_metal_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warning_load(config: WorkerConfig) -> Any:
        warnings.warn("The operator 'aten::x' will fall back to run on the CPU", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return load(config)

    monkeypatch.setattr(speed, "load", warning_load)
    _, (_, *fallen) = try_model(str(folder), OPTIONS)
    assert [finding.text for finding in fallen] == [
        "The operator 'aten::x' will fall back to run on the CPU"
    ]


@pytest.mark.weights
def test_the_default_model() -> None:
    decode, (found, *fallen) = try_model(str(smollm2()), ModelOptions(device="cpu"))
    assert decode is not None and not fallen
    assert decode.description["kernels"] and decode.num_steps >= speed._MIN_STEPS
    # tied, so that a token reads all; packed about as in the file
    assert decode.weights.read_per_token == decode.weights.total
    assert 0.9 < decode.weights.total / smollm2().stat().st_size < 1.5
    assert found.status == "ok"


def decoded(tokens_per_s: float, *, kernels: str | None = "avx2", device: str = "cpu") -> Decode:
    """200 MB of weights, of which a token reads 100."""
    weights = WeightBytes({"cpu": 150_000_000, "disk": 50_000_000}, 100_000_000)
    about = {"device": device, "dtype": "bfloat16", "packing": None, "kernels": kernels}
    return Decode(weights, about, tokens_per_s, 64, 1.25)


def test_the_share_of_the_limit() -> None:
    found = check_speed(decoded(62), Bandwidth(10, 2, 1))
    assert found.status == "ok" and found.way_out is None
    assert found.text == (
        "62.0 tokens/s, 62% of the limit: 100.0 MB of weights a token at 10.0 GB/s allow 100.0"
    )
    assert found.facts == {
        "tokens_per_s": 62,
        "steps": 64,
        "ceiling_tokens_per_s": 100,
        "share_of_ceiling": 0.62,
    }


@pytest.mark.parametrize(
    ("kernels", "device", "way_out"),
    [("avx2", "cpu", "end what"), (None, "cpu", "--load-8bit"), (None, "cuda", "end what")],
)
def test_far_from_the_limit(kernels: str | None, device: str, way_out: str) -> None:
    assert check_speed(decoded(30), Bandwidth(10, 2, 1)).status == "ok"
    found = check_speed(decoded(29.9, kernels=kernels, device=device), Bandwidth(10, 2, 1))
    assert found.status == "warn" and (found.way_out or "").startswith(way_out)


def test_beyond_the_limit() -> None:
    found = check_speed(decoded(120), Bandwidth(10, 2, 1))
    assert found.status == "ok" and "120% of the limit" in found.text
    assert found.text.endswith("(memory was busier when it was measured)")


def test_speed_without_a_bandwidth() -> None:
    found = check_speed(decoded(120), None)
    assert (found.status, found.text) == ("ok", "120.0 tokens/s")


def test_bytes_of_each_device() -> None:
    found = check_weights("m", decoded(1))
    assert found.text == (
        "m: 150.0 MB on cpu, 50.0 MB on disk, bfloat16 on own CPU kernels (avx2), loaded in 1.2 s"
    )
    assert found.facts["bytes_per_token"] == 100_000_000
    assert speed.in_mb(13_500_000_000) == "13.5 GB"
