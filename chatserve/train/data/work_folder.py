"""What is on disk while data are prepared, and the manifest that says that they are whole.

    OUT/.work/state.json        settings, source, and how far reading has come
    OUT/.work/buckets/00000     records by question
    OUT/.work/tables/SPLIT/…    shards of the tables, which nobody is to read yet
    OUT/.work/attribution/…     who wrote what is in a shard
    OUT/.work/done/00000        a finished shard's counts
    OUT/manifest.json           written last; then .work goes

Knows no format of a source.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from chatserve.errors import CannotWrite, UsageError
from chatserve.train.data.tables import written_aside

if sys.platform != "win32":
    import fcntl

ATTRIBUTION = "attribution.jsonl"
MANIFEST = "manifest.json"
WORK = ".work"


@dataclass
class ReadingState:
    """How far the source is read. `place`: (file, offset, number); `lengths`: of the buckets.

    `digest`: the sum of all records' hashes modulo 2**256, as hexadecimal digits.
    """

    settings: dict[str, Any]
    source: list[dict[str, Any]]
    lengths: list[int]
    place: tuple[int, int, int] = (0, 0, 0)
    is_read: bool = False
    num_records: int = 0
    num_bad: int = 0
    bad: list[str] = field(default_factory=list)
    digest: str = "0"


class WorkFolder:
    """The folder of one preparation. Writing raises `OSError`, see `disk_faults`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / WORK
        self.buckets = self.path / "buckets"
        self.tables = self.path / "tables"
        self.attribution = self.path / "attribution"
        self.done = self.path / "done"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from preparing into the same folder. Raises `UsageError`."""
        with disk_faults(self.out):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("ab")
        with lock:
            if sys.platform != "win32":
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UsageError(
                        f"another process prepares data in {self.out}; wait for it, or name "
                        "another folder with --out"
                    ) from None
            yield

    def manifest(self) -> dict[str, Any] | None:
        """Of data that are whole; None where they are not. Raises `UsageError` for other files."""
        path = self.out / MANIFEST
        if path.is_file():
            try:
                table = json.loads(path.read_text("utf-8"))
                assert isinstance(table, dict)
                return table
            except (AssertionError, ValueError):
                raise UsageError(
                    f"{path} is no manifest of prepared data; name another folder with --out"
                ) from None
        is_foreign = self.out.exists() and not (
            self.out.is_dir() and (self.path.is_dir() or not any(self.out.iterdir()))
        )
        if is_foreign:
            raise UsageError(f"{self.out} is there and not empty; name another folder with --out")
        return None

    def load(self) -> ReadingState | None:
        """The state of an unfinished preparation; None where there is none, or it is damaged."""
        try:
            return ReadingState(**orjson.loads((self.path / "state.json").read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, state: ReadingState) -> None:
        with written_aside(self.path / "state.json") as file:
            file.write(orjson.dumps(vars(state)))
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Forget an unfinished preparation, but for the lock."""
        (self.path / "state.json").unlink(missing_ok=True)
        for folder in (self.buckets, self.tables, self.attribution, self.done):
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self, manifest: Mapping[str, Any], num_shards: int) -> None:
        """Put everything in its place, the manifest last."""
        with written_aside(self.out / ATTRIBUTION) as file:
            for shard in range(num_shards):
                with (self.attribution / f"{shard:05}").open("rb") as part:
                    shutil.copyfileobj(part, file)
        for folder in sorted(self.tables.iterdir()):
            # of a preparation that ended here, and was then begun anew
            shutil.rmtree(self.out / folder.name, ignore_errors=True)
            os.replace(folder, self.out / folder.name)
        with written_aside(self.out / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def disk_faults(out: Path) -> Iterator[None]:
    """Whatever the disk refuses inside becomes `CannotWrite`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"cannot write to {out} ({error.strerror or error}){_room(out)}; what is done is kept: "
            "make room and run the same command again, it goes on from there"
        ) from error


def _room(out: Path) -> str:
    with contextlib.suppress(OSError):
        return f", where {shutil.disk_usage(out).free / 1e6:,.0f} MB are free"
    return ""
