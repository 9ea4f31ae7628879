"""Devices, operators that fall back, memory and its bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from chatserve.doctor import machine
from chatserve.doctor.bandwidth import BUFFER_BYTES, Bandwidth
from chatserve.doctor.machine import (
    check_bandwidth,
    check_devices,
    check_load,
    check_memory,
    check_operators,
)
from chatserve.errors import StartupError
from chatserve.models import device as device_module
from chatserve.models.device import DevicePolicy, choose_policy
from chatserve.options import ModelOptions

CPU = torch.device("cpu")


def test_the_cpu_with_its_dtype_and_why() -> None:
    found = check_devices()[0]
    policy = choose_policy("cpu")
    assert found.status == "ok" and found.facts["device"] == "cpu"
    assert found.facts["dtype"] == policy.dtype_name
    assert found.text.endswith(policy.reasons[1]) and "CPUs)" in found.text
    assert found.facts["free_bytes"] > 0


def test_every_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 5_000_000_000)
    found = [finding.text for finding in check_devices()[1:]]
    assert found == [
        "cuda:0: GPU 0, 5.0 GB free; bfloat16: supported by this GPU",
        "cuda:1: GPU 1, 5.0 GB free; bfloat16: supported by this GPU",
        "mps: Metal, 5.0 GB free; float16: bfloat16 is emulated on M1 and M2",
    ]


def test_operators_that_pass() -> None:
    policy, (plain, packed) = check_operators(ModelOptions(device="cpu"))
    assert policy is not None and policy.device.type == "cpu"
    assert (plain.status, packed.status) == ("ok", "ok")
    assert plain.text.startswith("device=cpu ") and plain.facts["fell_back"] == []
    assert packed.facts["kernels"] is not None and "own CPU kernels for" in packed.text


def test_no_kernels_are_a_fallback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHATSERVE_KERNELS", "off")
    _, (plain, packed) = check_operators(ModelOptions(device="cpu"))
    assert (plain.status, packed.status) == ("ok", "warn")
    assert "8 bits run on PyTorch's operators, several times slower" in packed.text
    assert packed.way_out == "answers stay right, but come slower"
    _, (asked,) = check_operators(ModelOptions(device="cpu", load_8bit=True))
    assert (asked.status, asked.text) == ("warn", packed.text)
    assert not caplog.records  # it is said once


@pytest.mark.parametrize(("load", "status"), [(0.5, "ok"), (2, "ok"), (2.1, "warn")])
def test_load(load: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_usable_cpus", lambda: 2)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 9, 9))
    found = check_load()
    assert (found.status, found.text) == (status, f"{load:.1f} on 2 CPUs in the last minute")
    assert (found.way_out is None) == (status == "ok")


def test_a_system_without_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(machine.os, "getloadavg")
    assert check_load().status == "ok"


def test_all_cpus_where_none_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    assert machine._usable_cpus() == 1


def test_a_compressed_form_is_looked_at_alone() -> None:
    _, findings = check_operators(ModelOptions(device="cpu", load_4bit=True))
    assert [finding.name for finding in findings] == ["operators"]
    assert findings[0].facts["kernels"] is not None


def test_operators_that_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = device_module._attention_agrees
    monkeypatch.setattr(
        device_module, "_attention_agrees",
        lambda policy, backend: backend == "plain" and real(policy, backend),
    )  # fmt: skip
    monkeypatch.setattr(device_module, "_kernels_agree", lambda kernels: False)
    _, (plain, packed) = check_operators(ModelOptions(device="cpu"))
    assert plain.status == packed.status == "warn"
    assert plain.text == "sdpa attention failed its self-test, plain instead"
    assert plain.facts["attention"] == "plain" and plain.way_out
    assert "kernels for" in packed.text and packed.facts["kernels"] is None


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    policy, (found,) = check_operators(ModelOptions(device="cuda"))
    assert policy is None and found.status == "fail"
    assert found.text == "--device cuda: this PyTorch sees no CUDA device"
    assert "--device cpu" in (found.way_out or "")


def test_a_device_that_computes_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(policy: DevicePolicy) -> DevicePolicy:
        raise StartupError("cpu computes wrong results; use another")

    monkeypatch.setattr(machine, "check", wrong)
    policy, (found,) = check_operators(ModelOptions(device="cpu"))
    assert policy is None
    assert (found.status, found.way_out) == ("fail", "use another")


@pytest.mark.parametrize(("free", "status"), [(1 << 30, "ok"), ((1 << 30) - 1, "warn")])
def test_memory(free: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: free)
    found = check_memory(CPU)
    assert (found.status, found.facts["free_bytes"]) == (status, free)
    assert (found.way_out is None) == (status == "ok")


def fake_measure(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Reads 10 GB/s from memory, twice as many from anything smaller."""
    sizes: list[int] = []

    def measure(device: torch.device, threads: Sequence[int], free: int, size: int) -> Bandwidth:
        sizes.append(size)
        return Bandwidth(10.0 if size == BUFFER_BYTES["cpu"] else 20.0, 2, size)

    monkeypatch.setattr(machine, "measure", measure)
    return sizes


def test_bandwidth_of_memory_and_of_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = fake_measure(monkeypatch)
    bandwidth, found = check_bandwidth(CPU, 50_000_000)
    assert bandwidth == Bandwidth(20.0, 2, 50_000_000) and len(sizes) == 2
    assert found.text == (
        "cpu memory is read at 10.0 GB/s by 2 threads; 50 MB, as the model has, at 20.0, cache "
        "included"
    )
    assert (found.facts["gb_per_s"], found.facts["model_gb_per_s"]) == (10.0, 20.0)


@pytest.mark.parametrize("per_token", [None, 1 << 40])
def test_bandwidth_of_memory_alone(per_token: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake_measure(monkeypatch) == []
    bandwidth, found = check_bandwidth(CPU, per_token)
    assert bandwidth is not None and bandwidth.gb_per_s == 10.0
    assert found.text == "cpu memory is read at 10.0 GB/s by 2 threads"


def test_bandwidth_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1)
    bandwidth, found = check_bandwidth(CPU, None)
    assert bandwidth is None and found.status == "warn"
    assert found.text.startswith("not measured: too little memory")


def test_the_processor_has_a_name_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(path: object, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", no_proc)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "riscv64")
    assert machine._cpu_name().startswith("riscv64 (")
