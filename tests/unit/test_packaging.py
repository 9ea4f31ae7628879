"""What is packed: the package and its sources, nothing that runs at an interpreter's start."""

from __future__ import annotations

import importlib.util
import os
import re
import tomllib
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
    assert "force-include" not in project
    # beside the package there is the manual page, and nothing else
    wheel = tomllib.loads(project)["tool"]["hatch"]["build"]["targets"]["wheel"]
    page = {"docs/reference/chatserve.1": "share/man/man1/chatserve.1"}
    assert wheel["shared-data"] == page and project.count("shared-data") == 1


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


def build_page(root: Path) -> None:
    """The build hook's, on another tree."""
    pytest.importorskip("hatchling", reason="of the locked tools: make install")
    spec = importlib.util.spec_from_file_location("hatch_build", REPOSITORY / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    hook.build_page(root)


def page_tree(root: Path, *, built_at: float | None) -> Path:
    """Sources of the page from the second 1,000, and what was built of them at another."""
    source = root / "web" / "src" / "main.ts"
    source.parent.mkdir(parents=True)
    source.touch()
    os.utime(source, (1000, 1000))
    page = root / "chatserve" / "web" / "static" / "index.html"
    if built_at is not None:
        page.parent.mkdir(parents=True)
        page.touch()
        os.utime(page, (built_at, built_at))
    return page


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    npm.chmod(0o755)


@pytest.mark.parametrize(
    ("built_at", "reason"), [(None, "was not built"), (999, "is older than its sources")]
)
def test_nothing_is_packed_without_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_at: float | None, reason: str
) -> None:
    page_tree(tmp_path, built_at=built_at)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=f"the web page {reason}, and there is no npm here"):
        build_page(tmp_path)


def test_a_page_that_is_new_enough_needs_no_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_tree(tmp_path, built_at=1000)
    # what others put there is no source
    (tmp_path / "web" / "node_modules").mkdir()
    (tmp_path / "web" / "node_modules" / "new.js").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    build_page(tmp_path)
    assert page.stat().st_mtime == 1000


def test_a_page_that_is_older_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_tree(tmp_path, built_at=None)
    fake_npm(tmp_path / "bin", f'echo "$*" >> calls; mkdir -p {page.parent}; : > {page}')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    build_page(tmp_path)
    assert page.exists()
    install, build = (tmp_path / "calls").read_text("utf-8").splitlines()
    assert install.startswith("--prefix web ci ") and "--ignore-scripts" in install
    assert build == "--prefix web run build"


def test_a_page_that_cannot_be_built_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_tree(tmp_path, built_at=999)
    fake_npm(tmp_path / "bin", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SystemExit, match="cannot be built: npm ci failed"):
        build_page(tmp_path)


def test_the_page_is_packed_as_it_was_built() -> None:
    """What git does not know goes along, in the wheel and for whoever builds one of the sdist."""
    if not (REPOSITORY / "chatserve" / "web" / "static" / "index.html").exists():
        pytest.skip("the page is not built: make page")
    for target in ("wheel", "sdist"):
        paths = {str(path) for path in packed(target)}
        assert {"chatserve/web/static/index.html", "chatserve/web/static/favicon.ico"} <= paths
        assert any(
            re.fullmatch(r"chatserve/web/static/assets/index-.+\.js\.gz", path) for path in paths
        )
        assert not any("node_modules" in path for path in paths)
        assert ("web/src/main.ts" in paths) == (target == "sdist")
