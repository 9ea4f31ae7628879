"""What is packed: the package and its sources, nothing that runs at an interpreter's start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = {"chatserve", "web", "tests", "benchmarks", "docs", "requirements"}
FILES = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile",
         "hatch_build.py", "pyproject.toml", ".gitignore", "PKG-INFO"}  # fmt: skip
STARTS_BY_ITSELF = re.compile(r"(.*\.(pth|egg-link|start)|sitecustomize\.py|usercustomize\.py)")


def packed(target: str, root: Path = REPOSITORY) -> Iterator[PurePosixPath]:
    """The paths that hatchling puts into a wheel or an sdist; nothing is compiled or written."""
    pytest.importorskip("hatchling", reason="of the locked tools: make install")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    builder = {"wheel": WheelBuilder, "sdist": SdistBuilder}[target](str(root))
    for file in builder.recurse_included_files():
        yield PurePosixPath(Path(file.distribution_path).as_posix())


def wrong(paths: Iterator[PurePosixPath], rooms: set[str], files: set[str]) -> list[str]:
    return [
        str(path)
        for path in paths
        if (path.parts[0] not in rooms and str(path) not in files)
        or STARTS_BY_ITSELF.fullmatch(path.name)
        or path.suffix in {".pyc", ".env", ".pem", ".key", ".safetensors", ".gguf", ".bin"}
    ]


def test_a_wheel_holds_the_package_alone() -> None:
    paths = list(packed("wheel"))
    assert PurePosixPath("chatserve/py.typed") in paths and len(paths) > 100
    assert wrong(iter(paths), {"chatserve"}, set()) == []


def test_an_sdist_holds_the_sources_alone() -> None:
    paths = list(packed("sdist"))
    # what its Makefile and README need
    assert {PurePosixPath(name) for name in ("LICENSE", "requirements/runtime.txt")} <= set(paths)
    assert wrong(iter(paths), SOURCES, FILES) == []


def test_what_does_not_belong_is_found(tmp_path: Path) -> None:
    """Teeth: the same of a tree in which such files lie."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    package = tmp_path / "chatserve"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0"\n', "utf-8")
    for name in ("x.pth", "sitecustomize.py", "key.pem"):
        (package / name).write_text("", "utf-8")
    found = wrong(packed("wheel", tmp_path), {"chatserve"}, set())
    assert sorted(found) == ["chatserve/key.pem", "chatserve/sitecustomize.py", "chatserve/x.pth"]


def test_the_build_hook_adds_the_kernels_alone() -> None:
    hook = (REPOSITORY / "hatch_build.py").read_text("utf-8")
    assert hook.count('build_data["') == 3 and "force_include" not in hook
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert "force-include" not in project and "shared-data" not in project


def test_what_ci_installs_is_locked() -> None:
    """CI installs with `make` alone, which asks for hashes; its scripts fetch nothing else."""
    script = (REPOSITORY / ".ci" / "run").read_text("utf-8")
    commands = re.findall(r"^make (.+)$", script, re.MULTILINE)
    assert commands == ["check", "test"]
    assert not re.search(r"\b(pip|uv|curl|wget|npx|npm (?!nodejs|qemu)\w+) ", script)
    makefile = (REPOSITORY / "Makefile").read_text("utf-8").replace("\\\n", " ")
    installs = re.findall(r"^LOCKED.*|.*(?:pip|\$\(PIP\)).* install .*", makefile, re.MULTILINE)
    assert len(installs) == 4
    for line in installs:
        is_ours_or_pytorch = "--editable ." in line or "$(TORCH_PIP_ARGS)" in line
        assert is_ours_or_pytorch or "--require-hashes" in line, line
    # Node's packages are of the locks' hashes, and run nothing when they are installed
    assert re.findall(r"npm --prefix \S+ (\S+)", makefile).count("$(NPM_CI)") == 2
    assert re.search(r"^NPM_CI := ci .*--ignore-scripts", makefile, re.MULTILINE)
    assert not re.search(r"npm( --prefix \S+)? (i|install|add|update|exec) ", makefile)
