"""Tests and figures that need a CUDA device: `make gpu-check`.

Runs the `gpu`-marked tests where pytest is there, then prints one JSON line per figure. Uses the
Python it is started with; needs torch, transformers, numpy and nothing of the web side.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time

import torch

from benchmarks.decode import PROMPT, NoTokenizer
from benchmarks.machine import describe
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.models.config import ModelConfig
from chatserve.models.device import check, choose_policy
from chatserve.models.llama import Llama

SEVEN_B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
NEW_TOKENS = 64


def random_model(load_8bit: bool) -> Llama:
    """A 7B shape with random weights, filled tensor by tensor on the device."""
    policy = check(choose_policy("cuda", load_8bit=load_8bit))
    print(json.dumps({"policy": policy.describe()}), flush=True)
    model = Llama(ModelConfig.from_hf(SEVEN_B), policy)
    with torch.inference_mode():
        for place in model.destinations().values():
            rows = torch.randn(place.shape, device=policy.device, dtype=policy.dtype) * 0.02
            place.target.load_rows(place.start, rows)
    return model


def decode_tokens_per_s(model: Llama, streams: int) -> float:
    def run(count: int) -> float:
        engine = Engine(model, NoTokenizer(), num_kv_tokens=200_000, max_num_seqs=streams)
        for index in range(streams):
            engine.add(str(index), PROMPT, SamplingParams(temperature=0, max_tokens=count))
        torch.cuda.synchronize()
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(4)
    return streams * NEW_TOKENS / (run(NEW_TOKENS + 2) - run(2))


def main() -> int:
    if not torch.cuda.is_available():
        print(json.dumps({"benchmark": "gpu-check", "skipped": "no CUDA device"}))
        return 0
    status = 0
    if importlib.util.find_spec("pytest"):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-c",
            os.devnull,
            "--rootdir",
            ".",
            "-p",
            "no:cacheprovider",
            "tests/gpu",
        ]
        status = subprocess.run(command, check=False).returncode
    else:
        print(json.dumps({"benchmark": "gpu-check", "tests": "not run: pytest is missing"}))
    device = torch.cuda.get_device_name()
    for load_8bit in (False, True):
        torch.cuda.reset_peak_memory_stats()
        model = random_model(load_8bit)
        weights = torch.cuda.memory_allocated()
        for streams in (1, 16):
            line = {
                "benchmark": "gpu-decode", **describe(), "device": device, "model": "7B shape",
                "load_8bit": load_8bit, "streams": streams,
                "tokens_per_s": round(decode_tokens_per_s(model, streams), 1),
                "weight_bytes": weights, "peak_bytes": torch.cuda.max_memory_allocated(),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
        del model
    return status


if __name__ == "__main__":
    raise SystemExit(main())
