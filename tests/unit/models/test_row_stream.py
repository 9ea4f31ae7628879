"""Rows on their way into a network: straight into their place, or packed by all cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatserve.errors import ModelLoadError
from chatserve.kernels.library import load_kernels
from chatserve.models import row_stream
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.destinations import Destination
from chatserve.models.device import choose_policy
from chatserve.models.kernel_matrix import GateUpRows, KernelMatrix, Team
from chatserve.models.loader import load_model
from chatserve.models.packing import FINE, FOUR_BITS, Packing
from chatserve.models.row_stream import RowStream, pieces
from chatserve.models.safetensors_file import SafetensorsFile
from chatserve.models.torch_bin import TorchBinFile
from chatserve.models.weights import DirectSource, TensorInfo
from tests import tiny

WEIGHTS = {"a": torch.randn(50, 8).half(), "b": torch.randn(30, 8), "c": torch.randn(6)}
HALF = torch.zeros(50, 16, dtype=torch.float16)


class Place:
    """Keeps what it is given, as a matrix that packs does."""

    def __init__(self, *shape: int) -> None:
        self.values = torch.zeros(shape)
        self.threads: set[int] = set()

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        self.threads.add(threading.get_ident())
        self.values[start : start + len(rows)] = rows


class OpenPlace(Place):
    def rows(self, start: int, count: int) -> torch.Tensor:
        return self.values[start : start + count]

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        raise AssertionError("was copied")


class Packed(Place):
    def load_apart(self, start: int, rows: torch.Tensor) -> None:
        self.load_rows(start, rows)


@pytest.fixture(params=["safetensors", "bin", "transposed bin"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "safetensors":
        save_file(WEIGHTS, tmp_path / "m.safetensors")
        return SafetensorsFile(tmp_path / "m.safetensors")
    turned = request.param != "bin"
    torch.save(
        {n: w.t().contiguous().t() if turned and w.dim() == 2 else w for n, w in WEIGHTS.items()},
        tmp_path / "m.bin",
    )
    return TorchBinFile(tmp_path / "m.bin")


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stream, "SLICE_VALUES", 3 * 8)


def wanted_of(source: DirectSource, places: dict[str, Destination]) -> list[row_stream.Piece]:
    infos = source.tensors()
    return [piece for name, place in places.items() for piece in pieces(infos[name], place)]


def move(source: DirectSource, places: dict[str, Destination]) -> int:
    wanted = wanted_of(source, places)
    with torch.inference_mode(), RowStream(source, 2) as stream:
        moved = list(stream.move(wanted))
    assert moved == wanted
    return sum(piece.num_bytes for piece in moved)


def test_all_rows_arrive_in_order_whatever_their_place(source: DirectSource) -> None:
    open_a, plain_b, open_c = OpenPlace(60, 8), Place(40, 8), OpenPlace(6)
    open_a.values = open_a.values.half()
    places = {
        "a": Destination(open_a, 5, (50, 8)),
        "b": Destination(plain_b, 10, (30, 8)),
        "c": Destination(open_c, 0, (6,)),
    }
    with closing(source):
        num_bytes = move(source, places)
    assert num_bytes == sum(info.num_bytes for info in source.tensors().values())
    assert open_a.values[5:55].equal(WEIGHTS["a"])
    assert plain_b.values[10:].equal(WEIGHTS["b"]) and open_c.values.equal(WEIGHTS["c"])
    assert not open_a.values[:5].any() and not plain_b.values[:10].any()
    assert plain_b.threads == {threading.get_ident()}


def test_a_place_of_another_dtype_converts(source: DirectSource) -> None:
    class Converts(Place):
        def rows(self, start: int, count: int) -> torch.Tensor:
            return self.values[start : start + count]

    place = Converts(50, 8)
    with closing(source):
        move(source, {"a": Destination(place, 0, (50, 8))})
    assert place.values.equal(WEIGHTS["a"].float())


@pytest.mark.parametrize("memory", [HALF[:, :8], HALF[:, 8:].to("meta")])
def test_rows_that_no_file_can_be_read_into_are_copied(
    memory: torch.Tensor, source: DirectSource
) -> None:
    """Columns of something wider, and another device's memory."""

    class Elsewhere(Place):
        def rows(self, start: int, count: int) -> torch.Tensor:
            return memory[start : start + count]

    place = Elsewhere(50, 8)
    with closing(source):
        move(source, {"a": Destination(place, 0, (50, 8))})
    assert place.values.equal(WEIGHTS["a"].float())


def test_no_more_pieces_are_under_way_than_threads_can_store(source: DirectSource) -> None:
    begun = list[row_stream.Piece]()

    def wanted() -> Iterator[row_stream.Piece]:
        for piece in wanted_of(source, {"b": Destination(OpenPlace(30, 8), 0, (30, 8))}):
            begun.append(piece)
            yield piece

    with closing(source), RowStream(source, 2) as stream:
        for number, _ in enumerate(stream.move(wanted()), 1):
            assert len(begun) <= number + 2
    assert len(begun) == 10


