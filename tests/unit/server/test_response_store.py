"""Kept responses: whose they are, how many, how large, how old; and a file that survives."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import StorageFailed
from chatserve.server.response_store import KeptResponse, ResponseStore

ME, YOU = b"me", b"you"
TIMEOUT_S = 30


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def kept(number: int, text: str = "") -> KeptResponse:
    return KeptResponse({"id": f"resp_{number}", "text": text}, [{"id": f"msg_{number}"}])


def size_of(number: int, text: str = "") -> int:
    return len(f'{{"id":"resp_{number}","text":"{text}"}}[{{"id":"msg_{number}"}}]')


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "responses.db"


def numbers(store: ResponseStore, count: int = 10, owner: bytes = ME) -> list[int]:
    return [number for number in range(count) if store.find(owner, f"resp_{number}")]


def test_what_is_kept_is_found_by_its_owner_alone(path: Path) -> None:
    store = ResponseStore(path)
    assert store.find(ME, "resp_1") is None and not store.delete(ME, "resp_1")
    assert not path.exists(), "nothing was kept yet"
    store.add(ME, kept(1))
    assert store.find(ME, "resp_1") == kept(1)
    assert store.find(YOU, "resp_1") is None and not store.delete(YOU, "resp_1")
    store.add(YOU, kept(1, "yours"))
    assert store.find(ME, "resp_1") == kept(1), "an id of somebody else's is no matter"
    assert store.delete(ME, "resp_1") and store.find(ME, "resp_1") is None
    assert store.find(YOU, "resp_1") == kept(1, "yours")
    assert not store.delete(ME, "resp_1")


def test_another_server_finds_it(path: Path) -> None:
    ResponseStore(path).add(ME, kept(1))
    assert ResponseStore(path).find(ME, "resp_1") == kept(1)


def test_the_same_again_takes_its_place(path: Path) -> None:
    store = ResponseStore(path, max_responses=2)
    for text in ("a", "b", "c"):
        store.add(ME, kept(1, text))
    store.add(ME, kept(2))
    assert numbers(store) == [1, 2] and store.find(ME, "resp_1") == kept(1, "c")


@pytest.mark.parametrize(("count", "left"), [(3, [0, 1, 2]), (4, [1, 2, 3])])
def test_bounded_in_number(path: Path, count: int, left: list[int]) -> None:
    store = ResponseStore(path, max_responses=3)
    for number in range(count):
        store.add(ME, kept(number))
    assert numbers(store) == left


@pytest.mark.parametrize(("spare", "left"), [(0, [0, 1, 2]), (-1, [1, 2])])
def test_bounded_in_bytes(path: Path, spare: int, left: list[int]) -> None:
    store = ResponseStore(path, max_bytes=3 * size_of(0, "x" * 50) + spare)
    for number in range(3):
        store.add(ME, kept(number, "x" * 50))
    assert numbers(store) == left


def test_one_that_is_too_large_costs_no_other(path: Path) -> None:
    store = ResponseStore(path, max_bytes=size_of(0, "x" * 50))
    store.add(ME, kept(0, "x" * 50))
    with pytest.raises(StorageFailed, match=f"{size_of(0, 'x' * 51)} bytes"):
        store.add(ME, kept(1, "x" * 51))
    assert numbers(store) == [0]


@pytest.mark.parametrize(
    "bounds", [{"max_own_responses": 3}, {"max_own_bytes": 3 * size_of(0, "x" * 50)}]
)
def test_bounded_for_each_owner(path: Path, bounds: dict[str, int]) -> None:
    store = ResponseStore(path, **bounds)
    for number in range(5):
        store.add(ME, kept(number, "x" * 50))
        store.add(YOU, kept(number % 2, "x" * 50))
    assert numbers(store) == [2, 3, 4] and numbers(store, owner=YOU) == [0, 1]
    ResponseStore(path).add(ME, kept(5, "x" * 50))
    assert numbers(store) == [2, 3, 4, 5], "the file knows no bounds"


@pytest.mark.parametrize("bounds", [{"max_responses": 6}, {"max_bytes": 6 * size_of(0, "x" * 50)}])
def test_one_owner_pushes_out_nobody_else_s(path: Path, bounds: dict[str, int]) -> None:
    """Whoever has the most lets the oldest go, although those of others are older."""
    store = ResponseStore(path, **bounds)
    for owner in (YOU, b"others"):
        for number in range(2):
            store.add(owner, kept(number, "x" * 50))
    for number in range(10):
        store.add(ME, kept(number, "x" * 50))
    assert numbers(store) == [8, 9]
    assert numbers(store, owner=YOU) == numbers(store, owner=b"others") == [0, 1]
    # of equal shares one more is too much for whoever asks for it
    store.add(YOU, kept(2, "x" * 50))
    assert numbers(store, owner=YOU) == [1, 2] and numbers(store) == [8, 9]


def test_many_small_ones_count_as_well(path: Path) -> None:
    """By number and by bytes others may have the most."""
    store = ResponseStore(path, max_responses=5, max_bytes=10_000)
    store.add(YOU, kept(0, "x" * 5000))
    for number in range(8):
        store.add(ME, kept(number))
    assert numbers(store) == [4, 5, 6, 7] and numbers(store, owner=YOU) == [0]
    store.add(b"others", kept(0, "x" * 4900))
    assert numbers(store) == [4, 5, 6, 7], "by bytes they have little"
    assert numbers(store, owner=YOU) == [], "the largest goes"


def test_a_file_of_before(path: Path) -> None:
    """It has another index."""
    store = ResponseStore(path)
    store.add(ME, kept(0))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP INDEX sizes_by_owner")
        database.execute("CREATE INDEX sizes ON responses (place, stored_at, num_bytes)")
    store.add(ME, kept(1))
    assert numbers(store) == [0, 1]


def test_bounded_in_age(path: Path) -> None:
    clock = Clock()
    store = ResponseStore(path, max_age_s=100, clock=clock)
    store.add(ME, kept(0))
    clock.now += 100
    assert numbers(store) == [0]
    clock.now += 1
    assert numbers(store) == [], "too old to be found"
    store.add(ME, kept(1))
    clock.now -= 50
    assert numbers(store) == [1], "and gone with the next that came"


def test_private(path: Path) -> None:
    previous = os.umask(0)
    try:
        ResponseStore(path).add(ME, kept(1, "secret prompt"))
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_file_that_others_may_read_is_refused(path: Path) -> None:
    store = ResponseStore(path)
    store.add(ME, kept(1))
    path.chmod(0o644)
    with pytest.raises(StorageFailed, match="mode 644"):
        store.add(ME, kept(2))


def test_a_file_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(path)
    store.add(ME, kept(1))
    store.close()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StorageFailed, match="another user"):
        ResponseStore(path).add(ME, kept(2))


def test_a_folder_that_may_not_be_searched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exists(_path: Path) -> bool:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "exists", exists)
    for use in (ResponseStore(path).find, ResponseStore(path).delete):
        with pytest.raises(StorageFailed, match="not yours"):
            use(ME, "resp_1")


def test_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageFailed, match="store: false"):
        ResponseStore(path).add(ME, kept(1))
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "use", [lambda s: s.find(ME, "x"), lambda s: s.delete(ME, "x"), lambda s: s.add(ME, kept(1))]
)
def test_a_file_that_is_no_database(path: Path, use: Any, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.touch(0o600)
    path.write_bytes(b"no database at all, but long enough to look like one " * 100)
    with pytest.raises(StorageFailed, match=r"cannot be kept \(file is not a database\)") as caught:
        use(ResponseStore(path))
    assert str(path.parent) not in caught.value.message, "a client is told no path of ours"
    assert f"{path} cannot be used (file is not a database)" in caplog.text


def test_what_is_deleted_is_not_in_the_file(path: Path) -> None:
    store = ResponseStore(path)
    store.add(ME, kept(1, "a secret that nobody else has"))
    store.delete(ME, "resp_1")
    files = [file.read_bytes() for file in path.parent.iterdir()]
    assert not any(b"nobody else has" in content for content in files)


WRITER = """
import sys
from pathlib import Path
from chatserve.server.response_store import KeptResponse, ResponseStore
store = ResponseStore(Path(sys.argv[1]), max_responses=50)
number = 0
while True:
    store.add(b"me", KeptResponse({"id": f"resp_{number}"}, [{"text": "x" * 5000}]))
    print(number, flush=True)
    number += 1
"""


def test_killed_in_the_middle(path: Path) -> None:
    """What was said to be kept is there, and the file goes on."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if int(line) >= 60:
                break
        process.send_signal(signal.SIGKILL)
        told = [int(line), *map(int, process.stdout.read().split())]
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    store = ResponseStore(path, max_responses=50)
    for number in range(told[-1] - 40, told[-1] + 1):
        assert store.find(ME, f"resp_{number}") is not None
    store.add(ME, kept(0))
    assert store.find(ME, "resp_0") == kept(0)
