"""Damaged model files, read under limits that hold: memory by the kernel, time by the processor's.

    python -m tests.mutants FORMAT:COUNT[:PLANTED] ...

Each job runs in a child of its own, forked from this process with torch imported. A mutant has to
load with the very numbers that its judge finds in it, or to be refused with exit code 3 and one
line that names the file; within 2 s of processor time, and without more than twice the file and
64 MB of address space. Prints one JSON line a job. PLANTED: a fault put into the readers, to see
that this finds it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from chatserve.errors import StartupError
from chatserve.models import memory, safetensors_file
from chatserve.models.adapter import load_adapter
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.delta import apply_delta
from chatserve.models.device import choose_policy
from chatserve.models.gguf_file import GGUFFile
from chatserve.models.loader import load_model
from chatserve.models.manifest import Manifest
from tests import adapters, deltas, tiny
from tests.unit.models.gguf_bytes import model_tensors, write_model

MAX_SECONDS = 2.0
EXTRA_BYTES = 64 << 20
_ARENA_MAX = -8  # of mallopt: a thread's own arena reserves 64 MB that nobody uses
_EXTREMES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
Tensors = Mapping[str, torch.Tensor]


class Format(NamedTuple):
    """files: what is mutated, each as often as it stands here. use: load it and compare."""

    files: tuple[Path, ...]
    use: Callable[[], None]


class Unequal(Exception):
    """What was loaded is not what the file holds."""


# Mutations ------------------------------------------------------------------------------------


def mutated(data: bytes, choose: random.Random) -> bytes:
    """One to three faults, most of them where the structure is: near the start or the end."""
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        if changed:
            _MUTATIONS[choose.randrange(len(_MUTATIONS))](changed, _place(changed, choose), choose)
    return bytes(changed)


def _place(data: bytearray, choose: random.Random) -> int:
    place = choose.randrange(min(choose.choice([64, 1000, 4000, len(data)]), len(data)))
    return len(data) - 1 - place if choose.random() < 0.25 else place


def _flip(data: bytearray, place: int, choose: random.Random) -> None:
    data[place] ^= 1 << choose.randrange(8)


def _set(data: bytearray, place: int, choose: random.Random) -> None:
    data[place] = choose.choice([0, 0x2D, 0x39, 0x7F, 0x80, 0xFF])


def _number(data: bytearray, place: int, choose: random.Random) -> None:
    width = choose.choice([4, 8])
    number = choose.choice(_EXTREMES) % (1 << 8 * width)
    data[place : place + width] = number.to_bytes(width, "little")


def _digit(data: bytearray, place: int, choose: random.Random) -> None:
    """Another digit behind the next, so that a number in a JSON text is ten times as large."""
    for i in range(place, min(place + 400, len(data))):
        if 0x30 <= data[i] <= 0x39:
            data[i : i + choose.randrange(2)] = str(choose.randrange(10)).encode()
            return


def _cut(data: bytearray, place: int, choose: random.Random) -> None:
    del data[choose.choice([place, len(data) - 1]) :]


def _take(data: bytearray, place: int, choose: random.Random) -> None:
    del data[place : place + choose.randint(1, 64)]


def _put(data: bytearray, place: int, choose: random.Random) -> None:
    data[place:place] = choose.randbytes(choose.randint(1, 64))


def _double(data: bytearray, place: int, choose: random.Random) -> None:
    data[place:place] = data[place : place + choose.randint(1, 200)]


_MUTATIONS = (_flip, _flip, _set, _number, _digit, _cut, _take, _put, _double)


# Formats --------------------------------------------------------------------------------------


def _folder_of(kind: str) -> Callable[[Path], Format]:
    def build(root: Path) -> Format:
        folder = root / "model"
        folder.mkdir()
        deltas.write_folder(root / "x", deltas.base_tensors(), form=f"{kind}-shards")
        for file in (root / "x").iterdir():
            file.rename(folder / file.name)
        shards = tuple(sorted(folder.glob(f"*.{kind}")))
        others = tuple(folder.glob("*.index.json"))

        def judged() -> Tensors:
            load = load_file if kind == "safetensors" else _torch_load
            return {name: weight for shard in shards for name, weight in load(shard).items()}

        return Format((*shards * 3, *others), lambda: _use_checkpoint(folder, judged, shards))

    return build


def _torch_load(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return loaded


def _use_checkpoint(path: Path, judged: Callable[[], Tensors], files: Sequence[Path]) -> None:
    """Load a network; then every tensor of the files is compared."""
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights):
        load_model(checkpoint, choose_policy("cpu", "float32"))
        ours = {name: checkpoint.weights.read(name) for name in checkpoint.weights.tensors()}
    _judge(ours, judged, files)


def _judge(ours: Tensors, judged: Callable[[], Tensors], files: Sequence[Path]) -> None:
    """Compare with what another reader finds; where it gives up, with the bytes in the files.

    torch wants more of an archive than its tensors and their places.
    """
    try:
        wanted = judged()
    except Exception:  # in whatever way it gives up
        data = b"".join(file.read_bytes() for file in files)
        for name, weight in ours.items():
            if _raw(weight) not in data:
                raise Unequal(f"{name} is nowhere in the file") from None
    else:
        _compare(ours, wanted)


def _compare(ours: Tensors, judged: Tensors) -> None:
    if ours.keys() != judged.keys():
        raise Unequal(f"names: {sorted(ours.keys() ^ judged.keys())[:3]}")
    for name, weight in ours.items():
        other = judged[name]
        if (weight.shape, weight.dtype) != (other.shape, other.dtype) or _raw(weight) != _raw(
            other
        ):
            raise Unequal(name)


def _raw(weight: torch.Tensor) -> bytes:
    return weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _gguf(root: Path) -> Format:
    import gguf

    path = write_model(root / "model.gguf", "llama", _quantised(), {"block_count": 2})

    def use() -> None:
        _use_checkpoint_alone(path)
        with closing(GGUFFile.open(path)) as file:
            ours = {name: file.read(name) for name in file.tensors()}
        reader = gguf.GGUFReader(path)
        with np.errstate(all="ignore"):
            judged = {
                tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                for tensor in reader.tensors
            }
        if ours.keys() != judged.keys():
            raise Unequal("names")
        for name, weight in ours.items():
            values = torch.from_numpy(judged[name].copy()).float()
            if weight.float().shape != values.shape or not _same_values(weight.float(), values):
                raise Unequal(name)

    return Format((path,), use)


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=1e-5, atol=0, equal_nan=True).all())


def _quantised() -> dict[str, np.ndarray]:
    """Half precision beside float32."""
    return {
        name: values.astype(np.float16) if values.ndim == 2 and "ffn" in name else values
        for name, values in model_tensors().items()
    }


def _use_checkpoint_alone(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights):
        load_model(checkpoint, choose_policy("cpu", "float32"))


def _lora(root: Path) -> Format:
    config = ModelConfig.from_hf(tiny.sizes())
    new, old = (adapters.write(root / name, as_bin=name == "old") for name in ("new", "old"))
    files = (new / "adapter_model.safetensors", old / "adapter_model.bin")

    def use() -> None:
        for folder, file, load in ((new, files[0], load_file), (old, files[1], _torch_load)):
            pairs = load_adapter(folder, config).pairs
            ours = {}
            for name, pair in pairs.items():
                name_a, name_b = adapters.pair_names(name.removesuffix(".weight"))
                ours |= {name_a: pair.a, name_b: pair.b}
            _judge(ours, partial(load, file), [file])

    settings = (new / "adapter_config.json", old / "adapter_config.json")
    return Format((*files * 3, *settings), use)


def _delta(root: Path) -> Format:
    vocab = deltas.VOCAB + 1
    base = deltas.write_folder(root / "base", deltas.with_rotary(deltas.base_tensors()))
    delta = deltas.write_folder(
        root / "delta", deltas.with_rotary(deltas.delta_tensors(vocab=vocab)),
        form="safetensors", vocab_size=vocab,
    )  # fmt: skip
    target = root / "sum"
    recorded = apply_delta(base, delta, target)
    wanted = _hash(target)
    shutil.rmtree(target)

    def use() -> None:
        try:
            manifest: Manifest = apply_delta(base, delta, target, recorded=recorded)
            if manifest.tensors != recorded.tensors or _hash(target) != wanted:
                raise Unequal("the sum")
        finally:
            left = sorted(path.name for path in root.iterdir())
            shutil.rmtree(target, ignore_errors=True)
            if left not in (["base", "delta"], ["base", "delta", "sum"]):
                raise Unequal(f"left behind: {left}")

    files = (base / "pytorch_model.bin", delta / "model.safetensors")
    return Format((*files * 4, base / "config.json", delta / "config.json"), use)


def _hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


FORMATS: dict[str, Callable[[Path], Format]] = {
    "safetensors": _folder_of("safetensors"),
    "bin": _folder_of("bin"),
    "gguf": _gguf,
    "lora": _lora,
    "delta": _delta,
}


# Planted faults -------------------------------------------------------------------------------


def _plant(name: str) -> None:
    """Spoil the reader of safetensors as careless readers are."""
    whole = safetensors_file.SafetensorsFile._read_header

    def believe_sizes(self: Any) -> Any:
        bytearray(min(int.from_bytes(self._file.read(0, 8), "little"), 1 << 40))
        return whole(self)

    def unpack(self: Any) -> Any:
        data = self._file.read(0, self._file.size)
        struct.unpack_from(f"<{int.from_bytes(data[:8], 'little')}s", data, 8)
        return whole(self)

    def never_end(self: Any) -> Any:
        text = self._file.read(8, max(0, min(64, self._file.size - 8)))
        while not text.startswith(b"{"):
            pass
        return whole(self)

    def read_zeros(self: Any, name: str, rows: range | None = None) -> torch.Tensor:
        info = self.tensors()[name]
        shape = info.shape if rows is None else (len(rows), *info.shape[1:])
        return torch.zeros(shape, dtype=info.dtype) + 1

    planted = {"sizes": believe_sizes, "struct": unpack, "loop": never_end}
    if name == "zeros":
        safetensors_file.SafetensorsFile.read = read_zeros  # type: ignore[method-assign]
    else:
        safetensors_file.SafetensorsFile._read_header = planted[name]  # type: ignore[method-assign]


# Running --------------------------------------------------------------------------------------


def run(job: str) -> dict[str, Any]:
    """Run one job in a child; what became of its mutants, and of the child."""
    kind, count, planted = (*job.split(":"), "")[:3]
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory() as scratch:
        child = os.fork()
        if child == 0:
            os.close(reading)
            code = 1
            try:
                _mutate(kind, int(count), planted, Path(scratch), writing)
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        with open(reading, encoding="utf-8") as lines:
            said = [json.loads(line) for line in lines]
        _, status = os.waitpid(child, 0)
    return {"job": job, **_summary(said, status)}


def _summary(said: list[Any], status: int) -> dict[str, Any]:
    outcomes = [line for line in said if line[0] != "start"]
    failures = [line for line in outcomes if line[0] == "failed"]
    ended = os.waitstatus_to_exitcode(status)
    if ended == -signal.SIGPROF:
        failures.append(["failed", said[-1][1], f"ran for more than {MAX_SECONDS} s"])
    elif ended != 0:
        failures.append(["failed", said[-1][1:] if said else None, f"ended with {ended}"])
    counts = Counter(line[0] for line in outcomes)
    return {"loaded": counts["loaded"], "refused": counts["refused"], "failures": failures}


def _mutate(kind: str, count: int, planted: str, scratch: Path, pipe: int) -> None:
    """What the child does: one line at the start of each mutant, and one at its end."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    threading.stack_size(1 << 20)

    def say(*line: Any) -> None:
        os.write(pipe, (json.dumps(line) + "\n").encode())

    say("start", "the whole files")
    root = scratch / "root"
    root.mkdir()
    form = FORMATS[kind](root)
    form.use()  # also imports whatever reading needs
    if planted:
        _plant(planted)
    whole = {file: file.read_bytes() for file in form.files}
    _limit_memory(max(map(len, whole.values())))
    for number, file, data in _mutants(form, whole, count, kind):
        say("start", number)
        file.write_bytes(data)
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        outcome = _outcome(form, file)
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(*outcome[:1], number, *outcome[1:])
        file.write_bytes(whole[file])


def _mutants(
    form: Format, whole: Mapping[Path, bytes], count: int, seed: str
) -> Iterator[tuple[int, Path, bytes]]:
    choose = random.Random(seed)
    for number in range(count):
        file = choose.choice(form.files)
        yield number, file, mutated(whole[file], choose)


def _outcome(form: Format, file: Path) -> tuple[str, ...]:
    try:
        form.use()
    except StartupError as error:
        is_named = file.name in error.message or str(file.parent) in error.message
        if error.exit_code == 3 and is_named and "\n" not in error.message:
            return ("refused",)
        return "failed", file.name, f"exit {error.exit_code}: {error.message}"
    except BaseException as error:  # whatever comes out is a finding
        return "failed", file.name, f"{type(error).__name__}: {error}"
    return ("loaded",)


def _limit_memory(file_bytes: int) -> None:
    """No more address space than is taken now, twice the file and 64 MB.

    A plan must not see the limit: it would refuse every file, for want of memory.
    """
    memory.address_space_left = lambda: 1 << 60
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    most = pages * resource.getpagesize() + 2 * file_bytes + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    torch.set_num_threads(1)
    for job in sys.argv[1:]:
        print(json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main()
