"""Adapters beside a base: what is loaded, replaced and refused, and from where."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.config import MAX_ADAPTERS, MAX_CARDS
from chatserve.engine import adapters as module
from chatserve.engine.adapters import AdapterPlace, Adapters
from chatserve.errors import (
    AdapterConflict,
    AdapterRefused,
    DoesNotFit,
    ModelLoadError,
    ModelNotFound,
)
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.llama import Llama
from chatserve.models.loader import load_model
from chatserve.models.merge import merge
from tests import adapters, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny.save_model(folder, tokenizer=False)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        yield checkpoint


@pytest.fixture(scope="module")
def network(checkpoint: Checkpoint) -> Any:
    return load_model(checkpoint, choose_policy("cpu", "float32", load_8bit=False))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    adapters.write(tmp_path / "root" / "sql")
    adapters.write(tmp_path / "root" / "law", adapters.random_pairs(adapters.tiny_shapes(), seed=1))
    return tmp_path / "root"


@pytest.fixture
def table(checkpoint: Checkpoint, network: Any, root: Path) -> Adapters:
    return Adapters(checkpoint, network, root)


def test_loaded_by_name(table: Adapters, root: Path) -> None:
    sql = table.load("sql", root / "sql")
    law = table.load_below("law-2", "law")
    assert table.loaded() == {"sql": sql, "law-2": law}
    assert sql.fingerprint.startswith("ad_") and sql.fingerprint != law.fingerprint
    # rank 4 of q (64, 64) and v (32, 64) in two layers, in float32
    assert sql.network.num_bytes == 2 * 4 * 4 * (64 + 64 + 32 + 64)
    table.unload("sql")
    assert table.loaded() == {"law-2": law}


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a/b", ".hidden", "a\n", "ü", "x" * 65])
def test_names_that_no_request_could_carry(table: Adapters, root: Path, name: str) -> None:
    with pytest.raises(AdapterRefused, match="no name for an adapter"):
        table.load(name, root / "sql")
    assert not table.loaded()


def test_a_name_that_is_taken(table: Adapters, root: Path) -> None:
    old = table.load("sql", root / "sql")
    with pytest.raises(AdapterRefused, match=r"there is an adapter sql already; .*load_inplace"):
        table.load("sql", root / "law")
    assert table.loaded() == {"sql": old}
    new = table.load("sql", root / "law", replace=True)
    assert table.loaded() == {"sql": new} and new.fingerprint != old.fingerprint


def test_the_limit(table: Adapters, root: Path) -> None:
    for index in range(MAX_ADAPTERS):
        table.load(f"a{index}", root / "sql")
    with pytest.raises(AdapterRefused, match="64 adapters are loaded, the limit is 64"):
        table.load("one-more", root / "sql")
    table.load("a0", root / "law", replace=True)
    table.unload("a1")
    table.load("one-more", root / "sql")


def wrong_rank(folder: Path) -> None:
    adapters.write(folder, r=5)


def wrong_base(folder: Path) -> None:
    shapes = {name: (rows, 2 * columns) for name, (rows, columns) in adapters.tiny_shapes().items()}
    adapters.write(folder, adapters.random_pairs(shapes))


def missing_file(folder: Path) -> None:
    (adapters.write(folder) / "adapter_model.safetensors").unlink()


def half_a_file(folder: Path) -> None:
    path = adapters.write(folder) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_numbers(folder: Path) -> None:
    tensors = adapters.random_pairs(adapters.tiny_shapes())
    next(iter(tensors.values()))[0, 0] = torch.inf
    adapters.write(folder, tensors)


def nothing(folder: Path) -> None:
    pass


FAULTS = {
    wrong_rank: "in rank 4 and 4, adapter_config.json says 5",
    wrong_base: "it belongs to another base",
    missing_file: "has adapter_config.json but no weights",
    half_a_file: "adapter_model.safetensors",
    no_numbers: "are no numbers",
    nothing: "no such folder",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_failed_load_leaves_the_old_one(table: Adapters, root: Path, fault: Any) -> None:
    old = table.load("sql", root / "sql")
    fault(root / "new")
    for name, replace in (("sql", True), ("other", False)):
        with pytest.raises(ModelLoadError, match=FAULTS[fault]):
            table.load(name, root / "new", replace=replace)
    assert table.loaded() == {"sql": old}


def test_no_memory_is_said_before_it_is_taken(
    table: Adapters, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_values = 2 * 4 * (64 + 64 + 32 + 64)
    # as it is read, and as the network keeps it
    monkeypatch.setattr(module, "available_bytes", lambda device: 8 * num_values)
    table.load("sql", root / "sql")
    monkeypatch.setattr(module, "available_bytes", lambda device: 8 * num_values - 1)
    (root / "law" / "adapter_model.safetensors").rename(root / "aside")
    tensors = adapters.random_pairs(adapters.tiny_shapes())
    next(iter(tensors.values()))[0, 0] = torch.inf  # would be found if it were read
    adapters.write(root / "law", tensors)
    with pytest.raises(DoesNotFit, match=r"needs 0\.0 GB, cpu has 0\.0 GB free; unload another"):
        table.load("law", root / "law")
    assert list(table.loaded()) == ["sql"]


def test_an_adapter_that_is_in_the_weights_already(checkpoint: Checkpoint, root: Path) -> None:
    merged = merge(open_checkpoint(checkpoint.path), [root / "sql"])
    with closing(merged.weights):
        model = load_model(merged, choose_policy("cpu", "float32", load_8bit=False))
    assert isinstance(model, Llama)
    table = Adapters(merged, model)
    with pytest.raises(ModelLoadError, match="in the weights already"):
        table.load("sql", root / "sql")
    table.load("law", root / "law")


def test_a_model_of_another_family(checkpoint: Checkpoint, root: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"runs through transformers: merge it with peft's"):
        Adapters(checkpoint, None).load("sql", root / "sql")


# ---- which folders a request may name ----


def test_nothing_is_loaded_by_request_without_a_root(
    checkpoint: Checkpoint, network: Any, root: Path
) -> None:
    with pytest.raises(AdapterRefused, match="start it with --adapter-root") as caught:
        Adapters(checkpoint, network).load_below("sql", str(root / "sql"))
    assert caught.value.param == "lora_path"


def test_folders_below_the_root(table: Adapters, root: Path) -> None:
    os.symlink(root / "sql", root / "alias")
    for index, path in enumerate(("sql", "./sql", "law/../sql", str(root / "sql"), "alias")):
        assert table.load_below(f"a{index}", path).fingerprint


@pytest.mark.parametrize(
    "path", ["..", "../outside", "/etc", ".", "sql/../..", "link", "a\0b", "~", "loop"]
)
def test_folders_elsewhere(table: Adapters, root: Path, path: str) -> None:
    adapters.write(root.parent / "outside")
    os.symlink(root.parent / "outside", root / "link")
    os.symlink(root / "loop", root / "loop")
    with pytest.raises((AdapterRefused, ModelLoadError)) as caught:
        table.load_below("sql", path)
    # "~" is a name like any other, and "loop" leads nowhere
    assert isinstance(caught.value, AdapterRefused) or path in ("~", "loop")
    assert not table.loaded()


def test_a_root_that_is_a_link_is_followed(
    checkpoint: Checkpoint, network: Any, root: Path, tmp_path: Path
) -> None:
    os.symlink(root, tmp_path / "way")
    table = Adapters(checkpoint, network, tmp_path / "way")
    table.load_below("sql", str(tmp_path / "way" / "sql"))


# ---- staged first ----


def test_a_staged_adapter_is_served_once_it_is_wanted(table: Adapters, root: Path) -> None:
    old = table.load("sql", root / "sql")
    with pytest.raises(AdapterRefused, match="load_inplace"):
        table.stage_below("sql", "law")
    new = table.stage_below("sql", "law", replace=True)
    assert table.loaded() == {"sql": old}
    table.settle("sql", is_wanted=True)
    assert table.loaded() == {"sql": new} and new.fingerprint != old.fingerprint
    with pytest.raises(AdapterRefused, match="staged any more; load it again"):
        table.settle("sql", is_wanted=True)


def test_a_staged_adapter_that_is_not_wanted_goes(table: Adapters) -> None:
    gone = weakref.ref(table.stage_below("sql", "law"))
    table.settle("law", is_wanted=False)  # of another name: none of its business
    assert gone() is not None
    table.settle("sql", is_wanted=False)
    assert gone() is None and not table.loaded()
    with pytest.raises(AdapterRefused, match="staged any more"):
        table.settle("sql", is_wanted=True)


def test_what_cannot_be_staged_leaves_nothing_staged(table: Adapters, root: Path) -> None:
    table.stage_below("sql", "law")
    half_a_file(root / "broken")
    with pytest.raises(ModelLoadError):
        table.stage_below("sql", "broken")
    with pytest.raises(AdapterRefused, match="staged any more"):
        table.settle("sql", is_wanted=True)
    with pytest.raises(AdapterRefused, match="does not lie below"):
        table.stage_below("sql", "../base")


def test_many_model_names_leave_place_for_fewer_adapters(
    checkpoint: Checkpoint, network: Any, root: Path
) -> None:
    names = [f"n{index}" for index in range(MAX_CARDS // 2)]
    table = Adapters(checkpoint, network, root, AdapterPlace.beside(names))
    table.stage_below("sql", "sql")
    table.load("law", root / "law")
    with pytest.raises(AdapterRefused, match="the limit is 1 with so many --model-names"):
        table.load("sql", root / "sql")
    with pytest.raises(AdapterRefused, match="the limit is 1"):
        table.settle("sql", is_wanted=True)
    table.load("law", root / "sql", replace=True)
    assert list(table.loaded()) == ["law"]


# ---- one change at a time ----


def during_the_first(
    table: Adapters, change: Callable[[], object], other: Callable[[], object], patch: Any
) -> BaseException | None:
    """`other` begins in a second thread while `change` reads; what it raises."""
    real, threads, went_on = module.load_adapter, list[threading.Thread](), threading.Event()
    raised = list[BaseException]()

    def second() -> None:
        try:
            other()
        except AdapterRefused as error:
            raised.append(error)
        went_on.set()

    def read(*args: Any, **options: Any) -> Any:
        if threads:
            went_on.set()
        else:
            threads.append(threading.Thread(target=second))
            threads[0].start()
            went_on.wait(0.2)  # in vain: it waits for us
        return real(*args, **options)

    patch.setattr(module, "load_adapter", read)
    change()
    threads[0].join(20)
    return raised[0] if raised else None


def test_changes_wait_for_one_another(
    table: Adapters, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql, law = root / "sql", root / "law"
    both = [lambda: table.load("a", sql), lambda: table.load("a", law)]
    assert isinstance(during_the_first(table, *both, monkeypatch), AdapterConflict)
    again = [lambda: table.load("a", law, replace=True), lambda: table.unload("a")]
    assert during_the_first(table, *again, monkeypatch) is None and not table.loaded()
    staged = [
        lambda: table.stage_below("a", "sql"),
        lambda: table.settle("a", is_wanted=True),
    ]
    assert during_the_first(table, *staged, monkeypatch) is None and list(table.loaded()) == ["a"]


def test_an_adapter_that_nobody_has_cannot_be_unloaded(table: Adapters, root: Path) -> None:
    table.load("sql", root / "sql")
    with pytest.raises(ModelNotFound, match="there is no adapter 'law'; loaded are: sql"):
        table.unload("law")
