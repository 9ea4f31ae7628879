"""Safetensors files: strict headers; the official library is the judge."""

from __future__ import annotations

import json
import random
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from chatserve.errors import ModelLoadError
from chatserve.models.safetensors_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    SafetensorsFile,
)


def all_dtypes() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        values = torch.randint(0, 2, (3, 4))
        tensors[name.lower()] = values.to(getattr(torch, dtype))
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.empty(0, 4)
    return tensors


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int = 0, end: int = 8, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end], **changes}


def test_every_dtype_reads_back_equal(tmp_path: Path) -> None:
    tensors = all_dtypes()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with closing(SafetensorsFile(tmp_path / "model.safetensors")) as source:
        assert set(source.tensors()) == set(tensors)
        for name, expected in tensors.items():
            info, got = source.tensors()[name], source.read(name)
            assert (info.name, info.shape, info.dtype) == (name, tuple(got.shape), got.dtype)
            assert info.num_bytes == expected.nbytes
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert got.is_contiguous() and raw(got).equal(raw(expected))


def test_tensors_come_in_disk_order(tmp_path: Path) -> None:
    header = {"a": entry(8, 16), "c": entry(0, 8), "b": entry(16, 24)}
    path = write_raw(tmp_path / "x.safetensors", header, bytes(24))
    with closing(SafetensorsFile(path)) as source:
        assert list(source.tensors()) == ["c", "a", "b"]


def test_a_read_tensor_owns_its_memory(tmp_path: Path) -> None:
    save_file({"w": torch.arange(4.0)}, tmp_path / "x.safetensors")
    with closing(SafetensorsFile(tmp_path / "x.safetensors")) as source:
        source.read("w").fill_(7)
        assert source.read("w").tolist() == [0, 1, 2, 3]


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{nonsense", b"", "not valid"),
    "not an object": (b"[1]", b"", "not a JSON object"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", "not valid"),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        "occurs twice",
    ),
    "entry is a list": ({"a": [1]}, b"", "not described"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, b"", "not described"),
    "long name": ({"a" * 1025: entry()}, bytes(8), "1025 characters"),
    "unknown dtype": ({"a": entry(dtype="F4")}, bytes(8), "'F4'"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, bytes(8), "dtype"),
    "negative shape": ({"a": entry(shape=[-2])}, bytes(8), "impossible"),
    "fractional shape": ({"a": entry(shape=[2.0])}, bytes(8), "impossible"),
    "boolean shape": ({"a": entry(shape=[True, 2])}, bytes(8), "impossible"),
    "nine dimensions": ({"a": entry(shape=[1] * 8 + [2])}, bytes(8), "impossible"),
    "astronomic shape": ({"a": entry(shape=[1 << 62] * 4)}, bytes(8), "its place has 8"),
    "one offset": ({"a": entry(data_offsets=[0])}, bytes(8), "impossible"),
    "offsets reversed": ({"a": entry(8, 0)}, bytes(8), "its place has -8"),
    "shape too small": ({"a": entry(shape=[1])}, bytes(8), "takes 4 bytes"),
    "overlap": ({"a": entry(), "b": entry(4, 12)}, bytes(12), "overlaps"),
    "gap": ({"a": entry(), "b": entry(12, 20)}, bytes(20), "gap"),
    "begins late": ({"a": entry(8, 16)}, bytes(16), "gap"),
    "truncated data": ({"a": entry()}, bytes(5), "truncated"),
    "trailing bytes": ({"a": entry()}, bytes(9), "1 bytes follow"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_refused_with_file_and_reason(tmp_path: Path, case: str) -> None:
    header, data, reason = BAD_HEADERS[case]
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ModelLoadError, match=reason) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x01", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_header_length_is_checked_before_it_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=f"truncated|over {MAX_HEADER_BYTES}"):
        SafetensorsFile(path)


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    header = {f"t{i}": entry(0, 0, shape=[0]) for i in range(100_001)}
    with pytest.raises(ModelLoadError, match="100001 tensors"):
        SafetensorsFile(write_raw(tmp_path / "x.safetensors", header))


def test_tensors_are_counted_before_the_header_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*arguments: Any, **options: Any) -> Any:
        pytest.fail("the header was parsed")

    path = write_raw(tmp_path / "x.safetensors", b'{"a":' + b"{}," * 100_002 + b"}")
    monkeypatch.setattr(json, "loads", parse)
    with pytest.raises(ModelLoadError, match="100002 tensors"):
        SafetensorsFile(path)


