"""Build hook: compiles the CPU kernels into the wheel (or into the tree, for `pip install -e`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Without a compiler the wheel is pure Python, and slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        path = Path(self.root) / "chatserve" / "kernels" / "build.py"
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
        build_data["artifacts"].append(library.relative_to(self.root).as_posix())
