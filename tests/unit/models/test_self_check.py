"""Conversions that spoil a model are found by what it reads, named, and put right exactly."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve.config import WorkerConfig
from chatserve.engine import serving
from chatserve.errors import ModelLoadError, UsageError
from chatserve.models import reading, self_check
from chatserve.models.batch import Batch, Segment
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.conversion_faults import (
    Fault,
    MissingScaling,
    RotaryRows,
    SwappedGateUp,
    suspected_rows,
    suspected_scaling,
)
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.repair import find_repairs
from chatserve.models.rotary_layout import RowOrder, put_right, row_orders
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from tests import tiny
from tests.trained import save_trained
from tests.weights import default_model

NEVER_MOVED = RotaryRows("neighbours", "neighbours")
MOVED_TWICE = RotaryRows("twice", "twice")
# what moves rows from halves into the order that a fault names
SPOIL: dict[Fault, Fault] = {
    NEVER_MOVED: MOVED_TWICE,
    MOVED_TWICE: NEVER_MOVED,
    RotaryRows("halves", "neighbours"): RotaryRows("halves", "twice"),
    SwappedGateUp(): SwappedGateUp(),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trained(tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Checkpoint, Tokenizer]]:
    path = default_model()
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights):
        yield checkpoint, load_tokenizer(path, checkpoint.metadata)


@pytest.fixture
def opened(trained: Path) -> Iterator[tuple[Checkpoint, Tokenizer]]:
    checkpoint = open_checkpoint(trained)
    with closing(checkpoint.weights):
        yield checkpoint, load_tokenizer(trained)


def loss_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> float:
    ids = reading.token_ids(tokenizer, reading.COUNTING, reading.MAX_TOKENS)
    return reading.loss_from_disk(checkpoint, ids)


def served(path: Path, **options: Any) -> None:
    serving.load(WorkerConfig(weights=str(path), device="cpu", dtype="float32", **options))


# Real weights ---------------------------------------------------------------------------------


def test_the_default_model_reads_well_and_nothing_is_suspected(
    real: tuple[Checkpoint, Tokenizer],
) -> None:
    checkpoint, tokenizer = real
    assert loss_of(checkpoint, tokenizer) < 1.6
    assert suspected_rows(checkpoint) is None
    assert self_check.diagnose(checkpoint, tokenizer, is_readable=True) is None


@pytest.mark.parametrize("fault", SPOIL, ids=str)
def test_each_fault_of_the_default_model_is_named_and_undone(
    real: tuple[Checkpoint, Tokenizer], fault: Fault
) -> None:
    checkpoint, tokenizer = real
    spoilt = SPOIL[fault].mended(checkpoint)
    # a model whose rows lie wrong still writes words: the text alone would not tell
    is_readable = fault in (NEVER_MOVED, MOVED_TWICE)
    diagnosis = self_check.diagnose(spoilt, tokenizer, is_readable=is_readable)
    assert diagnosis is not None and diagnosis.fault == fault
    assert diagnosis.mended_loss < 1.7 < diagnosis.loss - 1
    name = "model.layers.3.self_attn.k_proj.weight"
    whole = checkpoint.weights.read(name)
    assert fault.mended(spoilt).weights.read(name).equal(whole)


def test_random_weights_of_the_same_shape_are_neither_trained_nor_suspected(
    real: tuple[Checkpoint, Tokenizer],
) -> None:
    config = ModelConfig.from_hf(real[0].config)
    generator = torch.Generator().manual_seed(0)

    class Noise:
        def read(self, name: str, rows: range) -> torch.Tensor:
            return torch.randn(len(rows), config.hidden_size, generator=generator)

    for order in row_orders(Noise(), config):  # type: ignore[arg-type]  # only read is called
        assert order.layout == "halves" and not order.is_trained
        assert order.quarter_distance == pytest.approx(1, abs=0.1)


# A tiny model that learnt the text ------------------------------------------------------------


def test_a_streamed_network_computes_what_the_loaded_one_does(trained: Path) -> None:
    for tied in (False, True):
        changes = {"tie_word_embeddings": tied}
        folder = trained if not tied else trained.parent / "tied"
        if tied:
            tiny.save_model(folder, "qwen3", **changes)
        checkpoint = open_checkpoint(folder)
        ids = list(range(40, 70))
        with closing(checkpoint.weights):
            model = load_model(checkpoint, choose_policy("cpu", "float32"))
            pool = model.build_kv_pool(2, 16)
            rows = range(len(ids))
            segments = [Segment(0, len(ids), 0, [0, 1])]
            with torch.inference_mode():
                logits = model.forward(Batch(ids, rows, segments, rows), pool)
            streamed = reading.loss_from_disk(checkpoint, ids)
        assert streamed == pytest.approx(reading.loss(logits, ids), rel=1e-4)


def test_a_spoilt_folder_is_refused_with_the_command_and_served_without_the_check(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served(trained)
    assert "hardly better" not in caplog.text
    folder = spoilt_copy(trained, tmp_path / "m", MOVED_TWICE)
    command = f"chatserve repair {folder} TARGET"
    with pytest.raises(ModelLoadError, match=r"neighbours.*with that undone") as caught:
        served(folder)
    assert caught.value.exit_code == 3
    assert caught.value.message.endswith(command) and "\n" not in caught.value.message
    served(folder, self_check=False)


def test_the_way_out_is_a_command_that_takes_these_weights(trained: Path, tmp_path: Path) -> None:
    with closing((checkpoint := open_checkpoint(trained)).weights):
        assert self_check.way_out(checkpoint) == f"put it right: chatserve repair {trained} TARGET"
        one_file = dataclasses.replace(checkpoint, path=tmp_path / "model.gguf")
    assert self_check.way_out(one_file).startswith("make the .gguf file again")
    with pytest.raises(UsageError, match=r"make the \.gguf file again"):
        find_repairs(one_file.path)


def test_the_head_that_config_json_takes_away_is_missed(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "m", tie_word_embeddings=True)
    with pytest.raises(ModelLoadError, match=r"says tie_word_embeddings true, but its own lm_head"):
        served(folder)


def test_a_head_that_was_never_trained_is_found(tmp_path: Path) -> None:
    folder = save_trained(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, tie_word_embeddings=False)
    with pytest.raises(ModelLoadError, match=r"false, but its embedding is the head"):
        served(folder)


LONG = {"max_position_embeddings": 512, "max_sequence_length": 2048}


@pytest.fixture(scope="module")
def stretched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with linear scaling, as Vicuna v1.5-16k."""
    folder = tmp_path_factory.mktemp("stretched") / "m"
    theta = {"rope_theta": 10_000.0}
    return save_trained(folder, rope_parameters={"rope_type": "linear", "factor": 4.0, **theta})


