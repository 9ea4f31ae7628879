"""Where supervised workers listen: a folder of this user's alone, which nobody finds left."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatserve.server import socket_folder as module
from chatserve.server.socket_folder import LOCK, PREFIX, socket_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no sockets with files there")


@pytest.fixture(autouse=True)
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a short name, as a session's own folder has."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def test_nobody_else_may_enter_and_nothing_is_left(parent: Path) -> None:
    with socket_folder() as folder:
        assert folder is not None and folder.parent == parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "0.sock").touch()
    assert list(parent.iterdir()) == []


def test_what_a_killed_server_left_is_removed_and_a_living_one_s_is_not(parent: Path) -> None:
    killed, young, other = (parent / name for name in (f"{PREFIX}a", f"{PREFIX}b", "else"))
    for folder in (killed, young, other):
        folder.mkdir()
    (killed / LOCK).touch()
    (killed / "0.sock").touch()
    (other / LOCK).touch()
    with socket_folder() as living, socket_folder() as second:
        assert living is not None and second is not None
        # one without a lock may be about to get it
        assert set(parent.iterdir()) == {young, other, living, second}


def test_a_living_one_s_is_removed_without_the_lock(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    with socket_folder() as living, socket_folder():
        assert living is not None and not living.exists()


def test_names_that_are_too_long_for_sockets(
    parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    deep = parent / ("x" * 80)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with socket_folder() as folder:
        assert folder is None
    assert "too long" in caplog.text and list(deep.iterdir()) == []


def test_a_folder_that_cannot_be_made(
    parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**options: object) -> str:
        raise PermissionError(13, "Permission denied", str(parent))

    caplog.set_level("INFO")
    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with socket_folder() as folder:
        assert folder is None
    assert "workers listen on loopback" in caplog.text


def test_a_runtime_folder_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fspath(Path("no") / "such" / "folder"))
    with socket_folder() as folder:
        assert folder is not None and folder.parent == Path(tempfile.gettempdir())


def test_systems_without_such_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.socket, "AF_UNIX")
    with socket_folder() as folder:
        assert folder is None
