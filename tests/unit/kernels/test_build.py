"""Compiling the kernels: what happens without a compiler, with a broken one, on other machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chatserve.kernels import build as kernels_build
from chatserve.kernels.build import BuildFailed, build, find_compiler

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="the stand-in compiler is a shell script"
)


def stand_in(folder: Path, script: str) -> Path:
    """A compiler that does what `script` says; `$out` is the file that it should write."""
    path = folder / "stand-in-c++"
    lines = ("#!/bin/sh", "for word; do out=$word; done", 'case "$*" in', script, "esac")
    path.write_text("\n".join(lines) + "\n", "utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A library that an earlier build has left."""
    folder = tmp_path / "lib"
    folder.mkdir()
    path = folder / "libchatserve_kernels.so"
    path.write_bytes(b"old")
    return path


def use(monkeypatch: pytest.MonkeyPatch, compiler: object) -> None:
    monkeypatch.setenv("CXX", str(compiler))


def test_the_library_is_linked_from_one_object_per_source_and_replaced(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'*-shared*) echo "$*" > {tmp_path}/link; echo new > "$out";; *) : > "$out";;'
    use(monkeypatch, stand_in(tmp_path, script))
    assert build(target, machine="aarch64", extra_flags=("-g0",)) == target
    assert target.read_bytes() == b"new\n"
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    link = (tmp_path / "link").read_text("utf-8").split()
    objects = {Path(word).stem for word in link if word.endswith(".o")}
    sources = {path.stem for path in kernels_build.SOURCES.glob("*.cpp")}
    levels = {"level_neon", "level_neon_i8mm"}
    assert objects == {name for name in sources if "level" not in name} | levels
    assert "-g0" in link


def test_a_library_is_built_into_a_folder_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, stand_in(tmp_path, '*) echo new > "$out";;'))
    assert build(tmp_path / "deep" / "er" / "k.so", machine="x86_64").read_bytes() == b"new\n"


@pytest.mark.parametrize(
    "script",
    [
        "*) echo no such processor >&2; exit 1;;",
        '*-shared*) echo half > "$out"; exit 1;; *) : > "$out";;',
        '*-shared*) echo half > "$out"; kill -9 $$;; *) : > "$out";;',
        '*level_neon.cpp*) exit 1;; *) : > "$out";;',
    ],
    ids=["at once", "while linking", "killed", "one source"],
)
def test_a_build_that_fails_leaves_the_old_library_and_nothing_else(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    use(monkeypatch, stand_in(tmp_path, script))
    with pytest.raises(BuildFailed, match=r"stand-in-c\+\+ .* failed:"):
        build(target, machine="aarch64")
    assert target.read_bytes() == b"old"
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_reason_is_what_the_compiler_says(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, stand_in(tmp_path, "*) echo no such processor >&2; exit 1;;"))
    with pytest.raises(BuildFailed, match="no such processor"):
        build(target, machine="aarch64")


def test_a_compiler_that_cannot_be_run_is_named(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, tmp_path / "missing-c++")
    with pytest.raises(BuildFailed, match=r"missing-c\+\+ cannot be run"):
        build(target)
    assert target.read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "c++")
    (tmp_path / "lib").write_bytes(b"")
    with pytest.raises(BuildFailed, match="lib cannot be written"):
        build(tmp_path / "lib" / "k.so", machine="x86_64")


def test_without_a_compiler_on_the_path_there_is_a_reason(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildFailed, match=r"no C\+\+ compiler"):
        build(target)


def test_an_unknown_processor_type_has_no_kernels(target: Path) -> None:
    with pytest.raises(BuildFailed, match="no kernels for riscv64 processors"):
        build(target, machine="riscv64")


def test_the_compiler_is_chosen_by_the_environment_words_and_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "ccache 'my compiler' -m64")
    assert find_compiler() == ["ccache", "my compiler", "-m64"]
    path = tmp_path / "g++"
    path.write_text("", "utf-8")
    path.chmod(0o755)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() == [str(path)]


def test_the_command_says_in_one_line_why_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "/nowhere/c++")
    assert kernels_build.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("no kernels: /nowhere/c++ cannot be run")
    assert captured.err.count("\n") == 1


def test_the_command_prints_where_the_library_is(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels_build, "build", lambda: target)
    assert kernels_build.main() == 0
    assert capsys.readouterr().out == f"{target}\n"
