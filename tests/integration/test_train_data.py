"""`chatserve train data` as a command: killed anywhere it goes on to the same bytes; no process
stays behind; what it says to people and scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest

from chatserve.cli.commands import train, train_data
from chatserve.errors import UsageError
from chatserve.train.prepared_rows import count_rows
from tests.posts import dump, jsonl, many_posts, post, row

KILLS = 5


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "chatserve", "train", "data", *map(str, arguments)]


def ran(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def ended(program: subprocess.Popen[str]) -> None:
    program.kill()
    program.communicate()


def files(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = dump(tmp_path / "Posts.xml", [*many_posts(60), "<row", post(99)])
    result = subprocess.run(
        [sys.executable, "-m", "tests.killed_preparation", source, tmp_path, str(KILLS)],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    kills, ends = lines[::2], lines[1::2]
    assert len(kills) == len(ends) == KILLS - 1
    assert all(each["killed"] for each in kills)
    assert all(each["same"] for each in ends)
    # nothing that was kept turned out to be half
    assert not any("not whole" in word for each in ends for word in each["told"])


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many posts that several processes have a bucket each."""
    rows = [row(n, 9, 3, 1, question=f"<p>{'word ' * 6000}{n}</p>") for n in range(1200)]
    return jsonl(tmp_path_factory.mktemp("big") / "big.jsonl", rows)


def test_no_process_stays_behind_and_the_rest_is_done_by_another_run(
    big: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert ran(big, "--out", whole, "--workers", "1").returncode == 0
    program = subprocess.Popen(
        command(big, "--out", out, "--workers", "2"), stderr=subprocess.PIPE, text=True
    )
    request.addfinalizer(lambda: ended(program))
    assert program.stderr is not None
    while "comparing answers" not in program.stderr.readline():
        assert program.poll() is None
    watched = psutil.Process(program.pid)
    children: list[psutil.Process] = []
    while len(children) < 3:  # two workers, and Python's own helper of theirs
        assert program.poll() is None
        children = watched.children(recursive=True)
    program.send_signal(signal.SIGKILL)
    program.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive and len(gone) == 3
    again = ran(big, "--out", out, "--workers", "2")
    assert again.returncode == 0, again.stderr
    assert files(out) == files(whole)


def test_ctrl_c_ends_all_of_it_in_silence(
    big: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program = subprocess.Popen(
        command(big, "--out", tmp_path / "out", "--workers", "2"), stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    request.addfinalizer(lambda: ended(program))
    assert program.stderr is not None
    while "comparing answers" not in program.stderr.readline():
        assert program.poll() is None
    watched = psutil.Process(program.pid)
    children: list[psutil.Process] = []
    while len(children) < 3:
        assert program.poll() is None
        children = watched.children(recursive=True)
    os.killpg(program.pid, signal.SIGINT)
    said = program.stderr.read()
    assert program.wait() == 130
    assert "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_a_worker_that_dies_is_told(
    big: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    program = subprocess.Popen(
        command(big, "--out", out, "--workers", "2"), stderr=subprocess.PIPE, text=True
    )
    request.addfinalizer(lambda: ended(program))
    assert program.stderr is not None
    while "comparing answers" not in program.stderr.readline():
        assert program.poll() is None
    workers: list[psutil.Process] = []
    while not workers:
        assert program.poll() is None
        found = psutil.Process(program.pid).children()
        workers = [each for each in found if "multiprocessing.spawn" in " ".join(each.cmdline())]
    workers[0].kill()
    said = program.stderr.read()
    assert program.wait() == 1
    assert "ended with -9, maybe for want of memory; run the same command again" in said


def test_what_it_says(tmp_path: Path) -> None:
    rows = [row(n, 9, 3, 1) for n in range(60)]
    source, out = jsonl(tmp_path / "a.jsonl", [*rows, "{"]), tmp_path / "out"
    stopped = ran(source, "--out", out)
    assert stopped.returncode == 1 and not stopped.stdout
    *_, last = stopped.stderr.splitlines()
    assert last.startswith(
        "chatserve: 1 row of a.jsonl cannot be read: a.jsonl, line 61: malformed"
    )
    done = ran(source, "--out", out, "--skip-bad")
    assert done.returncode == 0 and done.stdout == f"{out}\n"
    assert "reading" not in done.stderr  # that was kept
    assert "left out: a.jsonl, line 61: malformed JSON" in done.stderr
    assert "license of the texts: CC BY-SA 4.0; attribution.jsonl says who wrote" in done.stderr
    rows_of = json.loads((out / "manifest.json").read_text())["rows"]
    assert f"rows: finetune {rows_of['finetune']}, reward {rows_of['reward']}" in done.stderr
    assert count_rows(out, "finetune") == rows_of["finetune"]  # as the next step reads them
    assert pyarrow.parquet.read_table(out / "rl").num_rows == rows_of["rl"]


def test_a_trap_in_the_xml_is_refused(tmp_path: Path) -> None:
    source = dump(tmp_path / "Posts.xml", ['<!DOCTYPE posts [<!ENTITY a "b">]>', post(1)])
    result = ran(source, "--out", tmp_path / "out", "--skip-bad")
    assert result.returncode == 1
    assert "Posts.xml, line 3: declares a document type" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "both are needed"),
        (["sample"], "both are needed"),
        (["sample", "--out", "x", "--shares", "1,2,3"], "must be four whole numbers"),
        (["sample", "--out", "x", "--shares", "1,2,3,0"], "must be four whole numbers"),
        (["sample", "--out", "x", "--shares", "1,2,3,x"], "must be four whole numbers"),
        (["sample", "--out", "x", "--pairs", "0"], "out of range"),
        (["sample", "--out", "x", "--site", "ai.stackexchange.com"], "must be an address"),
    ],
)
def test_wrong_flags_are_told(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        train_data.main(arguments)
    assert not [*tmp_path.iterdir()]


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = train.importlib.util.find_spec
    monkeypatch.setattr(
        train.importlib.util, "find_spec",
        lambda name: None if name == "markdownify" else find(name),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"needs markdownify.*pip install 'chatserve\[train\]'"):
        train.main(["data", "sample", "--out", str(tmp_path / "out")])
    assert not [*tmp_path.iterdir()]


def test_a_dump_without_a_site_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dump(tmp_path / "Posts.xml", many_posts(20))
    assert train_data.main([str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "attribution will lack addresses" in capsys.readouterr().err
