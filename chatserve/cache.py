"""The folder where downloaded models lie: free space, atomic publishing, small records.

Knows no network and no file format. What is half done never carries its final name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatserve import environment
from chatserve.errors import HubError

_ELSEWHERE = "free some space or set CHATSERVE_HOME to a folder on another disk"


def models_folder() -> Path:
    """Where downloaded models lie; it may not exist yet."""
    return environment.home() / "models"


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make `folder`, and turn a full or read-only disk into a `HubError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise HubError(f"cannot write to {folder} ({reason}); {_ELSEWHERE}") from error


def require_free(folder: Path, num_bytes: int) -> None:
    """Raise `HubError` when the disk of `folder` has less room than `num_bytes`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise HubError(
            f"{folder} needs {num_bytes / 1e6:,.0f} MB, its disk has {free / 1e6:,.0f} MB free; "
            f"{_ELSEWHERE}"
        )


def publish(part: Path, target: Path) -> None:
    """Give the finished file or folder `part` its final name; afterwards it survives a crash."""
    for path in [part] if part.is_file() else part.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(part, target)
    if os.name == "posix":
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the JSON file `path` atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(record, indent=1), "utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an absent or unreadable record is an empty one."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
