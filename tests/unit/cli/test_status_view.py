"""The table of `chatserve top`: any width, any JSON, nothing that moves a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from chatserve.cli.status_view import in_bytes, in_seconds, sparkline, status_lines

WORKER: dict[str, Any] = {
    "id": "w1", "models": ["vicuna-7b", "v"], "state": "ready", "running": 3, "waiting": 2,
    "tokens_per_s": 41.26, "prompt_tokens_per_s": 1234.0, "ttft_s": {"p50": 0.25, "p99": 3.0},
    "itl_s": {"p50": 0.0231, "p99": 0.1}, "kv_used_tokens": 900, "kv_total_tokens": 1000,
    "device": "cpu", "device_used_bytes": 12_000_000_000, "device_total_bytes": 24_000_000_000,
    "rss_bytes": 7_300_000_000, "loaded_bytes": 5, "total_bytes": 10,
}  # fmt: skip
STATUS: dict[str, Any] = {
    "server": {"version": "0.1.0", "uptime_s": 400.0, "draining": False},
    "workers": [WORKER, {**WORKER, "models": ["b"], "state": "loading"}],
    "queue": {"running": 3, "waiting": 2, "wait_s": 4.5},
    "tokens_per_s": {"now": 41.26, "history": [0, 10, 20, 40]},
    "models": [{"name": "vicuna-7b", "state": "ready"}, {"name": "asleep", "state": "unloaded"}],
    "errors": [
        {"time": 95.0, "code": "worker_died", "model": "b", "message": "it died", "count": 3}
    ],
}  # fmt: skip


def drawn(status: dict[str, Any], width: int) -> list[str]:
    return [line.plain for line in status_lines(status, width, now=100.0)]


def test_a_wide_terminal_shows_all() -> None:
    assert [line.rstrip() for line in drawn(STATUS, 160)] == [
        "chatserve 0.1.0   up 7 min",
        "3 running, 2 waiting (about 4.5 s)   41.3 tokens/s ▁▂▄█",
        "",
        "MODEL         STATE        RUN  WAIT  TOK/S  PROMPT/S  TTFT 50/99      ITL 50/99         "
        "KV            DEVICE MEMORY                RSS",
        "vicuna-7b +1  ready        3    2     41.3   1,234     250 ms / 3.0 s  23.1 ms / 100 ms  "
        "███████░ 90%  ████░░░░ 50% of 24.0 GB cpu  7.3 GB",
        "b             loading 50%  3    2     41.3   1,234     250 ms / 3.0 s  23.1 ms / 100 ms  "
        "███████░ 90%  ████░░░░ 50% of 24.0 GB cpu  7.3 GB",
        "",
        "asleep: unloaded",
        "",
        "RECENT ERRORS",
        "  5.0 s ago  worker_died ×3  b  it died",
    ]


@pytest.mark.parametrize("width", [1, 8, 20, 40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert all(line.cell_len <= width for line in status_lines(STATUS, width))


def test_what_matters_most_stays_longest() -> None:
    headings = [line for line in drawn(STATUS, 45) if line.startswith("MODEL")]
    assert headings[0].split() == ["MODEL", "STATE", "RUN", "WAIT", "TOK/S"]


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"workers": None, "server": 3, "queue": [], "tokens_per_s": "x", "errors": {}, "models": 1},
        {"workers": [None, 7, {}], "errors": [{}], "models": [{}]},
        {"workers": [{**WORKER, "models": 5, "ttft_s": [], "kv_total_tokens": "many"}]},
        {"workers": [dict.fromkeys(WORKER)], "tokens_per_s": {"history": [None, "a", -3]}},
        {"workers": [dict.fromkeys(WORKER, float("nan"))]},
        {"workers": [dict.fromkeys(WORKER, 1e300)], "server": {"uptime_s": True}},
    ],
)
def test_junk_is_no_reason_to_fail(status: dict[str, Any]) -> None:
    assert drawn(status, 80)


def test_names_and_messages_cannot_move_the_terminal() -> None:
    evil = "a\x1b[2J\nb\u202e\x07c"
    error = {"time": 1, "code": evil, "model": evil, "message": evil}
    status = {
        **STATUS, "workers": [{**WORKER, "models": [evil], "state": evil, "device": evil}],
        "models": [{"name": evil, "state": evil}], "errors": [error],
        "server": {"version": evil},
    }  # fmt: skip
    text = "".join(drawn(status, 300))
    assert not set(text) & set("\x1b\n\x07\u202e") and "a b" in text


def test_a_sparkline_fills_its_height() -> None:
    assert sparkline([0, 1, 2, 4], 3) == "▂▄█"
    assert sparkline([0, 0], 9) == "▁▁" and sparkline([], 9) == sparkline([1], -4) == ""


@pytest.mark.parametrize(
    ("value", "size", "duration"),
    [(None, "-", "-"), (1.5e9, "1.5 GB", "416666.7 h"), (0.5, "0 kB", "500 ms"), ("x", "-", "-")],
)
def test_units(value: object, size: str, duration: str) -> None:
    assert in_bytes(value) == size and in_seconds(value) == duration
