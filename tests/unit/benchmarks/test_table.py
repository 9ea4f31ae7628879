"""Lines to a table, and by how much chatserve is ahead."""

from __future__ import annotations

from typing import Any

from benchmarks.table import ratio, render


def line(peer: str, value: float, figure: str = "tokens_per_s", unit: str = "tokens/s") -> Any:
    return {
        "benchmark": "peers", "model": "m", "mode": "http", "what": "streams", "prompt": 64,
        "streams": 4, "tokens": 64, "peer": peer, "figure": figure, "value": value, "unit": unit,
    }  # fmt: skip


def test_the_ratio_is_of_the_first_form_against_the_best_of_a_peer() -> None:
    cells = {
        item["peer"]: item
        for item in (
            line("chatserve int8", 300),
            line("chatserve bf16", 900),
            line("llama.cpp q8_0", 100),
            line("llama.cpp bf16", 150),
        )
    }
    assert ratio(cells, "llama.cpp") == 2.0
    assert ratio(cells, "fastchat") is None


def test_of_costs_the_lowest_is_the_best() -> None:
    cells = {
        item["peer"]: item
        for item in (
            line("chatserve int8", 30, "first_token_ms", "ms"),
            line("llama.cpp q8_0", 100, "first_token_ms", "ms"),
            line("llama.cpp bf16", 60, "first_token_ms", "ms"),
        )
    }
    assert ratio(cells, "llama.cpp") == 0.5


def test_a_table_has_a_row_per_figure_and_a_column_per_peer() -> None:
    other = {"benchmark": "startup", "seconds": {}}
    memory = line("chatserve int8", 3 << 20, "pss_bytes", "bytes")
    text = render([line("chatserve int8", 300), line("llama.cpp q8_0", 100), memory, other])
    assert text.splitlines()[2:] == [
        "|  | chatserve int8 | llama.cpp q8_0 | × llama.cpp |",
        "| --- | --- | --- | --- |",
        "| streams, prompt 64, 4 streams: tokens_per_s | 300 | 100 | 3.00 |",
        "| streams, prompt 64, 4 streams: pss_bytes | 3 MB |  |  |",
    ]