@pytest.mark.parametrize("start", [0, 12, 27])
def test_what_a_thread_fails_at_is_said(start: int, source: DirectSource) -> None:
    class Fails(Packed):
        def load_apart(self, at: int, rows: torch.Tensor) -> None:
            if at == start:
                raise ModelLoadError("no place")

    with closing(source), pytest.raises(ModelLoadError, match="no place"):
        move(source, {"b": Destination(Fails(30, 8), 0, (30, 8))})


def test_rows_are_packed_by_several_threads_at_once(source: DirectSource) -> None:
    """Each piece waits for a second thread that packs: on one alone it would wait for ever."""
    together = threading.Barrier(2)

    class Packs(Place):
        def load_rows(self, start: int, rows: torch.Tensor) -> None:
            raise AssertionError("by one thread")

        def load_apart(self, start: int, rows: torch.Tensor) -> None:
            together.wait(timeout=30)
            super().load_rows(start, rows.clone())

    place, plain = Packs(30, 8), Place(50, 8)
    with closing(source):
        move(source, {"b": Destination(place, 0, (30, 8)), "a": Destination(plain, 0, (50, 8))})
    assert place.values.equal(WEIGHTS["b"]) and plain.values.equal(WEIGHTS["a"].float())
    assert len(place.threads) == 2 and threading.get_ident() not in place.threads


def test_rows_are_read_into_their_place_by_several_threads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read waits for a second one beside it, too."""
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    together, real = threading.Barrier(2), SafetensorsFile.read_into
    threads = set[int]()

    def wait(self: Any, *args: Any) -> None:
        threads.add(threading.get_ident())
        together.wait(timeout=30)
        real(self, *args)

    monkeypatch.setattr(SafetensorsFile, "read_into", wait)
    place = OpenPlace(30, 8)  # ten pieces
    with closing(SafetensorsFile(tmp_path / "m.safetensors")) as source:
        move(source, {"b": Destination(place, 0, (30, 8))})
    assert place.values.equal(WEIGHTS["b"])
    assert len(threads) == 2 and threading.get_ident() not in threads


def test_the_kernels_pack_alike_on_one_thread_and_on_several() -> None:
    kernels = load_kernels()
    team = Team(kernels, 2)
    rows = torch.randn(96, 64)
    for packing in (Packing(), FINE, Packing(4, is_grouped=True), FOUR_BITS):
        matrices = [KernelMatrix(kernels, team, 96, 64, packing) for _ in range(2)]
        GateUpRows(matrices[0]).load_rows(0, rows[:48])
        GateUpRows(matrices[0]).load_rows(48, rows[48:])
        with ThreadPoolExecutor(3) as threads:
            starts = range(0, 96, 4)
            load = GateUpRows(matrices[1]).load_apart
            list(threads.map(load, starts, [rows[at : at + 4] for at in starts]))
        for row in range(96):
            assert matrices[0].row(row).equal(matrices[1].row(row))


def test_a_file_that_is_cut_meanwhile_is_named_and_the_thread_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(WEIGHTS, path)
    for place in (Place(30, 8), OpenPlace(30, 8), Packed(30, 8)):
        with closing(SafetensorsFile(path)) as source:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size - 200)
            places = {"a": Destination(Place(50, 8), 0, (50, 8)),
                      "b": Destination(place, 0, (30, 8))}  # fmt: skip
            stream = RowStream(source, 2)
            with pytest.raises(ModelLoadError, match="became shorter"), stream:
                list(stream.move(wanted_of(source, places)))
            names = [thread.name for thread in threading.enumerate()]
            assert not [name for name in names if name.startswith("load")]
        save_file(WEIGHTS, path)


@pytest.mark.parametrize("form", ["float16", "float32"])
def test_half_precision_goes_from_the_file_into_the_network(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of what already has its final form; what has not is converted."""
    tiny.save_model(tmp_path, dtype=torch.float16)
    fresh = set[str]()
    real = SafetensorsFile.read_into

    def spy(self: Any, name: str, rows: range, out: torch.Tensor) -> None:
        if out.untyped_storage().nbytes() <= out.nbytes:  # memory of its own, not a network's rows
            fresh.add(name)
        real(self, name, rows, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", spy)
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights) as weights:
        load_model(checkpoint, choose_policy("cpu", form))
        matrices = {name for name, info in weights.tensors().items() if len(info.shape) == 2}
    assert (matrices & fresh == set()) == (form == "float16")


def test_pieces_cover_a_tensor() -> None:
    info = TensorInfo("x", (10, 8), "float16", 160)
    place = Destination(Place(10, 8), 0, (10, 8))
    rows = [piece.rows for piece in pieces(info, place)]
    assert [number for each in rows for number in each] == list(range(10))
    assert max(map(len, rows)) == 3 and sum(p.num_bytes for p in pieces(info, place)) == 160
