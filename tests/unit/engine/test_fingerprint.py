"""The fingerprint changes with whatever changes an answer, and with nothing else."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatserve
from chatserve.config import WorkerConfig
from chatserve.engine import determinism, serving
from chatserve.engine.fingerprint import fingerprint
from chatserve.models.chat_template import (
    WeightsFacts,
    choose_template,
    load_template_sources,
)
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.packing import FINE, FOUR_BITS
from chatserve.models.tokenizer import load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save_model(path)
    return path


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


POLICY = choose_policy("cpu", "float32")


def of(folder: Path, policy: Any = POLICY, template: str | None = None, **options: Any) -> str:
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        tokenizer = load_tokenizer(folder)
        sources = load_template_sources(folder)
        facts = WeightsFacts(folder.name, checkpoint.config)
        choice = choose_template(template, facts, tokenizer, sources)
        return fingerprint(checkpoint, policy, tokenizer, choice, sources, **options)


@pytest.fixture(scope="module")
def usual(source: Path) -> str:
    return of(source)


def test_the_same_in_another_folder(folder: Path, usual: str) -> None:
    assert of(folder) == usual
    assert usual.startswith("fp_") and len(usual) == 19


def kernels(level: str) -> Any:
    return SimpleNamespace(level=level)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.bfloat16},
        {"attention": "plain"},
        {"network": "triton"},
        {"device": torch.device("meta")},
        {"int8": "cpu"},
        {"packing": FOUR_BITS},
        {"packing": FINE},
        {"packing": FINE, "kernels": kernels("avx2")},
        {"packing": FINE, "kernels": kernels("avx512")},
    ],
)
def test_another_form(source: Path, changes: dict[str, Any], usual: str) -> None:
    assert of(source, replace(POLICY, **changes)) != usual


def test_forms_differ_from_each_other(source: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"packing": packing, "kernels": level}
        for packing in (FINE, FOUR_BITS)
        for level in (None, kernels("avx2"), kernels("avx512"))
    ]
    assert len({of(source, replace(POLICY, **form)) for form in forms}) == len(forms)


@pytest.mark.parametrize(
    "options",
    [
        {"system_message": "be kind"},
        {"placement": "cuda:0 2 layers, cuda:1 2 layers"},
        {"block_size": 64},
        {"template": "chatml"},
    ],
)
def test_another_prompt_or_order_of_work(source: Path, options: dict[str, Any], usual: str) -> None:
    assert of(source, **options) != usual


def test_another_version(source: Path, usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatserve, "__version__", "99.0")
    assert of(source) != usual


def test_other_products_of_pytorch(
    source: Path, usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU kernels do not use them."""
    on_kernels = replace(POLICY, kernels=kernels("avx2"))
    before = of(source, on_kernels)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert of(source) != usual
    assert of(source, on_kernels) == before


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_other_weights(folder: Path, usual: str, name: str) -> None:
    """Merging an adapter changes large matrices alone, all of their rows."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name] * 1.01}, file, metadata={"format": "pt"})
    assert of(folder) != usual


def test_another_template_of_the_model(folder: Path, usual: str) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] += " "
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert of(folder) != usual


def test_another_tokenizer(folder: Path, usual: str) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert of(folder) != usual


def test_deterministic_says_its_price_and_is_another_order_of_work(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"weights": str(source), "device": "cpu", "dtype": "float32"}
    _, plain = serving.load(WorkerConfig(**options))
    caplog.set_level("INFO", "chatserve")
    engine, steady = serving.load(WorkerConfig(**options, deterministic=True))
    assert "4 streams make" in caplog.text and "one by one" in caplog.text
    assert (plain.description["deterministic"], steady.description["deterministic"]) == (
        False,
        True,
    )
    assert plain.description["speculation"] and not steady.description["speculation"]
    assert plain.fingerprint != steady.fingerprint
    # memory for whole blocks, no less than asked for
    assert engine.stats().free_kv_tokens % 64 == 0
    assert engine.stats().free_kv_tokens >= plain.description["kv_tokens"]


def test_a_slow_network_is_not_timed_for_long(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of each kind says enough."""
    checkpoint = open_checkpoint(source)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, POLICY)
    rows: list[int] = []
    forward = model.forward

    def counted(batch: Any, pool: Any) -> torch.Tensor:
        rows.append(len(batch.output_rows))
        return forward(batch, pool)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(determinism, "_MAX_S", 0.0)
    text = determinism.price(model, load_tokenizer(source))
    assert rows == [4, 1, 1, 1, 1]
    assert re.search(r"it costs a factor of [\d.e+-]+$", text)


def test_deterministic_is_free_on_the_kernels(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if choose_policy("cpu", load_8bit=True).kernels is None:
        pytest.skip("the CPU kernels are not here")
    options: dict[str, Any] = {"weights": str(source), "device": "cpu", "load_8bit": True}
    _, plain = serving.load(WorkerConfig(**options))
    caplog.set_level("INFO", "chatserve")
    _, steady = serving.load(WorkerConfig(**options, deterministic=True))
    assert "deterministic: free" in caplog.text
    assert plain.description["deterministic"] and steady.description["speculation"]
    assert plain.fingerprint == steady.fingerprint
