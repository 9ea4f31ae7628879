"""Benchmark lines as tables: a row per figure, a column per peer, and how far ahead chatserve is.

python -m benchmarks.table results/*.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tasks import is_better_high

OWN = "chatserve"
MEGABYTE = 1 << 20
Line = Mapping[str, Any]


def render(lines: Iterable[Line]) -> str:
    """Markdown, one table per model and mode."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.get("benchmark") == "peers":
            groups.setdefault((line["model"], line["mode"]), []).append(line)
    return "\n\n".join(
        f"**{model}, {mode}** (medians; × is {OWN}'s first form against the best of each peer)\n\n"
        + _table(group)
        for (model, mode), group in groups.items()
    )


def _table(lines: Sequence[Line]) -> str:
    peers = list(dict.fromkeys(line["peer"] for line in lines))
    engines = [engine for engine in dict.fromkeys(map(_engine, peers)) if engine != OWN]
    rows: dict[tuple[str, str], dict[str, Line]] = {}
    for line in lines:
        rows.setdefault((_label(line), line["figure"]), {})[line["peer"]] = line
    head = ["", *peers, *(f"× {engine}" for engine in engines)]
    table = [head, ["---"] * len(head)]
    for (label, figure), cells in rows.items():
        ratios = [_ratio_text(ratio(cells, engine)) for engine in engines]
        shown = [_value_text(cells.get(peer)) for peer in peers]
        table.append([f"{label}: {figure}", *shown, *ratios])
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def ratio(cells: Mapping[str, Line], engine: str) -> float | None:
    """chatserve's first form over the best of `engine`'s forms; below 1 is better where the figure
    is a cost."""
    own = next((line["value"] for peer, line in cells.items() if _engine(peer) == OWN), None)
    others = [line["value"] for peer, line in cells.items() if _engine(peer) == engine]
    if own is None or not others:
        return None
    figure = next(iter(cells.values()))["figure"]
    best = max(others) if is_better_high(figure) else min(others)
    return float(own / best) if best else None


def _engine(peer: str) -> str:
    return peer.partition(" ")[0]


def _label(line: Line) -> str:
    parts = [line["what"]]
    if line["prompt"]:
        parts.append(f"prompt {line['prompt']}")
    if line["what"] in ("decode", "streams", "cpu"):
        parts.append(f"{line['streams']} streams")
    return ", ".join(parts)


def _value_text(line: Line | None) -> str:
    if line is None:
        return ""
    if line["unit"] == "bytes":
        return f"{line['value'] / MEGABYTE:.0f} MB"
    value = line["value"]
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    lines = [
        json.loads(line)
        for file in parser.parse_args().files
        for line in file.read_text("utf-8").splitlines()
    ]
    print(render(lines))


if __name__ == "__main__":
    main()
