"""What a worker says of itself in numbers: its engine's meter, its errors, and the memory it has.

Memory is measured when it is asked for, not estimated.
"""

from __future__ import annotations

import time

from chatserve.models.memory import device_memory, resident_bytes
from chatserve.protocol.measured import HistogramCounts, Measured
from chatserve.server.contract import Engine, ServedModel
from chatserve.server.error_log import ErrorLog

STARTED_AT = time.time()
"""Of this process, as near as its modules know."""


def measured(served: tuple[Engine, ServedModel] | None, errors: ErrorLog) -> Measured:
    """Counts since the start and memory now; of the engine only once it runs."""
    if served is None:
        return Measured(
            started_at=STARTED_AT, counters={}, outcomes={}, errors=dict(errors.by_code),
            histograms={}, rss_bytes=resident_bytes(), recent_errors=errors.recent(),
        )  # fmt: skip
    engine, model = served
    meter, stats = engine.meter, engine.stats()
    device = str(model.description.get("device") or "")
    used_bytes, total_bytes = device_memory(device)
    return Measured(
        started_at=STARTED_AT,
        counters={
            "prompt_tokens": meter.prompt_tokens,
            "cached_tokens": meter.cached_tokens,
            "generation_tokens": meter.generation_tokens,
            "num_preempted": stats.num_preempted,
        },
        outcomes=dict(meter.outcomes),
        errors=dict(errors.by_code),
        histograms={
            name: HistogramCounts(counts=list(each.counts), sum=each.sum)
            for name, each in meter.histograms.items()
        },
        num_kv_tokens=stats.num_kv_tokens,
        rss_bytes=resident_bytes(),
        device=device,
        device_used_bytes=used_bytes,
        device_total_bytes=total_bytes,
        recent_errors=errors.recent(),
    )
