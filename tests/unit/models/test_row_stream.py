"""Rows on their way into a network: straight into their place, or one slice ahead."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatserve.errors import ModelLoadError
from chatserve.models import row_stream
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.destinations import Destination
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.row_stream import RowStream, pieces
from chatserve.models.safetensors_file import SafetensorsFile
from chatserve.models.torch_bin import TorchBinFile
from chatserve.models.weights import DirectSource, TensorInfo
from tests import tiny

WEIGHTS = {"a": torch.randn(50, 8).half(), "b": torch.randn(30, 8), "c": torch.randn(6)}


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


def move(source: DirectSource, places: dict[str, Destination]) -> int:
    infos = source.tensors()
    wanted = [piece for name, place in places.items() for piece in pieces(infos[name], place)]
    with torch.inference_mode(), RowStream(source) as stream:
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


def test_the_next_rows_are_read_while_some_are_stored(source: DirectSource) -> None:
    """Storing waits for the read of the next slice: on one thread it would wait for ever."""
    reads = [threading.Event() for _ in range(10)]
    stored: list[int] = []

    class Watched:
        def tensors(self) -> Any:
            return source.tensors()

        def read(self, name: str, rows: range | None = None) -> torch.Tensor:
            raise AssertionError("into fresh memory")

        def close(self) -> None: ...

        def read_into(self, name: str, rows: range, out: torch.Tensor) -> None:
            source.read_into(name, rows, out)
            reads[rows.start // 3].set()

    class Waits(Place):
        def load_rows(self, start: int, rows: torch.Tensor) -> None:
            after = min(start // 3 + 1, 9)
            assert reads[after].wait(timeout=30)
            super().load_rows(start, rows)
            stored.append(start)

    place = Waits(30, 8)
    with closing(source):
        move(Watched(), {"b": Destination(place, 0, (30, 8))})
    assert place.values.equal(WEIGHTS["b"]) and stored == list(range(0, 30, 3))


def test_a_file_that_is_cut_meanwhile_is_named_and_the_thread_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(WEIGHTS, path)
    before = threading.active_count()
    for place in (Place(30, 8), OpenPlace(30, 8)):
        with closing(SafetensorsFile(path)) as source:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size - 200)
            places = {"a": Destination(Place(50, 8), 0, (50, 8)),
                      "b": Destination(place, 0, (30, 8))}  # fmt: skip
            with pytest.raises(ModelLoadError, match="became shorter"):
                move(source, places)
        save_file(WEIGHTS, path)
    assert threading.active_count() == before


@pytest.mark.parametrize("form", ["float16", "float32"])
def test_half_precision_goes_from_the_file_into_the_network(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of what already has its final form; what has not is converted."""
    tiny.save_model(tmp_path, dtype=torch.float16)
    stored = set[str]()
    real = row_stream._stored

    def spy(piece: row_stream.Piece, read: Any) -> Any:
        stored.add(piece.info.name)
        return real(piece, read)

    monkeypatch.setattr(row_stream, "_stored", spy)
    checkpoint = open_checkpoint(tmp_path)
    with closing(checkpoint.weights) as weights:
        load_model(checkpoint, choose_policy("cpu", form))
        matrices = {name for name, info in weights.tensors().items() if len(info.shape) == 2}
    assert (matrices & stored == set()) == (form == "float16")


def test_pieces_cover_a_tensor() -> None:
    info = TensorInfo("x", (10, 8), "float16", 160)
    place = Destination(Place(10, 8), 0, (10, 8))
    rows = [piece.rows for piece in pieces(info, place)]
    assert [number for each in rows for number in each] == list(range(10))
    assert max(map(len, rows)) == 3 and sum(p.num_bytes for p in pieces(info, place)) == 160
