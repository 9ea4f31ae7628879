"""The models of running servers as a table, and each one's memory in words. Knows rows, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chatserve.cli.escapes import one_line

HEADINGS = ("NAME", "STATE", "SIZE", "MEMORY", "DEVICE", "RUNNING", "UNLOADED IN")


def model_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table, headings first."""
    table = [HEADINGS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]


def memory_text(row: Mapping[str, Any]) -> str:
    """As `1.3 GB, cpu`."""
    size = _size(row.get("memory_bytes") or row.get("bytes"))
    return ", ".join(each for each in (size, _text(row.get("device"))) if each != "-")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _text(row.get("name")),
        _state(row),
        _size(row.get("bytes")),
        _size(row.get("memory_bytes")),
        _text(row.get("device")),
        _text(row.get("running")),
        _time(row.get("keep_alive_left_s")),
    )


def _state(row: Mapping[str, Any]) -> str:
    state, total = _text(row.get("state")), row.get("total_bytes")
    if state == "loading" and isinstance(total, int) and total > 0:
        return f"{state} {row.get('loaded_bytes', 0) / total:.0%}"
    return state


def _text(value: object) -> str:
    return "-" if value is None else one_line(str(value))


def _size(value: object) -> str:
    if not isinstance(value, int):
        return "-"
    return f"{value / 1e9:.1f} GB" if value >= 10**9 else f"{value / 1e6:.0f} MB"


def _time(value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"
