"""How many tokens a step may have on a slow machine, so that it ends long before it counts as hung.

Found by trying, before the first request. Where a prompt's token takes a tenth of a second, a step
of 512 would look like an engine that hangs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

SHARE = 0.25
"""Of the longest gap: other programs want the machine, too, and a long past takes longer."""
NUM_TRIED = 32


class Steps(Protocol):
    """An engine before its first sequence."""

    def read(self, token_ids: Rows[int]) -> torch.Tensor: ...
    def limit_steps(self, num_tokens: int) -> None: ...


def fit_steps(
    engine: Steps, most: int, gap_s: float, *, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Let no step take more than a share of `gap_s`; 0 is without a limit.

    `most`: tokens that a step may have. Only where they are slow more than one is tried.
    """

    def seconds(num_tokens: int) -> float:
        start = clock()
        engine.read([0] * num_tokens)[-1, 0].item()
        return clock() - start

    room_s = SHARE * gap_s
    one_s = seconds(1) if gap_s else 0.0
    if one_s * most <= room_s:
        return
    num_tried = min(NUM_TRIED, most)
    each_s = max(0.0, seconds(num_tried) - one_s) / max(1, num_tried - 1)
    # where weights come from the disk, fewer tokens make a step no shorter
    fitting = int(max(room_s - one_s, one_s) / each_s) if each_s else most
    if fitting < most:
        engine.limit_steps(fitting)
        logger.info(
            "steps of at most %d tokens: a prompt's token takes %.0f ms", fitting, 1000 * each_s
        )
    if one_s > room_s:
        logger.warning(
            "a step takes %.0f s and more; if requests end with worker_stalled, start with "
            "--token-gap-timeout-s=%d", one_s, math.ceil(one_s / SHARE),
        )  # fmt: skip
