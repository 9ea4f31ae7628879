"""What `chatserve top` shows: the lines of a server's status, for a terminal of any width.

Knows the JSON of `/admin/status`, of which any field may be missing or odd; no HTTP, no keyboard.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from chatserve.cli.escapes import one_line

BARS = "▁▂▃▄▅▆▇█"
MAX_ERRORS = 8
_BAR_WIDTH = 8
_STYLES = {
    "ready": "green", "loading": "yellow", "starting": "yellow", "draining": "yellow",
    "unloaded": "dim", "failed": "red", "stalled": "red", "unreachable": "red",
}  # fmt: skip
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """`rank`: the higher, the sooner it is left out where there is no room."""

    heading: str
    rank: int
    cells: tuple[Text, ...]

    @property
    def width(self) -> int:
        return max(len(self.heading), *(cell.cell_len for cell in self.cells), 1)


def status_lines(status: Row, width: int, *, now: float | None = None) -> list[Text]:
    """No line is wider than `width`."""
    now = time.time() if now is None else now
    lines = [*_head(status, width), Text()]
    workers = _rows(status, "workers")
    if workers:
        lines += _table(workers, width)
    else:
        lines.append(Text("no worker is there", style="yellow"))
    lines += _models(status, workers)
    errors = _rows(status, "errors")
    if errors:
        lines += [Text(), Text("RECENT ERRORS", style="bold")]
        lines += [_error(row, now) for row in errors[:MAX_ERRORS]]
        if len(errors) > MAX_ERRORS:
            lines.append(Text(f"… and {len(errors) - MAX_ERRORS} more kinds", style="dim"))
    for line in lines:
        line.truncate(max(1, width), overflow="ellipsis")
    return lines


def sparkline(values: Sequence[float], width: int) -> str:
    """The latest `width` values, against the highest of them."""
    shown = list(values)[-width:] if width > 0 else []
    top = max(shown, default=0.0)
    if top <= 0:
        return BARS[0] * len(shown)
    return "".join(BARS[min(7, int(value / top * 7.999))] for value in shown)


def in_bytes(value: object) -> str:
    """Decimal, as memory is sold."""
    number = _number(value)
    if number is None or number <= 0:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"


def in_seconds(value: object) -> str:
    number = _number(value)
    if number is None:
        return "-"
    if number < 1:
        return f"{number * 1e3:.3g} ms"
    if number < 120:
        return f"{number:.1f} s"
    return f"{number / 60:.0f} min" if number < 7200 else f"{number / 3600:.1f} h"


def _head(status: Row, width: int) -> list[Text]:
    server, queue, tokens = (_row(status, name) for name in ("server", "queue", "tokens_per_s"))
    first = Text(f"chatserve {_word(server, 'version')}", style="bold")
    first.append(f"   up {in_seconds(server.get('uptime_s'))}", style="not bold")
    if server.get("draining") is True:
        first.append("   draining: takes no requests", style="yellow")
    second = Text(f"{_count(queue, 'running')} running, {_count(queue, 'waiting')} waiting")
    wait_s = _number(queue.get("wait_s"))
    if wait_s:
        second.append(f" (about {in_seconds(wait_s)})")
    second.append(f"   {_rate(tokens.get('now'))} tokens/s ")
    history = tokens.get("history")
    values = [_number(each) or 0.0 for each in history] if isinstance(history, list) else []
    second.append(sparkline(values, min(60, width - second.cell_len - 1)), style="cyan")
    return [first, second]


def _table(workers: Sequence[Row], width: int) -> list[Text]:
    columns = [
        Column("MODEL", 0, tuple(Text(_names(row)) for row in workers)),
        Column("STATE", 1, tuple(_state(row) for row in workers)),
        Column("RUN", 2, tuple(Text(_count(row, "running")) for row in workers)),
        Column("WAIT", 2, tuple(Text(_count(row, "waiting")) for row in workers)),
        Column("TOK/S", 3, tuple(Text(_rate(row.get("tokens_per_s"))) for row in workers)),
        Column(
            "PROMPT/S", 7, tuple(Text(_rate(row.get("prompt_tokens_per_s"))) for row in workers)
        ),
        Column("TTFT 50/99", 5, tuple(_percentiles(row, "ttft_s") for row in workers)),
        Column("ITL 50/99", 6, tuple(_percentiles(row, "itl_s") for row in workers)),
        Column("KV", 4, tuple(_kv(row) for row in workers)),
        Column("DEVICE MEMORY", 8, tuple(_memory(row) for row in workers)),
        Column("RSS", 9, tuple(Text(in_bytes(row.get("rss_bytes"))) for row in workers)),
    ]
    while len(columns) > 1 and sum(each.width + 2 for each in columns) - 2 > width:
        columns.remove(max(columns, key=lambda each: each.rank))
    headings = "  ".join(each.heading.ljust(each.width) for each in columns)
    lines = [Text(headings.rstrip(), style="bold")]
    for index in range(len(workers)):
        line = Text()
        for column in columns:
            cell = column.cells[index].copy()
            cell.append(" " * (column.width - cell.cell_len + 2))
            line.append_text(cell)
        line.rstrip()
        lines.append(line)
    return lines


def _models(status: Row, workers: Sequence[Row]) -> list[Text]:
    """Those that nobody serves now."""
    served = {name for row in workers for name in _list(row, "models")}
    lines = [
        Text(f"{_word(row, 'name')}: {_word(row, 'state')}", style="dim")
        for row in _rows(status, "models")
        if row.get("name") not in served
    ]
    return [Text(), *lines] if lines else []


def _error(row: Row, now: float) -> Text:
    ago_s = max(0.0, now - (_number(row.get("time")) or now))
    line = Text(f"{in_seconds(ago_s):>7} ago  ", style="dim")
    line.append(_word(row, "code"), style="red not dim")
    if (_number(row.get("count")) or 1) > 1:
        line.append(f" ×{_count(row, 'count')}", style="not dim")
    if row.get("model"):
        line.append(f"  {_word(row, 'model')}", style="not dim")
    if row.get("message"):
        line.append(f"  {_word(row, 'message')}", style="not dim")
    return line


def _state(row: Row) -> Text:
    state = _word(row, "state")
    loaded, total = _number(row.get("loaded_bytes")), _number(row.get("total_bytes"))
    how_far = f" {loaded / total:.0%}" if state == "loading" and loaded and total else ""
    return Text(state + how_far, style=_STYLES.get(state, ""))


def _kv(row: Row) -> Text:
    used, total = _number(row.get("kv_used_tokens")), _number(row.get("kv_total_tokens"))
    return Text("-") if not total else _bar((used or 0) / total)


def _memory(row: Row) -> Text:
    used, total = _number(row.get("device_used_bytes")), _number(row.get("device_total_bytes"))
    device = _word(row, "device")
    if not total:
        return Text(device)
    return _bar((used or 0) / total).append(f" of {in_bytes(total)} {device}", style="default")


def _bar(share: float) -> Text:
    share = min(1.0, max(0.0, share))
    num_full = round(share * _BAR_WIDTH)
    style = "red" if share > 0.95 else "yellow" if share > 0.8 else "green"
    bar = Text("█" * num_full, style=style)
    bar.append("░" * (_BAR_WIDTH - num_full), style="dim")
    return bar.append(f" {share:.0%}", style="default")


def _percentiles(row: Row, name: str) -> Text:
    found = _row(row, name)
    if _number(found.get("p50")) is None:
        return Text("-")
    return Text(f"{in_seconds(found.get('p50'))} / {in_seconds(found.get('p99'))}")


def _names(row: Row) -> str:
    names = [one_line(str(name)) for name in _list(row, "models")]
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "") if names else "-"


def _word(row: Row, name: str) -> str:
    value = row.get(name)
    return one_line(str(value)) if isinstance(value, str) and value else "-"


def _count(row: Row, name: str) -> str:
    number = _number(row.get(name))
    return "-" if number is None else f"{number:.0f}"


def _rate(value: object) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.1f}" if number < 1000 else f"{number:,.0f}"


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e18 else None


def _row(row: Row, name: str) -> Row:
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def _list(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    return value if isinstance(value, list) else []


def _rows(row: Row, name: str) -> list[Row]:
    return [each for each in _list(row, name) if isinstance(each, dict)]
