"""From WEIGHTS to an engine: limits by memory, defaults, fingerprint, faults before ready."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve.config import WorkerConfig
from chatserve.engine import serving
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.serving import load
from chatserve.errors import DoesNotFit, InvalidRequest, ModelLoadError, UsageError
from chatserve.models import memory
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.memory_plan import plan_memory
from tests import adapters, tiny

PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, bytes of a float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save_model(path)
    return path


def config(folder: Path, **options: Any) -> WorkerConfig:
    return WorkerConfig(weights=str(folder), device="cpu", dtype="float32", **options)


def with_free(
    monkeypatch: pytest.MonkeyPatch, folder: Path, num_tokens: int, max_num_seqs: int = 16
) -> None:
    """Let memory hold keys and values of so many tokens beside the weights and a step."""
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        policy = choose_policy("cpu", "float32")
        plan = plan_memory(checkpoint, policy, concurrency=max_num_seqs)
    free = num_tokens * PER_TOKEN + plan.working_bytes
    monkeypatch.setattr(serving, "available_bytes", lambda device: free)


def test_a_folder_is_loaded_named_and_described(folder: Path) -> None:
    _, model = load(config(folder))
    assert model.names == ("tiny",)
    assert (model.context_length, model.vocab_size) == (512, tiny.VOCAB_SIZE)
    assert model.description["native"] and model.description["dtype"] == "float32"
    assert model.fingerprint.startswith("fp_")


def test_context_and_pool_follow_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_free(monkeypatch, folder, 300)
    engine, model = load(config(folder))
    assert model.context_length == 288  # whole blocks
    assert engine.stats().free_kv_tokens == 288
    assert "context limited to 288 of 512 tokens by memory" in caplog.text


@pytest.mark.parametrize(
    ("left", "pool"),
    [
        (3 * 512, 3 * 512),  # all that was asked for
        (3 * 512 - 1, 736),  # half of what is left, in whole blocks
        (700, 512),  # no less than one sequence needs
    ],
)
def test_the_pool_is_what_the_plan_asks_for_or_a_share_of_what_is_left(
    left: int, pool: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, folder, left, max_num_seqs=3)
    engine, model = load(config(folder, max_num_seqs=3))
    assert (model.context_length, engine.stats().free_kv_tokens) == (512, pool)
    assert model.description["memory"]["kv_bytes"] == pool * PER_TOKEN


def test_a_request_is_admitted_only_if_its_keys_and_values_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, folder, 512, max_num_seqs=2)
    engine, _ = load(config(folder, max_num_seqs=2))
    scheduled = engine._engine
    fits = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for name in ("first", "second"):
        scheduled.check([5] * 400, fits)
        scheduled.add(name, [int(name == "first"), *[5] * 399], fits)
    while scheduled.num_running < 1:
        scheduled.step()
    assert (scheduled.num_running, scheduled.num_waiting) == (1, 1)  # 2 x 412 are over 512
    done: list[str] = []
    while scheduled.has_work:
        assert scheduled.num_running <= 1
        done += [event.seq_id for event in scheduled.step() if event.finish_reason]
    assert done == ["first", "second"]
    with pytest.raises(InvalidRequest, match="holds 512"):
        scheduled.check([5] * 400, dataclasses.replace(fits, max_tokens=113))


def test_too_little_for_a_short_context_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, folder, 256)
    load(config(folder))
    with_free(monkeypatch, folder, 255)
    with pytest.raises(DoesNotFit, match="256 tokens of context at 512 bytes each"):
        load(config(folder))


def test_the_context_can_be_capped(folder: Path) -> None:
    assert load(config(folder, context_length=100))[1].context_length == 100


def test_adapters_are_served_described_and_fingerprinted(folder: Path, tmp_path: Path) -> None:
    shapes = adapters.tiny_shapes()
    sft, rl = (
        str(adapters.write(tmp_path / name, adapters.random_pairs(shapes, seed=seed)))
        for seed, name in enumerate(("sft", "rl"))
    )
    paths: list[tuple[str, ...]] = [(), (sft,), (rl,), (sft, rl), (rl, sft)]
    models = [load(config(folder, adapter=each))[1] for each in paths]
    assert [model.description["adapters"] for model in models] == [
        [], ["sft"], ["rl"], ["sft", "rl"], ["rl", "sft"],
    ]  # fmt: skip
    assert len({model.fingerprint for model in models}) == len(models)
    assert models[1].fingerprint == load(config(folder, adapter=(sft,)))[1].fingerprint


@pytest.mark.parametrize(
    ("names", "adapters", "reason"),
    [
        (["n" * 136], ["x" * 64], "longer than 200 characters"),
        ([f"n{i}" for i in range(400)], ["a", "b", "c", "d"], "--adapter d: 3 .* the limit is 3"),
    ],
)
def test_names_that_no_heartbeat_holds_are_refused_at_the_start(
    folder: Path, names: list[str], adapters: list[str], reason: str
) -> None:
    paths = tuple(f"{name}=missing" for name in adapters)
    with pytest.raises(UsageError, match=reason):
        load(config(folder, adapter=paths, model_names=tuple(names)))


def test_an_adapter_that_does_not_fit_is_refused_before_the_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(serving, "load_model", load_model)
    path = adapters.write(tmp_path / "a", r=8)
    with pytest.raises(ModelLoadError, match="in rank 4 and 4") as caught:
        load(config(folder, adapter=(str(path),)))
    assert caught.value.exit_code == 3


def test_an_adapter_root_that_is_no_folder_is_found_at_once(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(UsageError, match=r"--adapter-root .*nowhere: no such folder"):
        load(WorkerConfig(weights=str(folder / "not read"), adapter_root=str(root)))
    root.mkdir()
    _, served = load(WorkerConfig(weights=str(folder), adapter_root=str(root)))
    assert not served.adapters.loaded()


def test_the_fingerprint_tells_weights_form_and_template_apart(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "tiny"
    tiny.save_model(other, seed=1)
    prints = [
        load(item)[1].fingerprint
        for item in (
            config(folder), config(folder), config(other), config(folder, load_8bit=True),
            config(folder, conv_template="chatml"),
        )
    ]  # fmt: skip
    assert prints[0] == prints[1] and len(set(prints)) == 4


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096},
         {"temperature": 0.9, "top_p": 0.6}),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.1},
         {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"temperature": -1, "top_p": 0, "top_k": math.inf, "min_p": math.nan,
          "repetition_penalty": 0}, {}),
        ({"top_k": -1, "top_p": 1}, {"top_k": -1.0, "top_p": 1.0}),
        ({"temperature": "hot", "top_k": True}, {}),
    ],
)  # fmt: skip
def test_generation_config_is_applied_only_when_asked(
    table: dict[str, Any], expected: dict[str, float], tmp_path: Path
) -> None:
    tiny.save_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(table), "utf-8")
    assert load(config(tmp_path))[1].defaults == {}
    assert load(config(tmp_path, use_generation_config=True))[1].defaults == expected


def test_weights_that_compute_nothing_finite_are_found_before_ready(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"cannot generate .*no finite logits"):
        load(config(tmp_path))


def test_an_unknown_template_is_found_before_the_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="no-such"):
        load(config(folder, conv_template="no-such"))


def test_memory_without_psutil_comes_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with_psutil = memory.available_bytes(torch.device("cpu"))
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    if not Path("/proc/meminfo").exists():
        pytest.skip("needs /proc/meminfo")
    assert 0.5 * with_psutil < memory.available_bytes(torch.device("cpu")) < 2 * with_psutil


def test_gb_are_decimal() -> None:
    assert memory.in_gb(13_480_000_000) == "13.5 GB"


def test_the_files_are_closed_after_loading(folder: Path) -> None:
    seen = []
    real = serving.open_checkpoint

    def opened(path: Path, **options: Any) -> Any:
        checkpoint = real(path, **options)
        seen.append(checkpoint)
        return checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "open_checkpoint", opened)
        load(config(folder))
    with pytest.raises((ValueError, OSError, ModelLoadError)), closing(seen[0].weights):
        seen[0].weights.read("model.norm.weight")
