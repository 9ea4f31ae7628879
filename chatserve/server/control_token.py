"""The secret that controller and workers share: from the environment, else from a 0600 file."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from chatserve import environment
from chatserve.errors import UsageError

FILE_NAME = "control-token"


def own_token() -> str:
    """The controller's token; makes the file when there is none. Of controllers that start together
    one makes it, for all of them.

    Raises `UsageError` when the file can be read by others or cannot be used.
    """
    if token := environment.control_token():
        return token
    path = environment.home() / FILE_NAME
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _make(path)
    except OSError as error:
        raise UsageError(_unusable(path, error)) from error
    return _read(path)


def shared_token() -> str:
    """The token a worker shows to its controller. Raises `UsageError` when there is none."""
    if token := environment.control_token():
        return token
    path = environment.home() / FILE_NAME
    if not path.exists():
        raise UsageError(
            "the controller's token is not known here; copy it from the controller's "
            f"{FILE_NAME} file into CHATSERVE_CONTROL_TOKEN"
        )
    return _read(path)


def _make(path: Path) -> None:
    """A new token at `path`, whole when it can be seen there; or none where another one is."""
    # private from its first byte on
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(handle)
        # a link, unlike a renaming, takes no file's place
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def _read(path: Path) -> str:
    try:
        with path.open() as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise UsageError(f"{path} can be read by others; run chmod 600 on it")
            token = file.read(1000).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(_unusable(path, error)) from error
    if not token:
        raise UsageError(f"{path} is empty; delete it, and the controller makes a new one")
    return token


def _unusable(path: Path, error: Exception) -> str:
    return f"cannot use the control token file {path}: {error}; set CHATSERVE_CONTROL_TOKEN instead"
