"""What needs a CUDA device, or two: layers apart from each other, and the forms of bitsandbytes."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy, check, choose_policy
from chatserve.models.device_map import CPU, DISK, DeviceMap, Part
from chatserve.models.gpus import GPUOptions, choose_device_map, torch_policy
from chatserve.models.loader import load_model
from chatserve.models.memory_plan import plan_memory
from chatserve.models.placed_llama import PlacedLlama
from tests import tiny
from tests.networks import SCATTERED, Solo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = Part("cuda:0", "cuda:0")
IN_MEMORY, ON_DISK = Part(CPU, "cuda:0"), Part(DISK, "cuda:0")
HOST = Part(CPU, CPU)
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "float16", "load_8bit": True},
    "int4": {"dtype": "float16", "load_4bit": True},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4, intermediate_size=128)
    return tmp_path / "tiny"


def load(folder: Path, policy: DevicePolicy, device_map: DeviceMap | None = None) -> Any:
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        return load_model(
            checkpoint, policy, device_map=device_map, offload_folder=folder.parent / "offload"
        )


@torch.inference_mode()
def assert_same(folder: Path, policy: DevicePolicy, device_map: DeviceMap) -> None:
    policy = torch_policy(policy)
    expected, found = (
        Solo(load(folder, policy), SCATTERED),
        Solo(load(folder, policy, device_map), SCATTERED),
    )
    for num_tokens in (70, 1, 1, 33):
        logits = found.feed(range(num_tokens)).to("cuda:0")
        assert torch.equal(logits, expected.feed(range(num_tokens)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("home", [IN_MEMORY, ON_DISK])
def test_offloaded_layers_compute_what_resident_ones_do(
    form: str, home: Part, folder: Path
) -> None:
    policy = choose_policy("cuda", **FORMS[form])
    assert_same(folder, policy, DeviceMap(HOST, (GPU, home, home, home), GPU))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("form", FORMS)
def test_two_gpus_compute_what_one_does(form: str, folder: Path) -> None:
    other = Part("cuda:1", "cuda:1")
    policy = choose_policy("cuda", **FORMS[form])
    assert_same(folder, policy, DeviceMap(GPU, (GPU, GPU, other, other), other))


def test_the_limit_for_weights_decides_what_is_offloaded(folder: Path) -> None:
    policy = choose_policy("cuda", "float16")
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        most = plan_memory(checkpoint, policy).weights_bytes * 9 // 10
        options = GPUOptions(max_gpu_memory=str(most), cpu_offloading=True)
        device_map = choose_device_map(checkpoint, policy, options, folder=folder.parent)
    assert device_map is not None and "cpu layers" in device_map.describe()
    assert isinstance(load(folder, torch_policy(policy), device_map), PlacedLlama)


@pytest.mark.parametrize("flag", ["load_8bit", "load_4bit"])
@torch.inference_mode()
def test_the_forms_of_bitsandbytes_are_near_half_precision(flag: str, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    asked: dict[str, Any] = {flag: True, "quant_backend": "bitsandbytes"}
    policy = check(choose_policy("cuda", "float16", **asked))
    assert policy.int8 == "bitsandbytes"
    half = dataclasses.replace(policy, int8=None, packing=None)
    expected = Solo(load(folder, half)).feed(range(60)).float()
    error = Solo(load(folder, policy)).feed(range(60)).float() - expected
    assert error.norm() < (0.1 if flag == "load_8bit" else 0.7) * expected.norm()
    apart = DeviceMap(GPU, (GPU, IN_MEMORY, IN_MEMORY, ON_DISK), GPU)
    error = Solo(load(folder, policy, apart)).feed(range(60)).float() - expected
    assert error.norm() < (0.1 if flag == "load_8bit" else 0.7) * expected.norm()
