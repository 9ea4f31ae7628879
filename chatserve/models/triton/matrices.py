"""Which product a network's half-precision matrices use for a single row: found by measuring.

How near PyTorch's library comes to memory's speed for one row differs between its versions and
cards, and so does ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from chatserve.models.linear import Linear, RowProduct
from chatserve.models.llama import Block
from chatserve.models.triton.row_product import linear_row

logger = logging.getLogger(__name__)

_ROUNDS = 3
_GAIN = 0.97  # of the library's time: below it our kernel is worth having


def choose_row_product(
    blocks: Sequence[Block], timer: Callable[[Callable[[], object]], float] | None = None
) -> None:
    """Give each kind of matrix (qkv, output, gate and up, down) its faster product for one row.

    All layers' matrices are read in turn, so that none comes from a cache. `timer`: seconds.
    """
    timer = timer or cuda_seconds
    kinds = zip(
        *((block.attention.qkv, block.attention.output, block.mlp.gate_up, block.mlp.down)
          for block in blocks),
        strict=True,
    )  # fmt: skip
    for name, kind in zip(("qkv", "output", "gate_up", "down"), kinds, strict=True):
        matrices = [matrix for matrix in kind if isinstance(matrix, Linear)]
        if not matrices:
            continue
        weights = [matrix.weight for matrix in matrices]
        x = weights[0].new_zeros(1, weights[0].shape[1])
        library = timer(partial(_multiply_all, F.linear, x, weights))
        own = timer(partial(_multiply_all, linear_row, x, weights))
        logger.info("%s, one row: %.1f us, own kernel %.1f us", name,
                    library / len(weights) * 1e6, own / len(weights) * 1e6)  # fmt: skip
        if own < _GAIN * library:
            for matrix in matrices:
                matrix.multiply_row = linear_row


def _multiply_all(multiply: RowProduct, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        multiply(x, weight)


def cuda_seconds(function: Callable[[], object]) -> float:
    """The best of some calls, after one that compiles."""
    function()
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)
