"""Loading the compiled kernels: missing, damaged, of another version, for another processor."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from chatserve.errors import UsageError
from chatserve.kernels import library
from chatserve.kernels.build import BuildFailed, find_compiler
from chatserve.kernels.library import KernelsUnavailable, choose_level, load_kernels, open_library

Compile = Callable[[str], Path]


@pytest.fixture
def compiled(tmp_path: Path) -> Compile:
    """Turns C into a shared library of the kernels' name."""
    try:
        compiler = find_compiler()
    except BuildFailed as error:
        pytest.skip(str(error))

    def build(text: str) -> Path:
        source, target = tmp_path / "source.c", tmp_path / "libchatserve_kernels.so"
        source.write_text(text, "utf-8")
        subprocess.run([*compiler, "-x", "c", "-shared", "-fPIC", "-o", target, source], check=True)
        return target

    return build


def test_a_missing_library_says_how_to_get_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.so", tmp_path):  # a folder is none either
        with pytest.raises(KernelsUnavailable, match=r"python -m chatserve\.kernels\.build"):
            open_library(path)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_a_file_that_is_no_library_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "k.so"
    path.write_bytes(content)
    with pytest.raises(KernelsUnavailable, match=r"k\.so cannot be loaded"):
        open_library(path)


def test_a_library_of_something_else_is_not_used(compiled: Compile) -> None:
    with pytest.raises(KernelsUnavailable, match=r"cannot be loaded: .*cs_version"):
        open_library(compiled("int other(void) { return 1; }"))


def test_a_library_of_another_version_says_both_and_what_to_do(compiled: Compile) -> None:
    other = library.VERSION + 1
    message = rf"has version {other}, this chatserve wants {library.VERSION}; compile it again"
    with pytest.raises(KernelsUnavailable, match=message):
        open_library(compiled(f"int cs_version(void) {{ return {other}; }}"))


def test_a_library_without_all_functions_is_not_used(compiled: Compile) -> None:
    with pytest.raises(KernelsUnavailable, match=r"is not whole: .*cs_levels"):
        open_library(compiled(f"int cs_version(void) {{ return {library.VERSION}; }}"))


def test_the_best_level_is_used_unless_another_is_wanted() -> None:
    assert choose_level(("avx512vnni", "avx2"), None) == "avx512vnni"
    assert choose_level(("avx512vnni", "avx2"), "avx2") == "avx2"


@pytest.mark.parametrize("wanted", [None, "avx2"])
def test_a_processor_without_any_level_has_no_kernels(wanted: str | None) -> None:
    with pytest.raises(KernelsUnavailable, match="too old"):
        choose_level((), wanted)


def test_a_level_that_this_processor_lacks_is_a_usage_error() -> None:
    message = "CHATSERVE_KERNELS=neon: this processor has avx512vnni, avx2; `off` uses PyTorch"
    with pytest.raises(UsageError, match=message):
        choose_level(("avx512vnni", "avx2"), "neon")


def test_the_environment_turns_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_KERNELS", "off")
    with pytest.raises(KernelsUnavailable, match="CHATSERVE_KERNELS=off"):
        load_kernels()


def test_the_environment_chooses_the_level(
    kernels: library.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATSERVE_KERNELS", kernels.level)
    assert load_kernels() == kernels
    monkeypatch.setenv("CHATSERVE_KERNELS", "mmx")
    with pytest.raises(UsageError, match="CHATSERVE_KERNELS=mmx"):
        load_kernels()


def test_without_a_wish_the_best_level_of_the_library_is_used(
    kernels: library.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHATSERVE_KERNELS", raising=False)
    assert load_kernels().level == library.levels_of(kernels.functions)[0]


def test_a_library_that_is_missing_says_so_when_kernels_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHATSERVE_KERNELS", raising=False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(KernelsUnavailable, match="not compiled"):
        load_kernels()