def test_a_hundred_thousand_tensors_are_read(tmp_path: Path) -> None:
    """As many as there may be; each is looked up and compared once."""
    one = b'"w%d":{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}'
    header = b"{" + b",".join(one % i for i in range(MAX_TENSORS)) + b"}"
    with closing(SafetensorsFile(write_raw(tmp_path / "x.safetensors", header))) as source:
        assert len(source.tensors()) == MAX_TENSORS


WIDE = b'{"__metadata__":{"a":"\xf0\x9f\x99\x82'
HEADERS = {
    "lists in a list": (b'{"a":[', b"[],", b"[]]}", "[0-9]+ values, over 1400000"),
    "many small texts": (b'{"__metadata__":{', b'"a":"",', b'"b":""}}', "values, over 1400000"),
    "four bytes a character": (WIDE, b"x", b'"}}', "bytes that are not all ASCII"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_of_many_values_is_refused_before_it_is_parsed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed, such a file took up to twenty times its size."""
    start, piece, end, reason = HEADERS[case]
    header = start + piece * (20_000_000 // len(piece)) + end
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("the header was parsed"))
    with pytest.raises(ModelLoadError, match=reason):
        SafetensorsFile(write_raw(tmp_path / "x.safetensors", header))


def test_a_header_as_long_as_it_may_be_takes_twice_its_size(tmp_path: Path) -> None:
    start, end = b'{"__metadata__":{"a":"', b'"}}'
    num_bytes = MAX_HEADER_BYTES - len(start) - len(end)
    path = write_raw(tmp_path / "x.safetensors", start + b"x" * num_bytes + end)
    tracemalloc.start()
    try:
        with closing(SafetensorsFile(path)) as source:
            assert not source.tensors()
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + (64 << 20)
    finally:
        tracemalloc.stop()


def test_git_lfs_placeholder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelLoadError, match="git lfs pull"):
        SafetensorsFile(path)


def test_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    with closing(SafetensorsFile(path)) as source:
        with open(path, "r+b") as file:
            file.truncate(200)
        with pytest.raises(ModelLoadError, match="became shorter"):
            source.read("w")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of: flipped bytes in the first kilobyte, a cut, an insertion, a digit changed."""
    changed = bytearray(data)
    operation = rng.randrange(4)
    if operation == 0:
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(min(len(changed), 1024))] = rng.randrange(256)
    elif operation == 1:
        del changed[rng.randrange(len(changed)) :]
    elif operation == 2:
        place = rng.randrange(len(changed))
        changed[place:place] = rng.randbytes(rng.randint(1, 9))
    else:
        digits = [i for i, byte in enumerate(changed[8:900], 8) if chr(byte).isdigit()]
        changed[rng.choice(digits)] = ord(str(rng.randrange(10)))
    return bytes(changed)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with closing(SafetensorsFile(path)) as source:
        return {name: source.read(name) for name in source.tensors()}


def test_mutants_load_as_the_official_library_does_or_are_refused(tmp_path: Path) -> None:
    save_file(all_dtypes(), tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    rng = random.Random(33)
    num_loaded = 0
    for number in range(200):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(mutate(good, rng))
        try:
            ours = read_all(path)
        except ModelLoadError as error:
            assert str(path) in str(error)
            continue
        num_loaded += 1
        official = load_file(path)
        assert ours.keys() == official.keys()
        for name, tensor in ours.items():
            if tensor.dtype != torch.bool:
                assert raw(tensor).equal(raw(official[name]))
    assert 0 < num_loaded < 200


@pytest.mark.parametrize("case", ["overlap", "gap", "truncated data", "trailing bytes"])
def test_official_library_refuses_the_same_layouts(tmp_path: Path, case: str) -> None:
    header, data, _ = BAD_HEADERS[case]
    with pytest.raises(SafetensorError):
        load_file(write_raw(tmp_path / "x.safetensors", header, data))
