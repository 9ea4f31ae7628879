"""`--num-gpus`, `--gpus`, `--max-gpu-memory`, `--cpu-offloading`: refused values, and maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve import environment
from chatserve.config import WorkerConfig
from chatserve.engine import serving
from chatserve.errors import DoesNotFit, UsageError
from chatserve.models import gpus
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.device import DevicePolicy, choose_policy, policy_for
from chatserve.models.device_map import DeviceMap, Part
from chatserve.models.form import native_config
from chatserve.models.gpus import GPUOptions, choose_device_map, free_for_tokens, show_gpus
from chatserve.models.loader import load_model
from chatserve.models.memory_plan import part_bytes, plan_memory
from chatserve.models.placed_llama import PlacedLlama
from tests import tiny
from tests.sparse import llama, write_sparse

TWO = GPUOptions(num_gpus=2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    """13B, whose half precision takes 26 GB."""
    opened = open_checkpoint(write_sparse(tmp_path / "vicuna-13b", llama("13B")))
    with closing(opened.weights):
        yield opened


def on_cuda(*, load_8bit: bool = False) -> DevicePolicy:
    policy = policy_for("cuda", torch.bfloat16, load_8bit=load_8bit)
    return dataclasses.replace(policy, device=torch.device("cuda"))


def here(monkeypatch: pytest.MonkeyPatch, *free_gb: float, host_gb: float = 0) -> None:
    """So many GPUs, with so much memory free; and so much main memory."""
    free = {f"cuda:{index}": int(size * 1e9) for index, size in enumerate(free_gb)}
    monkeypatch.setattr(gpus, "present_gpus", lambda: list(free))
    monkeypatch.setattr(gpus, "available_bytes", lambda device: free[str(device)])
    monkeypatch.setattr(gpus, "available_host_bytes", lambda: int(host_gb * 1e9))
    monkeypatch.setattr(gpus, "_free_disk_bytes", lambda folder: 0)


def chosen(
    checkpoint: Checkpoint, options: GPUOptions, policy: DevicePolicy | None = None, **more: Any
) -> DeviceMap | None:
    return choose_device_map(checkpoint, policy or on_cuda(), options, folder=Path("."), **more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GPUOptions(gpus="0,x"), r"--gpus '0,x' is no list of GPUs; write it as 0,2"),
        (GPUOptions(gpus=""), "is no list of GPUs"),
        (GPUOptions(gpus="0,-1"), "is no list of GPUs"),
        (GPUOptions(gpus="1,1"), "--gpus 1,1 names a GPU twice"),
        (GPUOptions(3, "0,2"), "--num-gpus 3 is more than the 2 that --gpus 0,2 names"),
        (GPUOptions(max_gpu_memory="13Gi b"), "'13Gi b' is no size of memory; write it as 13GiB"),
        (GPUOptions(max_gpu_memory="0"), "is no size of memory"),
    ],
)
def test_values_that_no_machine_has_are_refused(
    options: GPUOptions, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "show_gpus", pytest.fail)
    with pytest.raises(UsageError, match=message):
        show_gpus(options)


def test_gpus_hides_the_others_from_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    show_gpus(GPUOptions(max_gpu_memory="13Gib"))
    assert environment.variables()["CUDA_VISIBLE_DEVICES"] == "7"
    show_gpus(GPUOptions(gpus="0, 2"))
    assert environment.variables()["CUDA_VISIBLE_DEVICES"] == "0,2"
    show_gpus(GPUOptions(gpus="GPU-8932f937-d72c"))
    assert environment.variables()["CUDA_VISIBLE_DEVICES"] == "GPU-8932f937-d72c"


@pytest.mark.parametrize(
    "options",
    [TWO, GPUOptions(gpus="0"), GPUOptions(max_gpu_memory="9GB"), GPUOptions(cpu_offloading=True)],
)
def test_without_cuda_the_flags_say_so(options: GPUOptions, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "tiny")
    opened = open_checkpoint(tmp_path / "tiny")
    with closing(opened.weights):
        with pytest.raises(UsageError) as caught:
            chosen(opened, options, choose_policy("cpu", "float32"))
        assert caught.value.message == f"{options.flag}: no CUDA device; leave the flag out"
        assert chosen(opened, GPUOptions(num_gpus=1), choose_policy("cpu", "float32")) is None


@pytest.mark.parametrize("options", [GPUOptions(num_gpus=3), GPUOptions(gpus="0,1,2")])
def test_more_gpus_than_there_are_is_refused(
    options: GPUOptions, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, 24, 24)
    with pytest.raises(UsageError, match=r"--\S+ \S+: 2 CUDA devices are visible; name GPUs"):
        chosen(checkpoint, options)


def test_two_gpus_share_what_one_has_no_room_for(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, 24, 24)
    found = chosen(checkpoint, TWO)
    assert found is not None
    assert found.describe() == "cuda:0 layers 0-19, cuda:1 layers 20-39"
    assert chosen(checkpoint, GPUOptions(gpus="0,1")) == found  # all that it names
    assert chosen(checkpoint, GPUOptions(1, "0,1")) is None


def test_a_limit_for_weights_is_kept(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, 80, 80, host_gb=64)
    parts = part_bytes(native_config(checkpoint), on_cuda())
    options = GPUOptions(2, None, "8GB", cpu_offloading=True)
    found = chosen(checkpoint, options)
    assert found is not None and "cpu layers" in found.describe()
    held = found.bytes_by_home(parts, is_tied=False)
    carried = 2 * parts.block
    assert held["cuda:0"] <= 8e9 and held["cuda:1"] + carried <= 8e9
    assert chosen(checkpoint, options, on_cuda(load_8bit=True)) == chosen(
        checkpoint, GPUOptions(2, None, "8GB"), on_cuda(load_8bit=True)
    )  # 13.2 GB of 8 bits need no offloading


def test_8_bit_layers_are_offloaded_too(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, 10, host_gb=8)
    found = chosen(checkpoint, GPUOptions(cpu_offloading=True), on_cuda(load_8bit=True))
    assert found is not None and found.embedding.home == "cpu"
    num_resident = sum(not part.is_offloaded for part in found.blocks)
    assert 0 < num_resident < 40


def test_what_fits_nowhere_names_the_ways_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, 9, 9, host_gb=1)
    with pytest.raises(DoesNotFit) as caught:
        chosen(checkpoint, GPUOptions(2, None, "7GB"))
    assert caught.value.message.endswith(
        "needs 26.0 GB of weights in bfloat16, the GPUs have 7.0 GB + 7.0 GB for them; use "
        "--load-8bit, --cpu-offloading, a larger --max-gpu-memory, more GPUs or a smaller model"
    )
    with pytest.raises(DoesNotFit, match="use more GPUs or a smaller model"):
        chosen(checkpoint, GPUOptions(1, cpu_offloading=True), on_cuda(load_8bit=True))


def test_a_long_context_that_was_asked_for_takes_its_room(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, 16.5, host_gb=64)
    options, packed = (
        GPUOptions(max_gpu_memory="16GB", cpu_offloading=True),
        on_cuda(load_8bit=True),
    )
    assert chosen(checkpoint, options, packed, context=512) is None  # all of it on the GPU
    assert chosen(checkpoint, options, packed, context=4096) is not None


def test_other_families_are_not_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_model(tmp_path / "neox", "gpt_neox")
    here(monkeypatch, 24, 24)
    opened = open_checkpoint(tmp_path / "neox")
    with closing(opened.weights), pytest.raises(UsageError, match="runs through transformers"):
        chosen(opened, TWO)


def test_free_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert gpus._free_disk_bytes(tmp_path / "not" / "yet") > 0


def on_two_cpus(monkeypatch: pytest.MonkeyPatch, free: dict[str, int]) -> None:
    monkeypatch.setattr(gpus, "_free_gpus", lambda policy, options: free)
    monkeypatch.setattr(gpus, "available_bytes", lambda device: free[str(device)])


def test_the_fullest_device_decides_how_many_tokens_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    on_two_cpus(monkeypatch, {"cpu:0": 100_000_000, "cpu:1": 60_000_000})
    policy = choose_policy("cpu", "float32")
    opened = open_checkpoint(tmp_path / "tiny")
    with closing(opened.weights):
        device_map = chosen(opened, TWO, policy)
        plan = plan_memory(opened, policy)
        model = load_model(opened, policy, device_map=device_map, offload_folder=tmp_path)
    assert isinstance(model, PlacedLlama)
    assert model.device_map.blocks_by_device == {"cpu:0": 2, "cpu:1": 2}
    room = 60_000_000 - plan.working_bytes
    assert free_for_tokens(model, plan) == plan.working_bytes + 2 * room


def test_blocks_on_their_way_leave_the_less_for_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4)
    on_two_cpus(monkeypatch, {"cpu:0": 60_000_000})
    policy = choose_policy("cpu", "float32")
    opened = open_checkpoint(tmp_path / "tiny")
    here, elsewhere = Part("cpu:0", "cpu:0"), Part("cpu", "cpu:0")
    with closing(opened.weights):
        plan, block = plan_memory(opened, policy), part_bytes(native_config(opened), policy).block
        for num_offloaded in (0, 1, 3):
            blocks = (here,) * (4 - num_offloaded) + (elsewhere,) * num_offloaded
            model = PlacedLlama(
                native_config(opened), policy, DeviceMap(here, blocks, here), tmp_path
            )
            left = 60_000_000 - min(num_offloaded, 2) * block
            assert free_for_tokens(model, plan) == left


@pytest.mark.parametrize("load_8bit", [False, True])
def test_a_worker_answers_from_two_devices_as_from_one(
    load_8bit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_model(tmp_path / "tiny", num_hidden_layers=4, dtype=torch.float32)
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CHATSERVE_KERNELS", "off")
    config = WorkerConfig(
        weights=str(tmp_path / "tiny"), device="cpu", dtype="float32", load_8bit=load_8bit,
        context_length=256,
    )  # fmt: skip
    expected = answer(config)
    on_two_cpus(monkeypatch, {"cpu:0": 1 << 30, "cpu:1": 1 << 30})
    placed = dataclasses.replace(config, num_gpus=2)
    assert answer(placed) == expected
    _, served = serving.load(placed)
    last = 0 if load_8bit else 1  # beside an embedding, which is not packed
    assert served.description["device_map"] == (f"cpu:0 layers 0-{last}, cpu:1 layers {last + 1}-3")


def answer(config: WorkerConfig) -> list[int]:
    """Thirty greedy tokens."""
    from chatserve.engine.sequence import SamplingParams

    engine = serving.load(config)[0]._engine
    engine.add("one", list(range(40)), SamplingParams(0, max_tokens=30, ignore_eos=True))
    ids: list[int] = []
    while engine.has_work:
        ids += [id_ for event in engine.step() for id_ in event.token_ids]
    return ids
