"""Readers of weights against inputs that atheris makes from the branches it sees them take.

    python -m tests.fuzz_files gguf|bin|pickle SECONDS FOLDER [PLANTED]

An input is read as it is or refused with `ModelLoadError`: any other exception, more memory than
`EXTRA_BYTES` and more than `MAX_SECONDS` for one input end the run with another exit code than 0,
and FOLDER has the input. PLANTED: spoil the reader, to see that it is found out.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import atheris
import psutil

READERS = ("gguf_file", "gguf_header", "gguf_quants", "torch_bin", "torch_pickle", "weight_file")
with atheris.instrument_imports(include=[f"chatserve.models.{name}" for name in READERS]):
    from chatserve.errors import ModelLoadError
    from chatserve.models import gguf_file, gguf_header, torch_bin, torch_pickle
    from tests import deltas
    from tests.unit.models.gguf_bytes import model_tensors, write_model

MAX_SECONDS = 5
MAX_INPUT_BYTES = 1 << 16
EXTRA_BYTES = 512 << 20
"""For atheris' own corpus, too: what a reader takes beyond its file is bounded by tests.mutants."""

Target = Callable[[bytes], None]


def whole(path: Path, open_file: Callable[[Path], Any]) -> Target:
    def read(data: bytes) -> None:
        path.write_bytes(data)
        with closing(open_file(path)) as file:
            for name in file.tensors():
                file.read(name)

    return read


def pickled(data: bytes) -> None:
    torch_pickle.read_state_dict(data, "fuzzed.bin")


TARGETS: dict[str, Callable[[Path], Target]] = {
    "gguf": lambda path: whole(path, gguf_file.GGUFFile.open),
    "bin": lambda path: whole(path, torch_bin.TorchBinFile),
    "pickle": lambda _: pickled,
}


def write_seeds(name: str, folder: Path) -> None:
    """Good inputs to begin with."""
    with tempfile.TemporaryDirectory() as made:
        if name == "gguf":
            for family in ("llama", "qwen2"):
                write_model(folder / family, family, model_tensors(), {"block_count": 2})
            return
        root = Path(made)
        deltas.write_folder(root / "x", deltas.base_tensors(), form="bin-shards")
        for file in (root / "x").glob("*.bin"):
            if name == "bin":
                file.rename(folder / file.name)
            else:
                with zipfile.ZipFile(file) as members:
                    (data,) = (each for each in members.namelist() if each.endswith("data.pkl"))
                    (folder / file.name).write_bytes(members.read(data))


def plant(name: str) -> None:
    """Let the reader of `name` fail as careless ones do, on inputs that no seed is."""
    if name == "gguf":
        header: Any = gguf_header._Cursor
        check = header._check

        def believe(self: Any, num_bytes: int) -> None:
            if num_bytes > 1 << 32:
                raise OverflowError(num_bytes)
            check(self, num_bytes)

        header._check = believe
    else:
        machine: Any = torch_pickle._Machine
        pop = machine._pop

        def careless(self: Any) -> Any:
            if not self._stack:
                raise IndexError("pop from empty list")
            return pop(self)

        machine._pop = careless


def main(name: str, seconds: str, folder: str, *planted: str) -> None:
    place = Path(folder)
    seeds = place / "seeds"
    seeds.mkdir(parents=True, exist_ok=True)
    write_seeds(name, seeds)
    if planted:
        plant(name)
    target = TARGETS[name](place / f"input.{name}")

    def once(data: bytes) -> None:
        with suppress(ModelLoadError):
            target(data)

    limit = psutil.Process().memory_info().vms + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    arguments = [
        f"-max_total_time={seconds}", f"-timeout={MAX_SECONDS}", f"-max_len={MAX_INPUT_BYTES}",
        "-rss_limit_mb=0", "-print_final_stats=1", f"-artifact_prefix={place}/found-", str(seeds),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
