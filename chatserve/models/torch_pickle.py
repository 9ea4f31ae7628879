"""A machine that understands just the pickles `torch.save` writes for a flat dict of tensors.

It is not Python's unpickler and never calls it: an opcode outside the table below, a global outside
the allow-list, or an argument of the wrong kind ends the reading. Nothing named by the file is ever
imported or called; the result is inert data. Knows no file and creates no tensor.
"""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from chatserve.errors import ModelLoadError

MAX_OPCODES = 2_000_000
MAX_DIMS = 8
MAX_TEXT_BYTES = 1024
MAX_INT_BYTES = 8

_STORAGE_DTYPES = {
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_RECORD_KEY = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Global:
    """A name on the allow-list. It stands on the stack for a callable and is none."""

    module: str
    name: str


ORDERED_DICT = Global("collections", "OrderedDict")
REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
ALLOWED = frozenset(
    {ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER}
    | {Global("torch", name) for name in _STORAGE_DTYPES}
)


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements in the archive's record `data/{key}`."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorView:
    """A tensor as a view of a storage; offset and strides in elements, inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements from the first to the last one of the view."""
        if not self.numel:
            return 0
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


def read_state_dict(data: bytes, source: str) -> dict[str, TensorView]:
    """The tensors of a pickled state dict in its order; `source` names the file in errors.

    Raises `ModelLoadError` for anything but a flat dict of tensors.
    """
    state = _Machine(data, source).run()
    if not isinstance(state, dict):
        raise ModelLoadError(f"{source}: holds a {_kind(state)}, not a dict of tensors")
    for name, value in state.items():
        if not isinstance(value, TensorView):
            raise ModelLoadError(
                f"{source}: entry {name!r} is a {_kind(value)}, not a tensor; "
                "save the model's state_dict alone, best as safetensors"
            )
    return dict(state)


class _Mark:
    """Where a tuple or a run of items begins on the stack."""


_MARK = _Mark()


class _Machine:
    def __init__(self, data: bytes, source: str) -> None:
        self._data = data
        self._source = source
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute up to STOP and return the value on the stack."""
        for _ in range(MAX_OPCODES):
            opcode = self._take(1)
            if opcode == b".":
                return self._pop()
            step = _STEPS.get(opcode)
            if step is None:
                self._refuse(f"pickle opcode 0x{opcode.hex()} is not one that weights need")
            step(self)
        self._refuse(f"the pickle has more than {MAX_OPCODES} opcodes")

    def _refuse(self, reason: str) -> NoReturn:
        raise ModelLoadError(
            f"{self._source}: refused, {reason}; use a safetensors version of the model"
        )

    # Reading arguments

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            self._refuse("the pickle ends early")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(value)

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position, self._position + MAX_TEXT_BYTES)
        if end < 0:
            self._refuse("a name in the pickle has no end")
        line = self._data[self._position : end]
        self._position = end + 1
        return self._decode(line)

    def _text(self, num_bytes: int) -> str:
        if num_bytes > MAX_TEXT_BYTES:
            self._refuse(f"a string of {num_bytes} bytes is over {MAX_TEXT_BYTES}")
        return self._decode(self._take(num_bytes))

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse("a string is not UTF-8")

    # The stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._refuse("the pickle's stack runs dry")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            if (item := self._stack.pop()) is _MARK:
                return items[::-1]
            items.append(item)
        self._refuse("the pickle's stack has no mark")

    def _frame(self) -> None:
        self._take(8)  # frames only help a reader of streams

    def _make_tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._push(tuple(reversed(items)))

    def _remember(self, index: int) -> None:
        value = self._pop()
        self._memo[index] = value
        self._push(value)

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            self._refuse("the pickle recalls a value it never stored")
        self._push(self._memo[index])

    # Opcodes with a body

    def _protocol(self) -> None:
        if not 2 <= (version := self._number("<B")) <= 5:
            self._refuse(f"pickle protocol {version} is not 2 to 5")

    def _long(self) -> None:
        if (num_bytes := self._number("<B")) > MAX_INT_BYTES:
            self._refuse(f"an integer of {num_bytes} bytes is over {MAX_INT_BYTES}")
        self._push(int.from_bytes(self._take(num_bytes), "little", signed=True))

    def _global(self) -> None:
        self._push_global(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._push_global(module, name)

    def _push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self._refuse("a global's name is not a string")
        if Global(module, name) not in ALLOWED:
            self._refuse(f"it names {f'{module}.{name}'!r}, which weights never need")
        self._push(Global(module, name))

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._pop()
        if not isinstance(target, dict):
            self._refuse(f"the pickle sets items of a {_kind(target)}")
        if len(pairs) % 2:
            self._refuse("a key in the pickle has no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                self._refuse(f"a dict key is a {_kind(key)}, not a string")
            if key in target:
                self._refuse(f"the name {key!r} occurs twice")
            target[key] = value
        self._push(target)

    def _append(self, items: list[Any]) -> None:
        target = self._pop()
        if not isinstance(target, list):
            self._refuse(f"the pickle appends to a {_kind(target)}")
        target.extend(items)
        self._push(target)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _build(self) -> None:
        """Attributes of a state dict (`_metadata`) are read past; nothing else may have any."""
        state, target = self._pop(), self._pop()
        if not isinstance(target, OrderedDict) or not isinstance(state, dict):
            self._refuse(f"the pickle sets attributes of a {_kind(target)}")
        self._push(target)

    def _persistent_id(self) -> None:
        match self._pop():
            case ("storage", Global("torch", kind), str(key), str(), int(numel)) if (
                kind in _STORAGE_DTYPES and _RECORD_KEY.fullmatch(key) and numel >= 0
            ):
                self._push(Storage(key, _STORAGE_DTYPES[kind], numel))
            case _:
                self._refuse("a reference to tensor data is malformed")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case Global("collections", "OrderedDict"), ():
                self._push(OrderedDict())
            case (
                Global("torch._utils", "_rebuild_tensor_v2"),
                (Storage() as storage, offset, shape, stride, bool(), OrderedDict() as hooks),
            ) if not hooks:
                self._push(self._view(storage, offset, shape, stride))
            case (
                Global("torch._utils", "_rebuild_parameter"),
                (TensorView() as view, bool(), OrderedDict() as hooks),
            ) if not hooks:
                self._push(view)
            case Global(), _:
                self._refuse(f"{function.name} is called with arguments it never gets")
            case _:
                self._refuse(f"the pickle calls a {_kind(function)}")

    def _view(self, storage: Storage, offset: Any, shape: Any, stride: Any) -> TensorView:
        if not (_are_counts((offset,)) and _are_counts(shape) and _are_counts(stride)):
            self._refuse("a tensor's shape, stride or offset is not made of counts")
        if len(shape) != len(stride):
            self._refuse("a tensor's shape and stride differ in length")
        view = TensorView(storage, offset, shape, stride)
        # Fewer elements than the shape asks for means a broadcast view: a bomb when copied.
        if max(offset + view.span, view.numel) > storage.numel:
            self._refuse(f"a tensor of shape {shape} leaves its storage of {storage.numel}")
        return view


def _are_counts(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_DIMS
        and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
    )


def _kind(value: Any) -> str:
    """The type of a value, never the value: a nested one can be too deep to print."""
    return {TensorView: "tensor", Global: "function", _Mark: "mark"}.get(
        type(value), type(value).__name__
    )


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine._protocol,
    b"\x95": _Machine._frame,
    b"c": _Machine._global,
    b"\x93": _Machine._stack_global,
    b"R": _Machine._reduce,
    b"b": _Machine._build,
    b"Q": _Machine._persistent_id,
    b"(": lambda machine: machine._push(_MARK),
    b"}": lambda machine: machine._push({}),
    b"]": lambda machine: machine._push([]),
    b")": lambda machine: machine._push(()),
    b"t": lambda machine: machine._push(tuple(machine._pop_to_mark())),
    b"\x85": lambda machine: machine._make_tuple(1),
    b"\x86": lambda machine: machine._make_tuple(2),
    b"\x87": lambda machine: machine._make_tuple(3),
    b"s": _Machine._set_item,
    b"u": lambda machine: machine._set_items(machine._pop_to_mark()),
    b"a": lambda machine: machine._append([machine._pop()]),
    b"e": lambda machine: machine._append(machine._pop_to_mark()),
    b"q": lambda machine: machine._remember(machine._number("<B")),
    b"r": lambda machine: machine._remember(machine._number("<I")),
    b"\x94": lambda machine: machine._remember(len(machine._memo)),
    b"h": lambda machine: machine._recall(machine._number("<B")),
    b"j": lambda machine: machine._recall(machine._number("<I")),
    b"N": lambda machine: machine._push(None),
    b"\x88": lambda machine: machine._push(True),
    b"\x89": lambda machine: machine._push(False),
    b"K": lambda machine: machine._push(machine._number("<B")),
    b"M": lambda machine: machine._push(machine._number("<H")),
    b"J": lambda machine: machine._push(machine._number("<i")),
    b"\x8a": _Machine._long,
    b"X": lambda machine: machine._push(machine._text(machine._number("<I"))),
    b"\x8c": lambda machine: machine._push(machine._text(machine._number("<B"))),
}
