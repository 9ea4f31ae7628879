"""Reader of one `pytorch_model*.bin` file: torch's zip archive of a pickled dict and raw storages.

The pickle goes through `torch_pickle`, which executes nothing; storages are read at their place in
the archive, one tensor at a time. Knows nothing of shards, indexes or model families.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chatserve.errors import ModelLoadError
from chatserve.models.torch_pickle import TensorView, read_state_dict
from chatserve.models.weight_file import WeightFile
from chatserve.models.weights import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 16 << 20
MAX_DIRECTORY_BYTES = 16 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class _Record(NamedTuple):
    """A stored member of the archive: its bytes in the file."""

    offset: int
    num_bytes: int


class TorchBinFile:
    """The tensors of one file; a `WeightSource`."""

    def __init__(self, path: Path) -> None:
        """Raises `ModelLoadError` for anything but a plain archive of a flat dict of tensors."""
        self._file = WeightFile(path)
        try:
            members = self._list_members()
            prefix = self._archive_name(members)
            self._check_byte_order(members.get(f"{prefix}/byteorder"))
            pickled = self._record(members[f"{prefix}/data.pkl"])
            if pickled.num_bytes > MAX_PICKLE_BYTES:
                raise self._bad(
                    f"its pickle has {pickled.num_bytes} bytes, over {MAX_PICKLE_BYTES}"
                )
            views = read_state_dict(self._file.read(*pickled), str(path))
            storages = self._storages(views, members, prefix)
        except ModelLoadError:
            self.close()
            raise
        self._views = {
            name: (view, storages[view.storage.key].offset + view.offset * ITEM_BYTES[view.dtype])
            for name, view in views.items()
        }
        in_disk_order = sorted(self._views.items(), key=lambda item: item[1][1])
        self._tensors = {name: _info(name, view) for name, (view, _) in in_disk_order}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        view, offset = self._views[name]
        if view.is_contiguous:
            return self._file.read_tensor(offset, view.shape, view.dtype, rows)
        if rows is not None:
            offset += rows.start * view.stride[0] * ITEM_BYTES[view.dtype]
            view = replace(view, shape=(len(rows), *view.shape[1:]))
        span = self._file.read_tensor(offset, (view.span,), view.dtype)
        return span.as_strided(view.shape, view.stride).contiguous()

    def read_into(self, name: str, rows: range, out: torch.Tensor) -> None:
        view, offset = self._views[name]
        if not view.is_contiguous:
            out.copy_(self.read(name, rows))
            return
        row_bytes = self._tensors[name].num_bytes // view.shape[0]
        self._file.read_into(offset + rows.start * row_bytes, out)

    def close(self) -> None:
        self._file.close()

    def _bad(self, reason: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self._file.path}: {reason}; use a safetensors version of the model"
        )

    def _list_members(self) -> dict[str, zipfile.ZipInfo]:
        if self._file.read(0, min(4, self._file.size)) != b"PK\x03\x04":
            raise self._bad(
                "not the zip archive that torch >= 1.6 writes, so either damaged or in torch's "
                "older format, which chatserve does not read"
            )
        try:
            with zipfile.ZipFile(_Window(self._file)) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
            raise self._bad(f"truncated or damaged archive ({error})") from error
        by_name = {member.filename: member for member in members}
        if len(by_name) != len(members):
            raise self._bad("a name occurs twice in the archive")
        return by_name

    def _archive_name(self, members: Mapping[str, zipfile.ZipInfo]) -> str:
        prefixes = [name[: -len("/data.pkl")] for name in members if name.endswith("/data.pkl")]
        if len(prefixes) != 1:
            raise self._bad(f"has {len(prefixes)} data.pkl records instead of one")
        return prefixes[0]

    def _check_byte_order(self, member: zipfile.ZipInfo | None) -> None:
        if member is None:  # before torch 2.1 the archive does not say
            return
        record = self._record(member)
        if record.num_bytes != 6 or self._file.read(*record) != b"little":
            raise self._bad("its numbers are not little-endian")

    def _record(self, member: zipfile.ZipInfo) -> _Record:
        """Where the member's bytes lie; compressed or encrypted ones are refused."""
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.compress_size != member.file_size
            or member.flag_bits & 1
        ):
            raise self._bad(f"record {member.filename!r} is compressed or encrypted")
        header = self._file.read(member.header_offset, _LOCAL_HEADER.size)
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise self._bad(f"record {member.filename!r} has no header")
        offset = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if offset + member.file_size > self._file.size:
            raise self._bad(f"truncated: record {member.filename!r} ends after the file")
        return _Record(offset, member.file_size)

    def _storages(
        self,
        views: Mapping[str, TensorView],
        members: Mapping[str, zipfile.ZipInfo],
        prefix: str,
    ) -> dict[str, _Record]:
        """The records of all storages, each exactly as long as the pickle says."""
        records: dict[str, _Record] = {}
        for name, view in views.items():
            storage = view.storage
            member = members.get(f"{prefix}/data/{storage.key}")
            if member is None:
                raise self._bad(f"the data of {name!r} is missing")
            record = records.setdefault(storage.key, self._record(member))
            if record.num_bytes != storage.numel * ITEM_BYTES[storage.dtype]:
                raise self._bad(
                    f"the data of {name!r} has {record.num_bytes} bytes instead of "
                    f"{storage.numel * ITEM_BYTES[storage.dtype]}"
                )
        return records


class _Window(io.RawIOBase):
    """The file as `zipfile` reads it, without reads so large that they were never a directory."""

    def __init__(self, file: WeightFile) -> None:
        self._file = file
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise ValueError("a record begins before the file")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._file.size - self._position, 0)
        count = left if size < 0 else min(size, left)
        if count > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {count} bytes is over {MAX_DIRECTORY_BYTES}")
        taken = self._file.read(self._position, count) if count else b""
        self._position += count
        return taken


def _info(name: str, view: TensorView) -> TensorInfo:
    return TensorInfo(name, view.shape, view.dtype, view.numel * ITEM_BYTES[view.dtype])
