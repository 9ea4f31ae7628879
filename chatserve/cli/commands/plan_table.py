"""What `chatserve plan` has found: forms of a model on places, as a table, as JSON, or in one line.

Knows sizes and words; computes no plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatserve.models.checkpoint import Checkpoint
    from chatserve.models.memory_plan import MemoryPlan
    from chatserve.models.spread import Room


@dataclass(frozen=True)
class Place:
    """Memory that a model may go into: a device that is here, or a size that somebody named.

    `room`: of several GPUs, or of one and main memory, over which it is spread.
    """

    name: str
    kind: str
    memory_bytes: int
    room: Room | None = None


@dataclass(frozen=True)
class Row:
    """One form on one place; without a plan where the form is not to be had, and why."""

    form: str
    flags: str
    plan: MemoryPlan | None
    fits: bool
    reason: str = ""
    held_as: str = ""
    device_map: str = ""
    device_bytes: Mapping[str, int] = field(default_factory=dict)


def in_words(num_bytes: int) -> str:
    from chatserve.models.memory import in_gb

    return in_gb(num_bytes) if num_bytes >= 10**9 else f"{num_bytes / 1e6:.0f} MB"


def _use(row: Row, rows: Sequence[Row], place: Place) -> str:
    """What to do where `row` does not fit: another form, or a shorter context; else more memory."""
    fitting = next((other for other in rows if other.fits), None)
    if fitting:
        can_shrink = row.plan is not None and place.room is None
        own = row.plan.context_within(place.memory_bytes) if can_shrink and row.plan else 0
        shorter = f" or --context-length {own}" if own else ""
        return f"use {fitting.flags or fitting.form}{shorter}"
    if place.room is not None:
        offloading = "" if place.room.host_bytes else "--cpu-offloading, "
        return f"use {offloading}more GPUs or a smaller model"
    planned = [(other, other.plan) for other in rows if other.plan]
    for other, plan in planned:
        if context := plan.context_within(place.memory_bytes):
            return f"use {_with_flags(other)}--context-length {context}"
    least = min(plan.total_bytes for _, plan in planned)
    return f"use a smaller model or {in_words(least)} of memory"


def _with_flags(row: Row) -> str:
    return f"{row.flags} " if row.flags else ""


def why(name: str, tables: dict[Place, list[Row]]) -> str:
    """The one line for a model that fits nowhere."""
    place = max(tables, key=lambda place: place.memory_bytes)
    plans = [(row, row.plan) for row in tables[place] if row.plan]
    row, plan = min(plans, key=lambda pair: pair[1].total_bytes)
    return (
        f"{name} does not fit: {row.form} needs {in_words(plan.total_bytes)} for "
        f"{plan.concurrency} x {plan.context:,} tokens, there are {in_words(place.memory_bytes)}; "
        f"{_use(row, tables[place], place)}"
    )


def as_json(checkpoint: Checkpoint, tables: dict[Place, list[Row]]) -> dict[str, Any]:
    plans = [
        {
            "name": place.name,
            "kind": place.kind,
            "memory_bytes": place.memory_bytes,
            "forms": [_row_as_json(row, rows, place) for row in rows],
        }
        for place, rows in tables.items()
    ]
    return {"weights": str(checkpoint.path), "places": plans}


def _row_as_json(row: Row, rows: Sequence[Row], place: Place) -> dict[str, Any]:
    line: dict[str, Any] = {"form": row.form, "flags": row.flags, "fits": row.fits}
    if row.plan is None:
        held = {"held_as": row.held_as} if row.held_as else {}
        return {**line, "reason": row.reason, **held}
    plan = row.plan
    return {
        **line,
        "use": None if row.fits else _use(row, rows, place),
        "held_as": plan.form,
        "weights_bytes": plan.weights_bytes,
        "adapter_bytes": plan.adapter_bytes,
        "kv_bytes": plan.kv_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "context": plan.context,
        "concurrency": plan.concurrency,
        "activation_bytes": plan.activation_bytes,
        "slack_bytes": plan.slack_bytes,
        "total_bytes": plan.total_bytes,
        **({"device_map": row.device_map} if row.device_map else {}),
        **({"device_bytes": dict(row.device_bytes)} if row.device_bytes else {}),
    }


def show(checkpoint: Checkpoint, tables: dict[Place, list[Row]]) -> None:
    from chatserve.cli.escapes import one_line

    plan = next(row.plan for rows in tables.values() for row in rows if row.plan)
    many = "sequence" if plan.concurrency == 1 else "sequences"
    print(one_line(checkpoint.path.name), end="")
    print(f": {plan.concurrency} {many} of {plan.context:,} tokens")
    for place, rows in tables.items():
        print(f"\n{place.name}")
        print("  form    weights       KV  activations    slack     total")
        for row in rows:
            if row.plan is None:
                print(f"  {row.form:<6}  {row.reason}")
                continue
            part = row.plan
            weights = part.weights_bytes + part.adapter_bytes
            cells = (
                (weights, 8), (part.kv_bytes, 8), (part.activation_bytes, 12),
                (part.slack_bytes, 8), (part.total_bytes, 9),
            )  # fmt: skip
            figures = " ".join(f"{in_words(num_bytes):>{width}}" for num_bytes, width in cells)
            flags = f" ({row.flags})" if row.flags else ""
            verdict = f"fits{flags}" if row.fits else f"does not fit, {_use(row, rows, place)}"
            print(f"  {row.form:<6} {figures}  {verdict}")
            if row.device_map:
                held = [f"{name} {in_words(size)}" for name, size in row.device_bytes.items()]
                print(f"         {row.device_map}; weights {', '.join(held)}")
