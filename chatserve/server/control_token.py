"""The secret that controller and workers share: from the environment, else from a 0600 file."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from chatserve import environment
from chatserve.errors import UsageError

FILE_NAME = "control-token"


def own_token() -> str:
    """The controller's token; makes the file when there is none.

    Raises `UsageError` when the file can be read by others or cannot be used.
    """
    if token := environment.control_token():
        return token
    path = environment.home() / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # exclusive, and private from its first byte on
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path)
    except OSError as error:
        raise UsageError(_unusable(path, error)) from error
    token = secrets.token_urlsafe(32)
    with os.fdopen(fd, "w") as file:
        file.write(token + "\n")
    return token


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
