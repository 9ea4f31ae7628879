"""Devices, the dtype each gets and why, memory, and operators that fail their self-test."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from chatserve.doctor.bandwidth import BUFFER_BYTES, Bandwidth, measure
from chatserve.doctor.finding import Finding, refused
from chatserve.doctor.notes import collected
from chatserve.errors import StartupError
from chatserve.models.device import DevicePolicy, check, choose_policy
from chatserve.models.llama_kernels import thread_counts
from chatserve.models.memory import available_bytes, in_gb
from chatserve.options import ModelOptions

_LITTLE_BYTES = 1 << 30  # free memory below which even small models hardly start


def check_devices() -> list[Finding]:
    """One finding a device: its name, its memory, and the dtype a model gets on it."""
    findings = [_device_finding("cpu", _cpu_name(), torch.device("cpu"))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            findings.append(_device_finding("cuda", name, torch.device("cuda", index)))
    if torch.backends.mps.is_available():
        findings.append(_device_finding("mps", "Metal", torch.device("mps")))
    return findings


def check_load() -> Finding:
    """Whether other programs use the processor: kernels wait for their slowest thread."""
    usable = _usable_cpus()
    if not hasattr(os, "getloadavg"):
        return Finding("load", "ok", f"not known on this system; {usable} CPUs")
    load, _, _ = os.getloadavg()
    facts = {"load": round(load, 2), "cpus": usable}
    text = f"{load:.1f} on {usable} CPUs in the last minute"
    if load <= usable:
        return Finding("load", "ok", text, facts=facts)
    way_out = "end what else runs: a token waits for the slowest thread"
    return Finding("load", "warn", text, way_out, facts)


def check_operators(options: ModelOptions) -> tuple[DevicePolicy | None, list[Finding]]:
    """The policy of a model with `options`, and which of its operators fail their self-test."""
    form = {
        "load_8bit": options.load_8bit, "load_4bit": options.load_4bit,
        "quant_group": options.quant_group,
    }  # fmt: skip
    try:
        policy, finding = _try_operators("operators", options, form)
        if policy.packing is not None:
            return policy, [finding]
        # what --load-8bit would run on
        _, packed = _try_operators("8-bit operators", options, {"load_8bit": True})
    except StartupError as error:
        return None, [refused("operators", "fail", error)]
    return policy, [finding, packed]


def check_memory(device: torch.device) -> Finding:
    """What a model may still take of the memory of `device`."""
    free = available_bytes(device)
    facts = {"device": device.type, "free_bytes": free}
    text = f"{in_gb(free)} free on {device.type}"
    if free >= _LITTLE_BYTES:
        return Finding("memory", "ok", text, facts=facts)
    way_out = f"end other programs; even a small model wants {in_gb(_LITTLE_BYTES)}"
    return Finding("memory", "warn", text, way_out, facts)


def check_bandwidth(
    device: torch.device, per_token_bytes: int | None
) -> tuple[Bandwidth | None, Finding]:
    """How fast the memory of `device` is read, as measured.

    Also what a model whose tokens read `per_token_bytes` can hope for: more, where they fit into
    the processor's cache.
    """
    size = BUFFER_BYTES[device.type]
    try:
        memory = found = measure(device, thread_counts(), available_bytes(device), size)
        if per_token_bytes is not None and per_token_bytes < memory.num_bytes:
            left = available_bytes(device)
            found = measure(device, thread_counts(), left, per_token_bytes)
    except OSError as error:
        finding = Finding("bandwidth", "warn", f"not measured: {error}", "free some memory")
        return None, finding
    facts = {
        "device": device.type, "gb_per_s": round(memory.gb_per_s, 2),
        "threads": memory.num_threads, "buffer_bytes": memory.num_bytes,
    }  # fmt: skip
    text = f"{device.type} memory is read at {memory.gb_per_s:.1f} GB/s"
    if device.type == "cpu":
        text += f" by {memory.num_threads} thread{'s' * (memory.num_threads > 1)}"
    if found is not memory:
        text += (
            f"; {found.num_bytes / 1e6:.0f} MB, as the model has, at {found.gb_per_s:.1f}, cache "
            "included"
        )
        facts["model_gb_per_s"] = round(found.gb_per_s, 2)
    return found, Finding("bandwidth", "ok", text, facts=facts)


def _device_finding(kind: str, name: str, device: torch.device) -> Finding:
    policy = choose_policy(kind)
    reason = policy.reasons[1]  # device, dtype, attention, …: one each
    free = available_bytes(device)
    label = str(device)
    facts = {
        "device": label, "name": name, "free_bytes": free, "dtype": policy.dtype_name,
        "reasons": policy.reasons[1:],
    }  # fmt: skip
    return Finding("device", "ok", f"{label}: {name}, {in_gb(free)} free; {reason}", facts=facts)


def _try_operators(
    name: str, options: ModelOptions, form: dict[str, Any]
) -> tuple[DevicePolicy, Finding]:
    """`check` gives a reason for each operator that it replaces."""
    with collected() as notes:
        chosen = choose_policy(options.device, options.dtype, **form)
        checked = check(chosen)
    fallen = [*notes, *checked.reasons[len(chosen.reasons) :]]
    facts = {
        "device": checked.device.type, "dtype": checked.dtype_name,
        "attention": checked.attention, "int8": checked.int8, "network": checked.network,
        "kernels": checked.kernels.level if checked.kernels else None, "fell_back": fallen,
    }  # fmt: skip
    if not fallen:
        text = checked.reasons[-1] if checked.packing else checked.describe()
        return checked, Finding(name, "ok", f"{text}; self-test passed", facts=facts)
    way_out = "answers stay right, but come slower"
    if len(fallen) > len(notes):
        way_out += "; update PyTorch and the driver"
    return checked, Finding(name, "warn", "; ".join(fallen), way_out, facts)


def _cpu_name() -> str:
    """As the system calls the processor, and how many of its threads are ours."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
            break
    return f"{name} ({_usable_cpus()} of {os.cpu_count()} CPUs)"


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
