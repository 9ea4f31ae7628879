"""Versions, kernels and compiler, each missing in turn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from chatserve.doctor import software
from chatserve.doctor.finding import Finding
from chatserve.doctor.software import (
    check_compiler,
    check_kernels,
    check_software,
    check_versions,
)
from chatserve.kernels import library


def test_versions_are_told() -> None:
    found = check_versions()
    assert found.status == "ok"
    assert f"torch {torch.__version__}" in found.text and "transformers 5" in found.text
    assert found.facts["torch"] == torch.__version__ and found.facts["python"]


def test_an_old_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1+cpu", "safetensors": None}
    real = software._version
    monkeypatch.setattr(software, "_version", lambda name: versions.get(name, real(name)))
    found = check_versions()
    assert found.status == "fail"
    assert found.way_out == "install safetensors>=0.6, torch>=2.10"
    assert "safetensors missing" in found.text


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = check_versions()
    assert found.status == "fail" and "torch (it cannot be imported: " in (found.way_out or "")


def kernels_with(monkeypatch: pytest.MonkeyPatch, level: str) -> Finding:
    monkeypatch.setenv("CHATSERVE_KERNELS", level)
    return check_kernels()


def test_the_level_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATSERVE_KERNELS", raising=False)
    levels = library.levels_of(library.load_kernels().functions)
    found = check_kernels()
    assert found.status == "ok" and found.facts == {"level": levels[0], "levels": levels}
    worst = kernels_with(monkeypatch, levels[-1])
    assert worst.text.startswith(f"own CPU kernels for {levels[-1]}")


def test_kernels_that_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_with(monkeypatch, "off")
    assert (found.status, found.text) == ("warn", "none: CHATSERVE_KERNELS=off")
    assert found.way_out == "8 bits are several times slower; unset CHATSERVE_KERNELS"


def test_a_level_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels_with(monkeypatch, "sse1")
    assert found.status == "fail" and "CHATSERVE_KERNELS=sse1" in found.text


def test_kernels_that_were_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATSERVE_KERNELS", raising=False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    _, kernels, compiler = check_software()
    assert kernels.status == "warn" and "not compiled" in kernels.text
    assert "`python -m chatserve.kernels.build` compiles them" in (kernels.way_out or "")
    assert compiler.status == "warn" and compiler.way_out is not None
    assert "there is no C++ compiler" in compiler.text


def test_no_compiler_is_fine_when_the_kernels_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = check_compiler(is_needed=False)
    assert (found.status, found.way_out) == ("ok", None)


def test_the_compiler_says_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho My compiler 1.2\necho more\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} -O1")
    found = check_compiler(is_needed=True)
    assert (found.status, found.text) == ("ok", f"{script} -O1: My compiler 1.2")
    script.write_text("#!/bin/sh\n")
    assert check_compiler(is_needed=True).text.endswith("it does not say which")


@pytest.mark.parametrize("command", ["false", "/no/such/compiler"])
def test_a_compiler_that_does_not_work(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    found = check_compiler(is_needed=True)
    assert found.status == "warn" and f"{command} does not work" in found.text
    assert check_compiler(is_needed=False).status == "ok"
