"""Build hook: the web page and the CPU kernels, made before they are packed.

The page is built by Node where it is missing or older than its sources; nothing is packed without
it. For `pip install -e` only the kernels are compiled, into the tree: Node is never needed to chat.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class BuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Without a compiler the wheel is pure Python, and slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if version != "editable":
            build_page(root)
        if self.target_name == "wheel":
            self._add_kernels(root, build_data)

    def _add_kernels(self, root: Path, build_data: dict[str, Any]) -> None:
        path = root / "chatserve" / "kernels" / "build.py"
        spec = importlib.util.spec_from_file_location("kernels_build", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            library = module.build()
        except module.BuildFailed as error:
            print(f"chatserve is installed without its CPU kernels: {error}", file=sys.stderr)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"
        build_data["artifacts"].append(library.relative_to(root).as_posix())


def build_page(root: Path) -> None:
    """Raises `SystemExit` with a sentence when there is no page to pack."""
    page = root / "chatserve" / "web" / "static" / "index.html"
    if page.exists() and page.stat().st_mtime >= newest(root / "web"):
        return
    npm = shutil.which("npm")
    if npm is None:
        state = "is older than its sources" if page.exists() else "was not built"
        raise SystemExit(
            f"the web page {state}, and there is no npm here; install Node, then again"
        )
    for arguments in (["ci", "--no-audit", "--no-fund", "--ignore-scripts"], ["run", "build"]):
        done = subprocess.run([npm, "--prefix", "web", *arguments], cwd=root, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(f"the web page cannot be built: npm {arguments[0]} failed, see above")
    page.touch()


def newest(sources: Path) -> float:
    """When the last of the page's sources was changed; 0.0 where there are none."""
    files = (path for path in sources.rglob("*") if path.is_file())
    return max(
        (
            path.stat().st_mtime
            for path in files
            if path.relative_to(sources).parts[0] not in ("node_modules", "test")
        ),
        default=0.0,
    )
