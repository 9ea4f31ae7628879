"""Compile the kernels: one shared library with every instruction set level of this processor type.

Called by the wheel's build hook and by `python -m chatserve.kernels.build`. Standard library only,
and it imports nothing of chatserve: the hook runs before the package is installed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARY = Path(__file__).parent / "lib" / "libchatserve_kernels.so"

_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    # each product is rounded where the source says so, whatever the level or the batch
    "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_COMMON = ("memory", "team", "adapter", "network", "sampling", "interface")
_LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        # GCC 12 warns about its own headers
        "level_avx512": (
            "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mf16c",
            "-mfma", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
        ),
        "level_avx2": ("-mavx2", "-mfma", "-mf16c"),
    },
    "aarch64": {
        "level_neon_i8mm": ("-march=armv8.2-a+dotprod+fp16+i8mm",),
        "level_neon": ("-march=armv8.2-a+dotprod+fp16",),
    },
}  # fmt: skip
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


class BuildFailed(Exception):
    """Why there will be no kernels; chatserve then computes with PyTorch's operators."""


def build(
    target: Path = LIBRARY, *, extra_flags: Sequence[str] = (), machine: str | None = None
) -> Path:
    """Compile and link to `target`, which is replaced at once or not at all.

    `machine` is another processor type for a cross compiler in `CXX`. Raises `BuildFailed`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise BuildFailed(f"{target.parent} cannot be written: {error}") from error
    with workplace as folder:
        objects = compile_objects(Path(folder), extra_flags=extra_flags, machine=machine)
        linked = Path(folder) / target.name
        command = [*find_compiler(), "-shared", "-pthread", *extra_flags]
        _run([*command, *map(str, objects), "-o", str(linked)])
        linked.replace(target)
    return target


def compile_objects(
    folder: Path, *, extra_flags: Sequence[str] = (), machine: str | None = None
) -> list[Path]:
    """An object file in `folder` for every source of this processor type, or of `machine`'s.

    Raises `BuildFailed`.
    """
    compiler = find_compiler()
    machine = machine or platform.machine()
    levels = _LEVELS.get(_MACHINES.get(machine, machine))
    if levels is None:
        raise BuildFailed(f"there are no kernels for {machine} processors")
    units: dict[str, tuple[str, ...]] = {**dict.fromkeys(_COMMON, ()), **levels}
    objects = [folder / f"{name}.o" for name in units]

    def compile_one(unit: tuple[tuple[str, Sequence[str]], Path]) -> None:
        (name, flags), out = unit
        source = SOURCES / f"{name}.cpp"
        _run([*compiler, *_FLAGS, *flags, *extra_flags, "-c", str(source), "-o", str(out)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, zip(units.items(), objects, strict=True)))
    return objects


def find_compiler() -> list[str]:
    """The C++ compiler as the first words of a command: `CXX`, else a usual name on the path.

    Raises `BuildFailed` when there is none.
    """
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildFailed("there is no C++ compiler (c++, g++ or clang++) on the path")


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildFailed(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildFailed(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")


def main() -> int:
    """`python -m chatserve.kernels.build`: 0, or 1 with the reason on stderr."""
    try:
        print(build())
    except BuildFailed as error:
        print(f"no kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
