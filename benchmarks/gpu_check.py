"""Tests and figures that need a CUDA device: `make gpu-check`.

    python3 -m benchmarks.gpu_check [--only tests|speed|kernels] [--dtype float16]

Runs the tests of `tests/gpu` and of the Triton kernels where pytest is there, then prints one JSON
line per figure and one with the goals. Uses the Python it is started with; needs torch, triton,
transformers and numpy, nothing of the web side. Takes about ten minutes on an H100. `--tiny` tries
the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_models import (
    LONG,
    SEVEN_B,
    SHORT,
    TINY,
    Decoder,
    Shape,
    build,
    synchronise,
    transformers_runner,
    weight_bytes_per_step,
    without_triton,
)
from benchmarks.machine import describe
from chatserve.models.device import DevicePolicy, check, choose_policy

TESTS = (
    "tests/gpu",
    "tests/unit/models/test_triton_rows.py",
    "tests/unit/models/test_triton_matmul.py",
    "tests/unit/models/test_triton_matrices.py",
    "tests/unit/models/test_triton_attention.py",
    "tests/unit/models/test_triton_network.py",
    "tests/unit/models/test_triton_self_test.py",
)
STREAMS = (1, 4, 16, 64)
TORCH = "half, torch"
# PyTorch's network attends sequence by sequence: many streams take minutes
ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("tests", "speed", "kernels"))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        tell({"benchmark": "gpu-check", "skipped": "no CUDA device"})
        return 0
    status = 0
    if arguments.only in (None, "tests") and not arguments.tiny:
        status = run_tests()
    if arguments.only in (None, "speed"):
        for line in speed(arguments.dtype, is_tiny=arguments.tiny):
            tell(line)
    if arguments.only in (None, "kernels") and not arguments.tiny:
        dtype = getattr(torch, arguments.dtype)
        for lines in (gpu_kernels.attention(dtype), gpu_kernels.products(dtype)):
            for line in lines:
                tell(line)
    return status


def tell(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


def run_tests() -> int:
    if importlib.util.find_spec("pytest") is None:
        tell({"benchmark": "gpu-check", "tests": "not run: pytest is missing"})
        return 0
    # not the project's settings: they name plugins that may be missing here
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".",
               "-p", "no:cacheprovider", *TESTS]  # fmt: skip
    return subprocess.run(command, check=False).returncode


def speed(dtype: str, *, is_tiny: bool) -> Iterator[dict[str, object]]:
    """Decode and prefill of each form of the network, transformers, and the goals."""
    shape = TINY if is_tiny else SEVEN_B
    device = "cpu" if is_tiny else "cuda"
    common = {**describe(), "device": name_of(device), "model": shape.name, "dtype": dtype}
    bandwidth = 0.0 if is_tiny else gpu_kernels.copy_bandwidth()
    yield {"benchmark": "gpu-copy", **common, "gb_per_s": round(bandwidth / 1e9)}
    figures: dict[str, float] = {}
    for form, policy in forms(device, "float32" if is_tiny else dtype).items():
        yield {"benchmark": "gpu-policy", "form": form, "policy": policy.describe()}
        for line in decode_figures(shape, form, policy, figures, bandwidth):
            yield common | line
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    runner = transformers_runner(shape, torch.device(device), getattr(torch, dtype))
    runner(SHORT)
    rates = [(LONG - SHORT) / (runner(LONG) - runner(SHORT)) for _ in range(3)]
    figures["transformers 1"] = statistics.median(rates)
    yield common | {
        "benchmark": "gpu-decode", "form": "transformers", "streams": 1,
        "tokens_per_s": round(figures["transformers 1"], 1),
    }  # fmt: skip
    yield common | {"benchmark": "gpu-goals", **goals(figures)}


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def forms(device: str, dtype: str) -> dict[str, DevicePolicy]:
    """16, 8 and 4 bits on our kernels; beside them 16 on PyTorch's, and those of bitsandbytes."""
    half = check(choose_policy(device, dtype))
    found = {
        "half": half,
        "int8": check(choose_policy(device, dtype, load_8bit=True)),
        "int4": check(choose_policy(device, dtype, load_4bit=True)),
        TORCH: without_triton(half),
    }
    if device == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
        for name, flag in (("LLM.int8", "load_8bit"), ("NF4", "load_4bit")):
            policy = choose_policy(device, dtype, quant_backend="bitsandbytes", **{flag: True})
            found[f"{name}, bitsandbytes"] = check(policy)
    return found


def decode_figures(
    shape: Shape,
    form: str,
    policy: DevicePolicy,
    figures: dict[str, float],
    bandwidth: float,
) -> Iterator[dict[str, object]]:
    """One line for each number of streams and prompt length; `figures` collects them."""
    is_cuda = policy.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    network = build(shape, policy)
    step_bytes = weight_bytes_per_step(shape, network)
    decoder = Decoder(shape, network, max_streams=STREAMS[-1])
    for streams in STREAMS if policy.network == "triton" or not is_cuda else (1, 4):
        rates = [decoder.decode_tokens_per_s(streams) for _ in range(ROUNDS)]
        rate = figures[f"{form} {streams}"] = statistics.median(rates)
        line: dict[str, object] = {
            "benchmark": "gpu-decode", "form": form, "streams": streams,
            "tokens_per_s": round(rate, 1), "min": round(min(rates), 1),
            "max": round(max(rates), 1), "rounds": ROUNDS,
        }  # fmt: skip
        if streams == 1 and bandwidth:
            share = figures[f"{form} share"] = step_bytes * rate / bandwidth
            line["share_of_copy_bandwidth"] = round(share, 3)
        if is_cuda:
            line["peak_bytes"] = torch.cuda.max_memory_allocated()
        yield line
    for length in shape.prefill_lens:
        rate = statistics.median(decoder.prefill_tokens_per_s(length) for _ in range(ROUNDS))
        yield {
            "benchmark": "gpu-prefill", "form": form, "prompt": length,
            "tokens_per_s": round(rate),
        }  # fmt: skip
    if is_cuda:
        synchronise(policy.device)
        parts = gpu_kernels.parts_of(
            lambda: decoder.seconds(1, LONG, shape.prompt_len), num_steps=LONG
        )
        yield {"benchmark": "gpu-step", "form": form, "us_per_step": parts}


def goals(figures: dict[str, float]) -> dict[str, object]:
    """The figures of issue 3 beside what they should be at least."""
    wanted = {
        "half, 1 stream, share of copy bandwidth": (figures.get("half share", 0.0), 0.75),
        "int8 against half, 1 stream": (figures["int8 1"] / figures["half 1"], 1.5),
        "64 streams against 1": (figures["half 64"] / figures["half 1"], 20.0),
        "against transformers generate": (figures["half 1"] / figures["transformers 1"], 3.0),
    }
    return {
        name: {"is": round(value, 2), "at_least": least, "met": value >= least}
        for name, (value, least) in wanted.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
