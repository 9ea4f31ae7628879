"""Hostile pickles inside an otherwise good archive: refused, and nothing at all happens."""

from __future__ import annotations

import builtins
import operator
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import ModelLoadError
from chatserve.models.torch_bin import TorchBinFile

STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
HOOKS = b"ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(
    storage: bytes = STORAGE,
    offset: bytes = b"K\x00",
    shape: bytes = b"K\x04\x85",
    stride: bytes = b"K\x01\x85",
    rest: bytes = b"\x89" + HOOKS,
    function: bytes = REBUILD,
) -> bytes:
    return function + b"(" + storage + offset + shape + stride + rest + b"tR"


def state(value: bytes, name: str = "w") -> bytes:
    """The pickle of a dict with one entry."""
    return b"\x80\x02}" + text(name) + value + b"s."


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def calls(marker: str) -> dict[str, Any]:
    """Values whose unpickling would create the file `marker`."""
    touch = f"touch {marker}"
    code = f"open({marker!r}, 'w').close()"
    return {
        "os.system": Call(os.system, touch),
        "posix.system by value": Call(sys.modules[os.name].system, touch),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, marker, "w"),
        "__import__": Call(__import__, "os"),
        "compile": Call(compile, code, "x", "exec"),
        "getattr of a module": Call(getattr, Call(__import__, "os"), "system"),
        "nested reduce": Call(list, Call(map, eval, [code])),
        "os.popen": Call(os.popen, touch),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", marker]),
        "subprocess.run": Call(subprocess.run, ["touch", marker]),
        "operator.attrgetter": Call(operator.attrgetter, "system"),
        "operator.methodcaller": Call(operator.methodcaller, "system", touch),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch), 2)),
        "map over eval": Call(map, eval, [code]),
        "Path.write_text": Call(Path.write_text, Path(marker), "x"),
        "builtins.setattr": Call(builtins.setattr, Call(__import__, "os"), "marker", 1),
    }


