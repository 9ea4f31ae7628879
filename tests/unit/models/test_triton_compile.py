"""Every kernel goes through Triton's compiler and NVIDIA's assembler, without a GPU.

The interpreter knows nothing of layouts, shared memory or what tensor cores take.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# what one program may have; cards for desktops run code for 80 and have less than an A100
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}


@pytest.mark.parametrize(("level", "dtype"), [(80, "float16"), (90, "bfloat16")])
def test_kernels_compile_for(level: int, dtype: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.models.triton_compile", str(level), dtype],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=240,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    launches = [json.loads(line) for line in result.stdout.splitlines()][:-1]
    assert len(launches) == 23
    for launch in launches:
        assert launch["cubin_bytes"] > 0
        assert launch["shared_bytes"] <= SHARED_BYTES[level], launch
        if launch["kernel"] in ("_split_kernel", "_prefill_kernel", "_tiled_kernel"):
            assert launch["has_tensor_cores"], launch
        if launch["kernel"] in ("_row_kernel", "_vector_kernel", "_tiled_kernel"):
            assert launch["is_pipelined"], launch