@pytest.mark.parametrize(
    "rope", [{"rope_parameters": None}, {"rope_parameters": {"rope_theta": 1e4}}]
)
def test_scaling_that_config_json_lost_is_missed_and_put_back(
    stretched: Path, tmp_path: Path, rope: dict[str, Any]
) -> None:
    served(copied(stretched, tmp_path / "right", **LONG))
    folder = copied(stretched, tmp_path / "m", **LONG, **rope)
    with pytest.raises(ModelLoadError, match=r"lacks the rope_scaling .*'factor': 4\.0.*repair"):
        served(folder)
    repair = find_repairs(folder)
    with closing(repair.checkpoint.weights):
        assert "rope_scaling" in repair.findings[0]
        network = ModelConfig.from_hf(repair.checkpoint.config)
    assert (network.rope.kind, network.rope.factor) == ("linear", 4.0)
    assert network.context_length == 2048


def test_right_weights_are_not_stretched_for_what_config_json_says(
    trained: Path, tmp_path: Path
) -> None:
    folder = copied(trained, tmp_path / "m", **LONG)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        assert suspected_scaling(checkpoint) == MissingScaling(4)
    served(folder)


@pytest.mark.parametrize("length", [512, 1000, 512 * 65, True, "2048", None])
def test_lengths_that_ask_for_no_scaling(
    opened: tuple[Checkpoint, Tokenizer], length: object
) -> None:
    checkpoint = opened[0]
    config = {**checkpoint.config, "max_sequence_length": length}
    assert suspected_scaling(dataclasses.replace(checkpoint, config=config)) is None


def test_random_weights_are_served_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_model(tmp_path)
    served(tmp_path)
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "hardly better than chance" in warnings[0].getMessage()
    assert f"chatserve repair {tmp_path}" in warnings[0].getMessage()


@pytest.mark.parametrize(
    ("loss", "mended_loss", "is_fault"),
    [
        (2.9, 2.5, True),
        (2.5, 2.4, False),  # too little to tell
        (1.6, 2.9, False),  # rows may look odd in a model of another making
        (9.0, 8.0, False),  # still reads nothing
        (9.0, math.inf, False),
    ],
)
def test_what_it_reads_decides_about_a_suspicion(
    loss: float, mended_loss: float, is_fault: bool,
    opened: tuple[Checkpoint, Tokenizer], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checkpoint, tokenizer = opened
    monkeypatch.setattr(self_check, "suspected_rows", lambda _: NEVER_MOVED)
    losses = iter([loss, mended_loss])
    monkeypatch.setattr(reading, "loss_from_disk", lambda *_: next(losses))
    found = self_check.diagnose(checkpoint, tokenizer, is_readable=True)
    assert (found is not None) == is_fault


def test_too_short_a_context_reads_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "check_reading", lambda *_: pytest.fail("was read"))
    served(trained, max_num_batched_tokens=reading.MIN_TOKENS - 1)


def test_numbers_that_are_none_count_as_unread() -> None:
    assert reading.loss(torch.full((3, 5), math.nan), [1, 2, 3]) == math.inf
    assert reading.loss(torch.zeros(3, 5), [1, 2, 3]) == pytest.approx(math.log(5))


@pytest.mark.parametrize("order", [(math.nan, math.nan), (1.0, 1.0), (0.1, 1.4), (1.4, 1.4)])
def test_what_says_nothing_is_not_suspected(order: tuple[float, float]) -> None:
    assert RowOrder(*order).layout == "halves"


@pytest.mark.parametrize("head_dim", [4, 16, 64])
def test_rows_are_moved_as_converters_do(head_dim: int) -> None:
    """Meta's row 2 i + j of a head is Hugging Face's row j D/2 + i."""
    rows = torch.arange(3 * head_dim)[:, None]
    meta = torch.empty_like(rows)
    for row in range(3 * head_dim):
        head, place = divmod(row, head_dim)
        half, pair = divmod(place, head_dim // 2)
        meta[head * head_dim + 2 * pair + half] = rows[row]
    assert put_right(meta, head_dim, "neighbours").equal(rows)
    moved_again = put_right(rows, head_dim, "neighbours")
    assert put_right(moved_again, head_dim, "twice").equal(rows)
    assert put_right(rows, head_dim, "halves") is rows


def spoilt_copy(folder: Path, target: Path, moved: RotaryRows) -> Path:
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        weights = moved.mended(checkpoint).weights
        tensors = {name: weights.read(name) for name in weights.tensors()}
    copied(folder, target)
    save_file(tensors, target / "model.safetensors")
    return target


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    edit(target, **changes)
    return target


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