def opcodes(marker: str) -> dict[str, bytes]:
    """Hand-made pickles of `marker`-creating or machine-breaking opcodes."""
    touch = text(f"touch {marker}")
    system = b"cposix\nsystem\n"
    return {
        "GLOBAL and REDUCE": state(system + touch + b"\x85R"),
        "INST": state(b"(" + touch + b"iposix\nsystem\n"),
        "OBJ": state(b"(" + system + touch + b"o"),
        "NEWOBJ": state(system + touch + b"\x85\x81"),
        "NEWOBJ_EX": state(system + touch + b"\x85}\x92"),
        "STACK_GLOBAL": state(text("posix") + text("system") + b"\x93" + touch + b"\x85R"),
        "STACK_GLOBAL of numbers": state(b"K\x01K\x02\x93"),
        "EXT1": state(b"\x82\x01"),
        "torch.hub.load": state(b"ctorch.hub\nload\n" + touch + b"\x85R"),
        "torch's own eval": state(b"ctorch.serialization\neval\n" + touch + b"\x85R"),
        "attribute of an allowed name": state(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"),
        "storage class called": state(b"ctorch\nFloatStorage\nK\x04\x85R"),
        "OrderedDict called with items": state(b"ccollections\nOrderedDict\n]\x85R"),
        "call of a string": state(text("system") + touch + b"\x85R"),
        "call of a tensor": state(tensor() + b")R"),
        "SETITEM on a list": state(b"]" + text("k") + text("v") + b"s"),
        "SETITEM on a global": state(REBUILD + text("__code__") + text("v") + b"s"),
        "SETITEMS on a tensor": state(tensor() + b"(" + text("k") + text("v") + b"u"),
        "SETITEMS without a value": b"\x80\x02}(" + text("k") + b"u.",
        "SETITEM with a tuple key": b"\x80\x02})" + text("v") + b"s.",
        "APPEND to a dict": state(b"}K\x01a"),
        "APPENDS to a tensor": state(tensor() + b"(K\x01e"),
        "BUILD on a tensor": state(tensor() + b"}b"),
        "BUILD on a global": state(REBUILD + b"}" + text("__globals__") + b"}sb"),
        "BUILD with slots": state(HOOKS + b"N}\x86b"),
        "the name twice": b"\x80\x02}" + (text("w") + tensor() + b"s") * 2 + b".",
        "hooks that are not empty": state(
            tensor(rest=b"\x89" + HOOKS + text("k") + text("v") + b"s")
        ),
        "parameter of a number": state(
            tensor(b"K\x01", b"\x88", HOOKS, b"", b"", b"ctorch._utils\n_rebuild_parameter\n")
        ),
        "too few arguments": state(REBUILD + b")R"),
        "storage is a string": state(tensor(storage=text("0"))),
        "negative stride": state(tensor(stride=b"J\xff\xff\xff\xff\x85")),
        "negative offset": state(tensor(offset=b"J\xff\xff\xff\xff")),
        "negative shape": state(tensor(shape=b"J\xff\xff\xff\xff\x85")),
        "stride past the end": state(tensor(stride=b"K\x02\x85")),
        "offset past the end": state(tensor(offset=b"K\x01")),
        "huge shape": state(tensor(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x0f" + b"\x85")),
        "shape without stride": state(tensor(stride=b")")),
        "shape of text": state(tensor(shape=text("4") + b"\x85")),
        "wrong storage size": state(tensor(storage=STORAGE.replace(b"K\x04", b"K\x05"))),
        "storage of another dtype": state(tensor(storage=STORAGE.replace(b"Float", b"Double"))),
        "quantised storage": state(tensor(storage=STORAGE.replace(b"Float", b"QInt8"))),
        "storage class by another name": state(
            tensor(storage=STORAGE.replace(b"ctorch\nFloat", b"ctorch._utils\nFloat"))
        ),
        "storage outside the archive": state(
            tensor(storage=STORAGE.replace(b"\x01\x00\x00\x000", b"\x05\x00\x00\x00../..", 1))
        ),
        "persistent id of a number": state(b"K\x01Q"),
        "negative element count": state(
            tensor(storage=STORAGE.replace(b"K\x04", b"J\xff\xff\xff\xff"))
        ),
        "deep nesting": state(b")" + b"\x85" * 200_000),
        "deep nesting as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
        "deep nesting as a shape": state(tensor(shape=b")" + b"\x85" * 200_000)),
        "too many opcodes": b"\x80\x02" + b"N" * 2_000_001 + b".",
        "huge memo index": state(b"K\x01r\xff\xff\xff\xff"),
        "recall of nothing": state(b"h\x07"),
        "huge integer": state(b"\x8b\xff\xff\xff\x7f"),
        "integer of 255 bytes": state(b"\x8a\xff" + b"\xff" * 255),
        "integer as text": state(b"I" + b"9" * 5000 + b"\n"),
        "huge string": state(b"X\xff\xff\xff\x7fabc"),
        "long string": state(b"X\x01\x04\x00\x00" + b"a" * 1025),
        "string that is not UTF-8": state(b"X\x01\x00\x00\x00\xff"),
        "name without an end": b"\x80\x02c" + b"a" * 10_000,
        "list that holds itself": b"\x80\x02]q\x00h\x00a.",
        "stack runs dry": b"\x80\x02s.",
        "mark popped": b"\x80\x02(s.",
        "mark as a result": b"\x80\x02(.",
        "no mark": b"\x80\x02K\x01t.",
        "no STOP": b"\x80\x02}",
        "empty pickle": b"",
        "protocol 0": b"I1\n.",
        "protocol 9": b"\x80\x09}.",
        "POP": b"\x80\x02K\x010}.",
        "DUP": b"\x80\x02}2.",
    }


def archive(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", pickled)
        file.writestr("m/data/0", bytes(16))
    return path


def refuse(path: Path, marker: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(ModelLoadError) as error:
        TorchBinFile(path)
    assert not marker.exists()
    assert set(sys.modules) == before
    assert str(path) in str(error.value) and len(str(error.value)) < 500


def test_the_hand_made_archive_is_good_without_the_attack(tmp_path: Path) -> None:
    source = TorchBinFile(archive(tmp_path / "x.bin", state(tensor())))
    assert source.read("w").tolist() == [0, 0, 0, 0]
    source.close()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", calls("marker"))
def test_a_call_is_refused_and_not_made(tmp_path: Path, case: str, protocol: int) -> None:
    marker = tmp_path / "marker"
    value = {"w": calls(str(marker))[case]}
    refuse(archive(tmp_path / "x.bin", pickle.dumps(value, protocol)), marker)


@pytest.mark.parametrize("case", opcodes("marker"))
def test_an_opcode_attack_is_refused(tmp_path: Path, case: str) -> None:
    marker = tmp_path / "marker"
    refuse(archive(tmp_path / "x.bin", opcodes(str(marker))[case]), marker)


def test_the_calls_are_real(tmp_path: Path) -> None:
    """Python's own unpickler does make them: the cases above prove something."""
    made = 0
    for number, case in enumerate(("os.system", "eval", "exec", "Path.write_text")):
        marker = tmp_path / str(number)
        pickle.loads(pickle.dumps(calls(str(marker))[case], 2))
        made += marker.exists()
    assert made == 4


def test_a_huge_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.bin", bytes((16 << 20) + 1))
    with pytest.raises(ModelLoadError, match="over 16777216"):
        TorchBinFile(path)


def test_a_directory_bomb_is_refused(tmp_path: Path) -> None:
    """An end record that claims a directory of 40 MB in a sparse file."""
    path = tmp_path / "x.bin"
    size = 40_000_000
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0))
    with pytest.raises(ModelLoadError, match="damaged"):
        TorchBinFile(path)
