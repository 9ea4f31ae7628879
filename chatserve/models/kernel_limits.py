"""What the CPU kernels can hold, and in which sizes: for plans, too, which load no kernel.

Knows shapes alone.
"""

from __future__ import annotations

from chatserve.kernels.library import GROUP, PANEL_ROWS
from chatserve.models.config import ModelConfig
from chatserve.models.packing import Packing

HEAD_PACKING = Packing(is_grouped=True)
"""Of the head, whatever the other matrices have."""
_MAX_HEAD_DIM = 256
_MAX_COLUMNS = 1 << 16


def misfit(config: ModelConfig) -> str | None:
    """Why the kernels cannot hold this network; None when they can."""
    heads_out = config.num_heads * config.head_dim
    for name, size in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("heads times head_dim", heads_out),
    ):
        if size % GROUP or size > _MAX_COLUMNS:
            return f"{name} {size} is no multiple of {GROUP} up to {_MAX_COLUMNS:,}"
    if config.head_dim % 16 or config.head_dim > _MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is no multiple of 16 up to {_MAX_HEAD_DIM}"
    return None


def padded(rows: int) -> int:
    """`rows` rounded up to whole panels."""
    return -(-rows // PANEL_ROWS) * PANEL_ROWS
