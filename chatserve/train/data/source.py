"""A source on disk: which files, in which form, and reading them on from a place. Makes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chatserve.train.data.posts import read_posts
from chatserve.train.data.records import BadSource
from chatserve.train.data.rows import Row, num_rows_of, read_jsonl, read_parquet

SAMPLE = Path(__file__).parent / "sample" / "questions.jsonl"
_SUFFIXES = (".xml", ".jsonl", ".parquet")
_PACKED = (".7z", ".gz", ".zip", ".zst", ".bz2", ".xz")
_HOST = re.compile(r"(?:[a-z0-9-]+\.)+[a-z]{2,}")
_DUMP = "Posts.xml"


@dataclass(frozen=True)
class Place:
    """Where reading goes on: in which file, at which byte (in Parquet: row), after which line."""

    file: int = 0
    offset: int = 0
    number: int = 0


@dataclass(frozen=True)
class SourceFile:
    """`changed_ns`: when it was last written, in nanoseconds."""

    path: Path
    num_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Source:
    """Files of one form, in the order of their names; `site`: the address of a dump's site."""

    files: tuple[SourceFile, ...]
    site: str | None
    license: str

    @property
    def is_dump(self) -> bool:
        return self.files[0].path.suffix == ".xml"

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def rows(self, place: Place) -> Iterator[tuple[Place, int, Row]]:
        """Each row with the place after it and the bytes read so far. Raises `BadSource`."""
        done_bytes = sum(file.num_bytes for file in self.files[: place.file])
        for index in range(place.file, len(self.files)):
            file = self.files[index]
            bytes_per_unit = 1.0
            if file.path.suffix == ".parquet":
                bytes_per_unit = file.num_bytes / max(num_rows_of(file.path), 1)
            for row in self._read(file.path, place.offset, place.number):
                at = done_bytes + int(row.end * bytes_per_unit)
                yield Place(index, row.end, row.number), at, row
            done_bytes += file.num_bytes
            place = Place(index + 1)

    def _read(self, path: Path, offset: int, number: int) -> Iterator[Row]:
        if path.suffix == ".xml":
            return read_posts(path, self.site, self.license, offset, number)
        read = read_parquet if path.suffix == ".parquet" else read_jsonl
        return read(path, self.license, offset, number)


def open_source(path: Path, site: str | None, license: str) -> Source:
    """What is at `path`: one file, or a folder with files of one form.

    `site` is guessed from the folder of a dump (`ai.stackexchange.com/Posts.xml`). Raises
    `BadSource`.
    """
    paths = _files(path)
    if site is None and paths[0].suffix == ".xml":
        folder = paths[0].resolve().parent.name
        site = f"https://{folder}" if _HOST.fullmatch(folder) else None
    files = []
    for each in paths:
        found = each.stat()
        files.append(SourceFile(each, found.st_size, found.st_mtime_ns))
    return Source(tuple(files), site.rstrip("/") if site else None, license)


def _files(path: Path) -> list[Path]:
    if path.suffix in _PACKED:
        raise BadSource(f"{path} is packed; unpack it first, and name {_DUMP}")
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise BadSource(f"{path} is none of {_DUMP}, *.jsonl and *.parquet")
        return [path]
    if not path.is_dir():
        raise BadSource(f"{path}: there is no such file or folder")
    if (path / _DUMP).is_file():
        return [path / _DUMP]
    found = {suffix: sorted(path.rglob(f"*{suffix}")) for suffix in _SUFFIXES[1:]}
    kinds = [paths for paths in found.values() if paths]
    if len(kinds) != 1:
        what = "both *.jsonl and *.parquet: name one file" if kinds else "no file of"
        raise BadSource(f"{path} has {what}" + ("" if kinds else
                        f" {_DUMP}, *.jsonl and *.parquet"))  # fmt: skip
    return kinds[0]
