"""The kernels' C++ driver: under sanitizers, and on an ARM processor that is emulated.

`tests/kernels/driver.cpp` compares random networks with scalar code of its own and rows bit for
bit. Compiling it takes a while, hence the long limits. `quick` runs every packing and every
network, the night (`make sanitize`, `make soak`) every pair of them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from chatserve.kernels.build import SOURCES, BuildFailed, compile_objects, find_compiler

FOLDER = Path(__file__).parents[1] / "kernels"
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
EXTENTS = ["quick", pytest.param("full", marks=pytest.mark.soak)]
LIMIT_S = 900  # on a busy machine; seconds on an idle one

pytestmark = pytest.mark.timeout(LIMIT_S)


def build_driver(folder: Path, flags: Sequence[str], machine: str | None = None) -> Path:
    """The driver with all kernels, whose buffers end at guard pages."""
    objects = compile_objects(folder, extra_flags=flags, machine=machine)
    kernels = [path for path in objects if path.stem != "memory"]
    sources = (FOLDER / "driver.cpp", FOLDER / "guarded_memory.cpp")
    target = folder / "driver"
    command = [*find_compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-pthread", *flags]
    subprocess.run([*command, "-I", SOURCES, *sources, *kernels, "-o", target], check=True)
    return target


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def require_sanitizer(folder: Path, flag: str) -> None:
    """Skip where the compiler has no such library, or the system leaves it no room."""
    try:
        compiler = find_compiler()
    except BuildFailed as error:
        pytest.skip(str(error))
    source, target = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n", "utf-8")
    built = run([*compiler, flag, source, "-o", target])
    if built.returncode:
        pytest.skip(f"the compiler cannot do {flag}")
    started = run([target])
    if started.returncode:
        pytest.skip(f"{flag} does not start here: {started.stderr.splitlines()[:1]}")


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_run_clean_under_sanitizers(
    tmp_path: Path, sanitizers: str, extent: str
) -> None:
    flag = f"-fsanitize={sanitizers}"
    require_sanitizer(tmp_path, flag)
    done = run([build_driver(tmp_path, (*SANITIZED, flag)), extent])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("sampler: ok")


@pytest.fixture(scope="module")
def arm_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in (CROSS_COMPILER, EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CXX", CROSS_COMPILER)
        return build_driver(tmp_path_factory.mktemp("arm"), ("-O2", "-static"), "aarch64")


@pytest.mark.parametrize("extent", EXTENTS)
def test_the_neon_kernels_are_right_on_an_emulated_processor(arm_driver: Path, extent: str) -> None:
    done = run([EMULATOR, "-cpu", "max", arm_driver, extent])
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    checked = [line for line in done.stdout.splitlines() if " heads on " in line]
    for level in ("neoni8mm", "neon"):
        networks = [line.split(", ")[1:] for line in checked if line.startswith(f"{level}, ")]
        assert len({packing for packing, _ in networks}) == 6
        assert len({network for _, network in networks}) == 4
        assert len(networks) == (6 * 4 if extent == "full" else 6)


@pytest.mark.parametrize(
    ("processor", "levels"),
    [("max", ["neoni8mm", "neon"]), ("cortex-a76", ["neon"]), ("cortex-a72", [])],
)
def test_an_arm_processor_has_the_levels_of_its_instructions(
    arm_driver: Path, processor: str, levels: list[str]
) -> None:
    done = run([EMULATOR, "-cpu", processor, arm_driver, "levels"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == levels
