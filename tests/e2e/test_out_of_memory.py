"""Memory that does not suffice, in real processes: exit code 4, one line, and no second try."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from tests.sparse import llama, write_sparse

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's to keep")

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
MIB = 1 << 20
GIB = 1 << 30
LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip


def run(
    module: str, *arguments: str | Path, home: Path, address_space: int | None = None
) -> tuple[int, list[str], float]:
    """Exit code, lines on stderr, seconds."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATSERVE_")}

    def limit() -> None:
        assert address_space is not None
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**clean, "CHATSERVE_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=limit if address_space is not None else None,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines(), time.monotonic() - start


def the_line(errors: list[str]) -> str:
    """The only one that is no log."""
    assert "Traceback" not in "\n".join(errors)
    [line] = [line for line in errors if line.startswith("chatserve: ")]
    assert errors[-1] == line
    return line


def the_70b(folder: Path) -> Path:
    """A tiny model whose configuration claims to be another."""
    tiny.save_model(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **LLAMA_70B}), "utf-8")
    return folder


@pytest.mark.parametrize(
    "module",
    ["chatserve.server", pytest.param("chatserve.server.worker", marks=pytest.mark.soak)],
)
def test_a_configuration_that_claims_70_billion_weights(module: str, tmp_path: Path) -> None:
    folder = the_70b(tmp_path / "llama")
    code, errors, seconds = run(module, "--port=0", "--device=cpu", folder, home=tmp_path)
    assert code == 4, errors
    line = the_line(errors)
    assert "GB of weights" in line and "free; use" in line
    assert not [each for each in errors if "starting it again" in each]
    print(f"{module}: {seconds:.1f} s")


PEAK = """
import sys
from chatserve.server import command_line, worker_process
from pathlib import Path
def announce(*_):
    lines = Path("/proc/self/status").read_text().splitlines()
    print([line.split()[1] for line in lines if line.startswith("VmPeak")][0], flush=True)
    sys.stdout.flush()
    import os
    os._exit(0)
worker_process._announce = announce
raise SystemExit(command_line.worker())
"""


def need(folder: Path, home: Path) -> int:
    """The most address space that a worker takes until it is ready."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "--no-register", "--device=cpu", "--port=0", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
        env={**os.environ, "CHATSERVE_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(done.stdout) * 1024


@pytest.fixture(scope="module")
def base_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The address space of a worker whose weights are next to nothing."""
    folder = tmp_path_factory.mktemp("base")
    tiny.save_model(folder / "tiny")
    return need(folder / "tiny", folder)


def check_refusal(folder: Path, address_space: int, home: Path) -> str:
    code, errors, seconds = run(
        "chatserve.server", "--port=0", "--device=cpu", folder, home=home,
        address_space=address_space,
    )  # fmt: skip
    assert code == 4, errors
    assert not [each for each in errors if "starting it again" in each]
    print(f"{address_space // MIB} MiB: {seconds:.1f} s")
    return the_line(errors)


def test_an_address_space_a_gigabyte_below_the_need(base_bytes: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    folder = write_sparse(tmp_path / "1.2b", {**llama("7B"), **sizes, "num_attention_heads": 16})
    tiny.save_tokenizer(folder)
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert num_bytes > 2 * GIB
    line = check_refusal(folder, base_bytes + num_bytes - GIB, tmp_path)
    assert "GB of weights" in line and "free; use" in line


# some of it is missed while PyTorch itself is loaded, some where nobody expects it
@pytest.mark.soak
@pytest.mark.parametrize("missing", [0, 32, 64, 128, 192, 256, 320, 400, 500, 600, 700])
def test_whatever_fails_for_want_of_addresses(
    missing: int, base_bytes: int, tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "tiny")
    assert "use" in check_refusal(tmp_path / "tiny", base_bytes - missing * MIB, tmp_path)
