"""torch's `.bin` files: what `torch.save` writes reads back equal; nothing else is let in."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.torch_bin import TorchBinFile
from chatserve.models.weights import TensorInfo

DTYPES = [
    torch.float16,
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with closing(TorchBinFile(path)) as source:
        return {name: source.read(name) for name in source.tensors()}


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    got = read_all(path)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert got[name].is_contiguous() and got[name].equal(tensor)


def rewrite(source: Path, target: Path, **changes: bytes | None) -> Path:
    """A copy of the archive with records replaced (`data_0=…`) or dropped (None)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            key = member.filename.split("/", 1)[1].replace("/", "_").replace(".pkl", "")
            content = changes.get(key, old.read(member))
            if content is not None:
                new.writestr(member.filename, content)
    return target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.manual_seed(0)
    torch.save(OrderedDict(w=torch.randn(4, 6).half(), b=torch.randn(6)), path)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_protocol_reads_back_equal(tmp_path: Path, protocol: int) -> None:
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 7)}
    torch.save(tensors, tmp_path / "x.bin", pickle_protocol=protocol)
    check(tmp_path / "x.bin", tensors)


def test_views_of_shared_storage_are_read_as_their_own_contiguous_tensors(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "whole": base,
        "tied": base,
        "transposed": base.transpose(0, 2),
        "row": base[1],
        "column": base[:, 1:3, 2],
        "every second": base[..., ::2],
        "one element": base[2, 3, 4:],
        "squeezed strides": base[:1].transpose(0, 1),
    }
    torch.save(tensors, tmp_path / "x.bin")
    check(tmp_path / "x.bin", tensors)
    with closing(TorchBinFile(tmp_path / "x.bin")) as source:
        for name, tensor in tensors.items():
            for rows in (range(1), range(1, len(tensor))):
                part = source.read(name, rows)
                assert part.is_contiguous() and part.equal(tensor[rows.start : rows.stop])


def test_a_module_state_dict_with_metadata_and_parameters(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / "state.bin")
    torch.save(dict(module.named_parameters()), tmp_path / "parameters.bin")
    expected = {name: value.detach() for name, value in module.named_parameters()}
    check(tmp_path / "state.bin", expected)
    check(tmp_path / "parameters.bin", expected)


def test_headers_say_what_read_returns_in_disk_order(tmp_path: Path) -> None:
    torch.save({f"t{n}": torch.zeros(n, 2).half() for n in (3, 1, 2)}, tmp_path / "x.bin")
    with closing(TorchBinFile(tmp_path / "x.bin")) as source:
        assert list(source.tensors()) == ["t3", "t1", "t2"]
        info = source.tensors()["t3"]
        assert info == TensorInfo("t3", (3, 2), "float16", 12)


def test_opening_reads_no_tensor_bytes(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1 << 20)}, tmp_path / "x.bin")
    with closing(TorchBinFile(tmp_path / "x.bin")) as source:
        taken: list[int] = []
        fill = source._file._fill
        source._file._fill = lambda view, offset: (taken.append(len(view)), fill(view, offset))[1]
        source.read("w")
    assert taken == [4 << 20]


def test_an_archive_of_torch_before_2_1_without_byte_order_is_read(saved: Path) -> None:
    older = rewrite(saved, saved.with_name("older.bin"), byteorder=None)
    assert read_all(older).keys() == {"w", "b"}


def structural_cases(saved: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    def save(name: str, value: Any, **options: Any) -> Path:
        torch.save(value, tmp_path / name, **options)
        return tmp_path / name

    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    compressed = tmp_path / "compressed.bin"
    doubled = tmp_path / "doubled.bin"
    with zipfile.ZipFile(saved) as old:
        with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as new:
            for member in old.infolist():
                new.writestr(member.filename, old.read(member))
        with zipfile.ZipFile(doubled, "w") as new:
            for name in ("a/data.pkl", "b/data.pkl"):
                new.writestr(name, b"}.")
    content = saved.read_bytes()
    tensor = torch.ones(2)
    return {
        "legacy": (
            save("l.bin", {"w": tensor}, _use_new_zipfile_serialization=False),
            "older format",
        ),
        "empty": (write("e.bin", b""), "older format"),
        "text": (write("t.bin", b"hello"), "older format"),
        "truncated": (write("c.bin", content[: len(content) // 2]), "truncated"),
        "no end record": (write("n.bin", content[:-1]), "truncated"),
        "compressed": (compressed, "compressed"),
        "two pickles": (doubled, "2 data.pkl"),
        "no pickle": (rewrite(saved, tmp_path / "p.bin", data=None), "0 data.pkl"),
        "big-endian": (rewrite(saved, tmp_path / "b.bin", byteorder=b"big"), "little-endian"),
        "missing storage": (rewrite(saved, tmp_path / "m.bin", data_0=None), "'w' is missing"),
        "short storage": (rewrite(saved, tmp_path / "s.bin", data_0=bytes(47)), "47 bytes instead"),
        "long storage": (rewrite(saved, tmp_path / "g.bin", data_0=bytes(49)), "49 bytes instead"),
        "nested state": (save("n1.bin", {"state_dict": {"w": tensor}}), "'state_dict' is a dict"),
        "number": (save("n2.bin", {"w": tensor, "epoch": 3}), "'epoch' is a int"),
        "list": (save("n3.bin", [tensor]), "holds a list"),
        "tensor": (save("n4.bin", tensor), "holds a tensor"),
        "int keys": (save("n5.bin", {1: tensor}), "key is a int"),
        "broadcast": (save("n6.bin", {"w": torch.zeros(1).expand(1 << 40)}), "leaves its storage"),
        "sparse": (save("n7.bin", {"w": torch.eye(3).to_sparse()}), "_rebuild_sparse_tensor"),
        "float8": (save("n8.bin", {"w": tensor.to(torch.float8_e5m2)}), "_rebuild_tensor_v3"),
        "module": (save("n9.bin", torch.nn.Linear(1, 1)), "torch.nn.modules.linear.Linear"),
        "nine dimensions": (save("n10.bin", {"w": torch.zeros([1] * 9)}), "not made of counts"),
    }


CASES = [
    *("legacy", "empty", "text", "truncated", "no end record", "compressed", "two pickles"),
    *("no pickle", "big-endian", "missing storage", "short storage", "long storage"),
    *("nested state", "number", "list", "tensor", "int keys", "broadcast", "sparse", "float8"),
    *("module", "nine dimensions"),
]


def test_what_is_not_a_flat_dict_of_tensors_is_refused_with_a_reason(
    saved: Path, tmp_path: Path
) -> None:
    cases = structural_cases(saved, tmp_path)
    assert sorted(cases) == sorted(CASES)
    for case, (path, reason) in cases.items():
        with pytest.raises(ModelLoadError, match=reason) as error:
            TorchBinFile(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), case
