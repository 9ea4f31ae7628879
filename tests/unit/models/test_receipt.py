"""The receipt: written whole or not at all, and never shown for what it was not measured on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import CannotWrite
from chatserve.models import receipt as module
from chatserve.models.form import PlainForm
from chatserve.models.packing import FINE, Packing
from chatserve.models.receipt import (
    PLOT_NAME,
    RECEIPT_NAME,
    MeasuredForm,
    Receipt,
    Text,
    read_receipt,
    receipt_of,
    write_receipt,
)
from tests.receipts import INT8, measurement, receipt

INT4 = dataclasses.replace(INT8, packing=Packing(4, is_grouped=True))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


def test_beside_the_weights_of_a_folder(folder: Path, home: Path) -> None:
    kept = receipt("w_1", measurement(), measurement(INT4, mean_kl=0.2))
    assert write_receipt(folder, kept, "<svg/>") == folder
    assert read_receipt(folder, "w_1") == kept
    assert sorted(os.listdir(folder)) == [RECEIPT_NAME, PLOT_NAME]
    assert (folder / PLOT_NAME).read_text() == "<svg/>"
    assert stat.S_IMODE((folder / RECEIPT_NAME).stat().st_mode) == 0o644
    assert not home.exists()


def test_worst_layers_are_named_in_the_file(folder: Path) -> None:
    write_receipt(folder, receipt("w_1"), "")
    table = json.loads((folder / RECEIPT_NAME).read_text())
    assert table["measurements"][0]["worst_layers"] == [4, 3, 2]
    assert table["fingerprint"] == "w_1" and table["format"] == module.FORMAT


def test_of_a_gguf_file_in_the_cache(folder: Path, home: Path) -> None:
    file = folder / "model.gguf"
    file.write_bytes(b"")
    kept = receipt("w_1")
    assert write_receipt(file, kept, "") == home / "receipts" / "w_1"
    assert read_receipt(file, "w_1") == kept
    assert read_receipt(file, "w_2") is None
    assert os.listdir(folder) == ["model.gguf"]


def test_of_a_folder_that_cannot_be_written_in_the_cache(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module._write

    def refusing(place: Path, *rest: Any) -> None:
        if place == folder:
            raise PermissionError(13, "Permission denied")
        write(place, *rest)

    monkeypatch.setattr(module, "_write", refusing)
    assert write_receipt(folder, receipt("w_1"), "") == home / "receipts" / "w_1"
    assert read_receipt(folder, "w_1") == receipt("w_1")


def test_nowhere_to_write(folder: Path, home: Path) -> None:
    home.write_text("a file where a folder should be")
    with pytest.raises(CannotWrite, match="CHATSERVE_HOME"):
        write_receipt(folder / "x.gguf", receipt("w_1"), "")


def test_a_folder_s_old_receipt_does_not_hide_a_newer_one_in_the_cache(
    folder: Path, home: Path
) -> None:
    write_receipt(folder, receipt("w_other"), "")
    write_receipt(folder / "x.gguf", receipt("w_1"), "")
    assert read_receipt(folder, "w_1") == receipt("w_1")


def test_a_failed_write_leaves_the_old_receipt(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_receipt(folder, receipt("w_1"), "old")
    home.write_text("")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWrite):
        write_receipt(folder, receipt("w_1", measurement(mean_kl=1.0)), "new")
    assert read_receipt(folder, "w_1") == receipt("w_1")
    assert sorted(os.listdir(folder)) == [RECEIPT_NAME, PLOT_NAME]


@pytest.mark.parametrize("replaced", [1, 2])
def test_stopped_between_the_files_the_receipt_is_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: int
) -> None:
    write_receipt(folder, receipt("w_1"), "old")
    replace, calls = os.replace, [0]

    def stopped(*names: Any) -> None:
        calls[0] += 1
        if calls[0] == replaced:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_receipt(folder, receipt("w_1", measurement(mean_kl=1.0)), "new")
    assert read_receipt(folder, "w_1") == receipt("w_1")
    assert sorted(os.listdir(folder)) == [RECEIPT_NAME, PLOT_NAME]


DAMAGES: list[tuple[list[Any], Any]] = [
    (["format"], module.FORMAT + 1),
    (["format"], None),
    (["fingerprint"], 5),
    (["version"], "x" * 2000),
    (["text"], "shipped"),
    (["text", "num_positions"], "many"),
    (["reference_perplexity"], float("nan")),
    (["measurements"], []),
    (["measurements"], {}),
    (["measurements", 0, "form"], None),
    (["measurements", 0, "form", "name"], ["x"]),
    (["measurements", 0, "mean_kl"], "0.1"),
    (["measurements", 0, "mean_kl"], True),
    (["measurements", 0, "p99_kl"], float("inf")),
    (["measurements", 0, "layers", 0], 3),
    (["measurements", 0, "quantiles"], 7),
    (["measurements", 0, "quantiles"], [0.1]),  # a plot has no line through one point
]


@pytest.mark.parametrize(("path", "value"), DAMAGES)
def test_a_damaged_receipt_is_none(folder: Path, path: list[Any], value: Any) -> None:
    table = json.loads(json.dumps(receipt("w_1").as_json()))
    assert receipt_of(table) == receipt("w_1")
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert receipt_of(table) is None
    (folder / RECEIPT_NAME).write_text(json.dumps(table))
    assert read_receipt(folder, "w_1") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"{}"])
def test_a_file_that_is_no_receipt_is_none(folder: Path, content: bytes) -> None:
    (folder / RECEIPT_NAME).write_bytes(content)
    assert read_receipt(folder, "w_1") is None


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_receipt(elsewhere, receipt("w_1"), "")
    (folder / RECEIPT_NAME).symlink_to(elsewhere / RECEIPT_NAME)
    assert read_receipt(folder, "w_1") is None
    shutil.copy(elsewhere / RECEIPT_NAME, folder / "copy")
    os.replace(folder / "copy", folder / RECEIPT_NAME)
    assert read_receipt(folder, "w_1") is not None


OTHERS = {
    "of other weights": {"fingerprint": "w_2"},
    "on another text": {"text": Text("shipped", "cd" * 32, 1924, 512)},
    "by another version": {"version": "0.0.0"},
    "against something else": {"reference": "bfloat16"},
}


def test_forms_measured_alike_are_kept_together() -> None:
    old = receipt("w_1", measurement(mean_kl=1.0), measurement(INT4))
    new = receipt("w_1", measurement(mean_kl=2.0))
    joined = new.joined(old)
    assert joined.measurements == (measurement(INT4), measurement(mean_kl=2.0))
    assert new.joined(None) == new


@pytest.mark.parametrize("name", OTHERS)
def test_forms_measured_otherwise_are_dropped(name: str) -> None:
    changes = dict(OTHERS[name])
    fingerprint = changes.pop("fingerprint", "w_1")
    old = receipt(str(fingerprint), measurement(INT4), **changes)
    assert receipt("w_1").joined(old) == receipt("w_1")


def test_forms_of_an_older_rounding_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    old = receipt("w_1", measurement(INT4))
    monkeypatch.setattr(module, "ROUNDING", module.ROUNDING + 1)
    new = receipt("w_1")
    assert new.joined(old) == new
    assert new.is_current and not old.is_current


SERVED = {
    "8 bits on PyTorch's operators": dataclasses.replace(INT8, on_kernels=False),
    "another dtype": dataclasses.replace(INT8, dtype_name="bfloat16"),
    "another device": dataclasses.replace(INT8, kind="cuda"),
    "4 bits": INT4,
    "fine 8 bits": dataclasses.replace(INT8, packing=FINE),
    "groups with coarse activations": dataclasses.replace(INT8, packing=Packing(is_grouped=True)),
    "nothing packed": PlainForm("cpu", "float32"),
}


@pytest.mark.parametrize("name", SERVED)
def test_figures_of_one_form_are_not_shown_for_another(name: str) -> None:
    kept = receipt("w_1")
    assert kept.of_form(MeasuredForm.of(INT8)) == measurement()
    form = MeasuredForm.of(SERVED[name])
    assert kept.of_form(form) is None
    both = receipt("w_1", measurement(), measurement(SERVED[name], mean_kl=3.0))
    found = both.of_form(form)
    assert found is not None and found.mean_kl == 3


def test_names_of_forms_differ() -> None:
    forms = [MeasuredForm.of(form).name for form in (INT8, INT4, SERVED["fine 8 bits"])]
    forms += [MeasuredForm.of(SERVED["groups with coarse activations"]).name]
    assert forms == ["int8", "int4/32", "int8/32 a16", "int8/32"]


def test_figures_of_another_version_are_not_shown() -> None:
    old: Receipt = receipt("w_1", version="0.0.0")
    assert old.of_form(MeasuredForm.of(INT8)) is None
    assert not old.is_current and receipt("w_1").is_current


def test_figures_of_an_older_rounding_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    old = receipt("w_1")
    monkeypatch.setattr(module, "ROUNDING", module.ROUNDING + 1)
    assert old.of_form(MeasuredForm.of(INT8)) is None


def test_a_line_for_people() -> None:
    assert measurement().summary() == (
        "int8: mean KL 0.0059, p99 0.033, same top token 95.8%, perplexity 13.000"
    )
