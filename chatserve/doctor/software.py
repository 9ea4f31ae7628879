"""Python packages, the C++ compiler and the compiled kernels. Imports torch, no model."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata

import chatserve
from chatserve.doctor.finding import Finding, Status, refused
from chatserve.errors import UsageError
from chatserve.kernels import build

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate")
_BUILD = "`python -m chatserve.kernels.build` compiles them"
_COMPILER_S = 10.0


def check_software() -> list[Finding]:
    """Versions, the kernels and what could compile them."""
    kernels = check_kernels()
    return [check_versions(), kernels, check_compiler(is_needed=kernels.status != "ok")]


def check_versions() -> Finding:
    """Of the packages that compute, against what chatserve was written for."""
    versions = {name: _version(name) for name in PACKAGES}
    facts = {"chatserve": chatserve.__version__, "python": platform.python_version(), **versions}
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in facts.items())
    wrong = list(_unmet(metadata.requires("chatserve") or ()))
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:  # a library that it wants is not there
        wrong.append(f"torch (it cannot be imported: {error})")
    if not wrong:
        return Finding("software", "ok", text, facts=facts)
    way_out = f"install {', '.join(wrong)}"
    return Finding("software", "fail", text, way_out, facts)


def check_kernels() -> Finding:
    """The instruction set level of the CPU kernels that will be used, or why none."""
    from chatserve.kernels.library import KernelsUnavailable, levels_of, load_kernels

    try:
        kernels = load_kernels()
    except UsageError as error:
        return refused("kernels", "fail", error)
    except KernelsUnavailable as error:
        way_out = "unset CHATSERVE_KERNELS" if "CHATSERVE_KERNELS" in str(error) else _BUILD
        return Finding(
            "kernels", "warn", f"none: {error}", f"8 bits are several times slower; {way_out}",
            {"level": None},
        )  # fmt: skip
    levels = levels_of(kernels.functions)
    others = [level for level in levels if level != kernels.level]
    text = f"own CPU kernels for {kernels.level}" + (f" (also {', '.join(others)})" * bool(others))
    return Finding("kernels", "ok", text, facts={"level": kernels.level, "levels": levels})


def check_compiler(*, is_needed: bool) -> Finding:
    """The C++ compiler that would build the kernels; without it they are whatever they are."""
    status: Status = "warn" if is_needed else "ok"
    try:
        command = build.find_compiler()
    except build.BuildFailed as error:
        way_out = "install g++ or clang, or name one in CXX" if is_needed else None
        return Finding("compiler", status, f"none: {error}", way_out, {"command": None})
    facts = {"command": command}
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=True,
            timeout=_COMPILER_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        way_out = "install g++ or clang, or name one that works in CXX"
        return Finding("compiler", status, f"{command[0]} does not work: {error}", way_out, facts)
    first = (done.stdout.splitlines() or ["it does not say which"])[0]
    return Finding("compiler", "ok", f"{' '.join(command)}: {first}", facts=facts)


def _unmet(requirements: Sequence[str]) -> Iterator[str]:
    """Those of `PACKAGES` that are missing or older than is asked for."""
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.name not in PACKAGES or requirement.marker is not None:
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name}{requirement.specifier}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
