"""apply-delta against copying the same files: time, and the peak of resident memory.

    python -m benchmarks.apply_delta BASE DELTA [--scratch FOLDER] [--repeats 3]
    python -m benchmarks.apply_delta --make FOLDER [--shape tiny|7b|13b] [--version v0|v1.1]
        [--layers N] [--fresh]

The second form writes random `base` and `delta` folders of that shape, or with fewer layers, some
rows at a time; with `--fresh` no row twice, so that nothing below can save itself any work.
The first prints one JSON line; the sum is written to SCRATCH (default: beside BASE) and removed.
Copies are synced like the sum is. `read_ratio`: against copying base and delta, as many bytes as
apply-delta reads; `written_ratio`: against copying the delta alone, as many as it writes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import describe
from chatserve.models.manifest import parts
from chatserve.models.safetensors_writer import FolderWriter
from chatserve.models.weights import TensorInfo

_BASE_ROWS = 32_000


class Shape(NamedTuple):
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int = _BASE_ROWS


SHAPES = {
    "tiny": Shape(4, 256, 688, 4, 3200),
    "7b": Shape(32, 4096, 11008, 32),
    "13b": Shape(40, 5120, 13824, 40),
}


def infos(shape: Shape, vocab: int) -> list[TensorInfo]:
    """A LLaMA's tensors in float16."""
    hidden, ffn = shape.hidden, shape.ffn
    layer = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
    layer |= {"mlp.down_proj": (hidden, ffn)}
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    for number in range(shape.layers):
        prefix = f"model.layers.{number}"
        sizes |= {f"{prefix}.{name}": size for name, size in layer.items()}
        sizes |= {f"{prefix}.input_layernorm": (hidden,)}
        sizes |= {f"{prefix}.post_attention_layernorm": (hidden,)}
    sizes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    return [TensorInfo(f"{name}.weight", size, "float16", 0) for name, size in sizes.items()]


def make(folder: Path, shape: Shape, *, is_v0: bool, is_fresh: bool = False) -> None:
    """Random folders `base` and `delta`; the same rows again and again unless `is_fresh`."""
    for name, scale, vocab in (("base", 0.02, shape.vocab), ("delta", 0.001, shape.vocab + is_v0)):
        tensors = infos(shape, vocab)
        with FolderWriter(folder / name, tensors, metadata={"format": "pt"}) as writer:
            for info in tensors:
                is_norm = name == "base" and "norm" in info.name
                rows = random_rows(info, scale, float(is_norm), is_fresh=is_fresh)
                writer.write(info.name, rows)
            writer.write_json("config.json", config(shape, vocab))
            writer.write_json("tokenizer.json", {})
            writer.finish()


def random_rows(
    info: TensorInfo, scale: float, mean: float, *, is_fresh: bool
) -> Iterator[torch.Tensor]:
    pattern: torch.Tensor | None = None
    for rows in parts(info):
        size = (len(rows), *info.shape[1:])
        if is_fresh or pattern is None or pattern.shape != size:
            pattern = (torch.randn(size) * scale + mean).half()
        yield pattern


def config(shape: Shape, vocab: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "torch_dtype": "float16",
        "tie_word_embeddings": False,
    }  # fmt: skip


def copy_s(folders: Iterable[Path], target: Path) -> float:
    """The files of `folders`, copied and synced."""
    start = time.perf_counter()
    for folder in folders:
        (target / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir()):
            copy = shutil.copyfile(file, target / folder.name / file.name)
            with open(copy, "rb+") as handle:
                os.fsync(handle.fileno())
    return time.perf_counter() - start


def apply_s(base: Path, delta: Path, target: Path) -> float:
    """The whole command, as a user starts it."""
    command = [sys.executable, "-m", "chatserve", "apply-delta", str(base), str(delta)]
    start = time.perf_counter()
    subprocess.run([*command, str(target)], check=True, capture_output=True)
    return time.perf_counter() - start


def measure(base: Path, delta: Path, scratch: Path, repeats: int) -> dict[str, object]:
    target = scratch / "apply-delta-benchmark"
    measures: dict[str, Callable[[], float]] = {
        "apply": lambda: apply_s(base, delta, target),
        "copy_both": lambda: copy_s([base, delta], target),
        "copy_delta": lambda: copy_s([delta], target),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for repeat in range(-1, repeats):  # the first round fills the page cache
        for name, run in measures.items():
            shutil.rmtree(target, ignore_errors=True)
            elapsed = run()
            if repeat >= 0:
                seconds[name].append(elapsed)
    shutil.rmtree(target, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    # the largest child: no other command was started
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    described = json.loads((base / "config.json").read_text())
    return {
        "layers": described["num_hidden_layers"],
        "hidden": described["hidden_size"],
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "read_ratio": round(medians["apply"] / medians["copy_both"], 2),
        "written_ratio": round(medians["apply"] / medians["copy_delta"], 2),
        "peak_rss_bytes": peak_bytes,
        "delta_bytes": sum(file.stat().st_size for file in delta.iterdir()),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="BASE and DELTA")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--fresh", action="store_true", help="no row twice")
    parser.add_argument("--version", choices=["v0", "v1.1"], default="v0")
    options = parser.parse_args()
    if options.make is not None:
        shape = SHAPES[options.shape]
        shape = shape._replace(layers=options.layers or shape.layers)
        make(options.make, shape, is_v0=options.version == "v0", is_fresh=options.fresh)
        return
    if len(options.folders) != 2:
        parser.error("name BASE and DELTA, or --make FOLDER")
    base, delta = options.folders
    facts = describe()
    result = measure(base, delta, options.scratch or base.resolve().parent, options.repeats)
    print(json.dumps({"benchmark": "apply_delta", **facts, **result}))


if __name__ == "__main__":
    main()
