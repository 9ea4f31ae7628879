"""What is installed is locked: exact versions with hashes, of everything that is asked for."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "requirements"
LOCKS = ("runtime.txt", "dev.txt", "tools.txt", "fuzz.txt")
# its build depends on the machine: the Makefile names the version
NOT_LOCKED = {"torch"}
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))


def entries(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a lock with its hashes."""
    text = (FOLDER / name).read_text("utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split("--hash=")
            yield Requirement(requirement), [each.strip() for each in hashes]


def installed_on(name: str, python: str, platform: str, machine: str) -> dict[str, Version]:
    environment = {
        "python_version": python, "python_full_version": f"{python}.7", "sys_platform": platform,
        "platform_machine": machine, "platform_python_implementation": "CPython",
        "implementation_name": "cpython", "platform_system": platform.capitalize(),
        "os_name": "posix", "extra": "",
    }  # fmt: skip
    found = {}
    for requirement, _ in entries(name):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def asked_for(*, dev: bool) -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    extras = project["project"]["optional-dependencies"]
    named = list(project["project"]["dependencies"])
    if dev:
        named += extras["dev"]
    named += project["build-system"]["requires"]
    found = []
    for requirement in map(Requirement, named):
        if requirement.name == project["project"]["name"]:
            found += [Requirement(each) for extra in requirement.extras for each in extras[extra]]
        elif requirement.name not in NOT_LOCKED:
            found.append(requirement)
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_has_an_exact_version_and_hashes(name: str) -> None:
    locked = list(entries(name))
    assert locked
    for requirement, hashes in locked:
        assert requirement.url is None
        assert [each.operator for each in requirement.specifier] == ["=="], str(requirement)
        assert hashes, f"{requirement} has no hash: make lock"
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_nowhere_to_fetch_from(name: str) -> None:
    text = (FOLDER / name).read_text("utf-8")
    assert "://" not in text
    assert all(line.startswith(" ") or "--" not in line for line in text.splitlines())


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
@pytest.mark.parametrize("dev", [False, True])
def test_the_locks_satisfy_the_project(python: str, platform: str, machine: str, dev: bool) -> None:
    locked = installed_on("dev.txt" if dev else "runtime.txt", python, platform, machine)
    for requirement in asked_for(dev=dev):
        marker = requirement.marker
        if marker and not _holds(marker, platform, machine):
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: make lock"
        assert version in requirement.specifier, f"{requirement} but {version} is locked: make lock"


def test_development_runs_what_users_run() -> None:
    for platform, machine in PLATFORMS:
        runtime = installed_on("runtime.txt", "3.11", platform, machine)
        dev = installed_on("dev.txt", "3.11", platform, machine)
        assert runtime.items() <= dev.items()


def test_pytorch_is_pinned_by_its_version() -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    assert re.search(r"^TORCH_PIP_ARGS \?= torch==\d+\.\d+\.\d+$", makefile, re.MULTILINE)


def _holds(marker: Marker, platform: str, machine: str) -> bool:
    return marker.evaluate({"sys_platform": platform, "platform_machine": machine})
