"""Compiles every Triton kernel for a GPU that need not be there: `python -m ... 90 bfloat16`.

The kernels' own launchers are called with CPU tensors; each launch is stopped after the compiler
and the assembler. Prints one JSON line per launch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from chatserve.models.triton.attention_decode import attend_rows
from chatserve.models.triton.attention_prefill import attend_runs
from chatserve.models.triton.int4_matmul import matmul_int4
from chatserve.models.triton.int8_matmul import matmul_int8
from chatserve.models.triton.norm import add_rms_norm, rms_norm
from chatserve.models.triton.rope_store import HeadNorms, rope_store
from chatserve.models.triton.row_product import linear_row
from chatserve.models.triton.swiglu import swiglu


class AbsentGPU:
    """As much of a driver as the compiler asks for."""

    def __init__(self, level: int) -> None:
        self._level = level

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._level, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(function: JITFunction, grid: object) -> Any:
    def launch(*args: Any, **options: Any) -> None:
        kernel = function.run(*args, grid=grid, warmup=True, **options)
        code = kernel.asm["ptx"]
        print(json.dumps({
            "module": function.__module__.rpartition(".")[2], "kernel": function.__name__,
            "shared_bytes": kernel.metadata.shared, "cubin_bytes": len(kernel.asm["cubin"]),
            "has_tensor_cores": "wgmma" in code or "mma.sync" in code,
            "is_pipelined": "cp.async" in code,
        }))  # fmt: skip

    return launch


def launch_all(dtype: torch.dtype) -> None:
    """The shapes of a 7B model: 32 heads of 128, hidden size 4096; 8 key/value heads."""
    heads, kv_heads, dim, hidden = 32, 8, 128, 4096
    keys, values = torch.zeros(2, 4, 32, kv_heads, dim, dtype=dtype)
    qkv = torch.zeros(16, heads + 2 * kv_heads, dim, dtype=dtype)
    queries = qkv[:, :heads]
    tables = torch.zeros(16, 16, dtype=torch.int32)
    rows = torch.zeros(16, dtype=torch.int32)
    for num_splits in (1, 8):
        attend_rows(queries, (keys, values), tables, rows, rows, num_splits=num_splits)
    tiles = torch.zeros(16, 4, dtype=torch.int32)
    out = torch.zeros(16, heads * dim, dtype=dtype)
    for window in (None, 4096):
        attend_runs(queries, (keys, values), tables, tiles, out, window=window)
    codes = torch.zeros(hidden, hidden, dtype=torch.int8)
    packed = torch.zeros(hidden, hidden // 2, dtype=torch.uint8)
    groups = torch.zeros(hidden, hidden // 32, dtype=torch.float16)
    for num_rows in (1, 16, 64, 256):
        x = torch.zeros(num_rows, hidden, dtype=dtype)
        matmul_int8(x, codes, x.new_zeros(hidden))
        matmul_int4(x, packed, groups)
    x = torch.zeros(16, hidden, dtype=dtype)
    rms_norm(x, x[0], 1e-5)
    add_rms_norm(x, x, x[0], 1e-5)
    swiglu(x)
    linear_row(x[:1], torch.zeros(hidden, hidden, dtype=dtype))
    positions, table = rows.long(), torch.zeros(64, dim, dtype=dtype)
    for norms in (None, HeadNorms(table[0], table[0], 1e-6)):
        rope_store(qkv, positions, positions, (table, table), (keys, values), heads, norms)


if __name__ == "__main__":
    driver.set_active(AbsentGPU(int(sys.argv[1])))
    JITFunction.__getitem__ = compile_only
    launch_all(getattr(torch, sys.argv[2]))
    print(json.dumps({"triton": triton.__version__}))
