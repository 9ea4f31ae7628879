"""Single kernels on the GPU: copy bandwidth, products by format and rows, attention, step's parts.

These figures choose tiles and crossovers; they are no goals. Needs a CUDA device and triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

SHAPES = {"output": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
COPIES = 6  # of 16 bits: past the 50 MB of an H100's cache
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048)

Multiply = Callable[[torch.Tensor], object]


def seconds(function: Callable[[], object], *, repeats: int = 20) -> float:
    """Of one call, from CUDA events around many, after a warm-up that also compiles."""
    for _ in range(3):
        function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats / 1000


def copy_bandwidth() -> float:
    """Bytes per second read and written by copying 2 GiB; the better of five tries."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return max(2 * source.numel() / seconds(lambda: target.copy_(source)) for _ in range(5))


def products(dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """Each shape and number of rows in 16, 8 and 4 bits; copies of a weight defeat the cache."""
    for name, (num_outputs, num_columns) in SHAPES.items():
        weight = torch.randn(num_outputs, num_columns, device="cuda", dtype=dtype)
        for form, bits, multiply in forms_of(weight):
            for num_rows in ROWS:
                if form == "int8 dequantised" and num_rows < 128:
                    continue
                x = torch.randn(num_rows, num_columns, device="cuda", dtype=dtype)
                elapsed = seconds(partial(multiply, x), repeats=5) / (COPIES * 16 // bits)
                yield {
                    "benchmark": "gpu-product", "matrix": name, "form": form, "rows": num_rows,
                    "us": round(elapsed * 1e6, 1),
                    "gb_per_s": round(weight.numel() * bits / 8 / elapsed / 1e9),
                }  # fmt: skip


def forms_of(weight: torch.Tensor) -> Iterator[tuple[str, int, Multiply]]:
    """Name, bits a weight, and the products of x with all copies of the weight in that form."""
    from chatserve.models.quantize import matmul_dequantise, quantise_int4, quantise_rows
    from chatserve.models.triton.int4_matmul import matmul_int4
    from chatserve.models.triton.int8_matmul import matmul_int8

    halves = [weight.clone() for _ in range(COPIES)]
    yield "half", 16, lambda x: [F.linear(x, half) for half in halves]
    codes, scales = quantise_rows(weight, weight.dtype)
    bytes8 = [codes.clone() for _ in range(2 * COPIES)]
    yield "int8", 8, lambda x: [matmul_int8(x, item, scales) for item in bytes8]
    yield "int8 dequantised", 8, lambda x: [matmul_dequantise(x, item, scales) for item in bytes8]
    packed, groups = quantise_int4(weight)
    bytes4 = [packed.clone() for _ in range(4 * COPIES)]
    yield "int4", 4, lambda x: [matmul_int4(x, item, groups) for item in bytes4]


def attention(dtype: torch.dtype) -> Iterator[dict[str, object]]:
    """Decode over block tables, 32 heads of 128, by streams and context."""
    from chatserve.models.triton.attention_decode import attend_rows, num_splits_for

    for heads, streams, context in ((32, 1, 512), (32, 1, 4000), (32, 64, 512), (8, 64, 4000)):
        width = -(-context // 32)
        keys, values = torch.randn(
            2, streams * width, 32, heads, 128, device="cuda", dtype=dtype
        ).unbind()
        tables = torch.randperm(streams * width, device="cuda").int().view(streams, width)
        queries = torch.randn(streams, 32, 128, device="cuda", dtype=dtype)
        rows = torch.arange(streams, device="cuda", dtype=torch.int32)
        lengths = torch.full_like(rows, context)
        for num_splits in sorted({1, 4, 8, 16, num_splits_for(streams, heads, 4096)}):
            elapsed = seconds(
                lambda k=keys, v=values, t=tables, q=queries, r=rows, n=lengths, s=num_splits: (
                    attend_rows(q, (k, v), t, r, n, num_splits=s)
                )
            )
            yield {
                "benchmark": "gpu-attention", "kv_heads": heads, "streams": streams,
                "context": context, "num_splits": num_splits,
                "is_chosen": num_splits == num_splits_for(streams, heads, 4096),
                "us": round(elapsed * 1e6, 1),
                "gb_per_s": round(2 * streams * context * heads * 128 * 2 / elapsed / 1e9),
            }  # fmt: skip


def parts_of(function: Callable[[], object], num_steps: int) -> dict[str, float]:
    """Microseconds of GPU time per step by kernel, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total for event in profile.key_averages()}
    longest = sorted(times, key=lambda key: -times[key])[:15]
    return {key[:60]: round(times[key] / num_steps, 1) for key in longest}
