"""The receipt as a picture: where compression strays, by layer and by position. SVG, by hand.

Knows a receipt and nothing else; what it draws needs no font, script or file from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from chatserve.models.receipt import Measurement, Receipt

WIDTH, HEIGHT = 960, 440
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
_TOP, _BOTTOM = 96, 372  # of both panels
_LEFT, _RIGHT = (64, 456), (556, 932)
_LEAST_KL = 1e-6


def draw(receipt: Receipt, title: str) -> str:
    """An SVG document: what each layer adds, and how many positions stray how far."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _label(_LEFT[0], 28, f"Quality of {_short(title, 60)}", size=17, weight="bold"),
        _label(_LEFT[0], 48, _subtitle(receipt)),
        *_layers(receipt.measurements),
        *_positions(receipt.measurements),
        *_legend(receipt.measurements),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def _layers(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Relative error by layer: a line with dots for each form, on a logarithmic scale."""
    errors = [100 * layer.added for each in measurements for layer in each.layers]
    low, high = _decades(errors)
    num_layers = max(len(each.layers) for each in measurements)
    x = _Axis(0, max(1, num_layers - 1), *_LEFT)
    y = _Axis(math.log10(low), math.log10(high), _BOTTOM, _TOP)
    yield _label(_LEFT[0], _TOP - 14, "error of a layer, in % of what it adds", weight="bold")
    yield from _rows(y, _LEFT, lambda power: f"{10.0**power:g} %")
    yield from _columns(x, sorted({round(num_layers * i / 6) for i in range(6)}), "layer", _LEFT)
    for each, colour in zip(measurements, _colours(), strict=False):
        points = [
            (x.at(layer.layer), y.at(math.log10(max(100 * layer.added, low))))
            for layer in each.layers
        ]
        yield _line(points, colour)
        for a, b in points:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>'


def _positions(measurements: Sequence[Measurement]) -> Iterator[str]:
    """The share of positions (across) whose divergence is at most so much (upwards)."""
    low, high = _decades([kl for each in measurements for kl in each.quantiles if kl > 0])
    low = max(low, _LEAST_KL)
    high = max(high, 10 * low)
    x = _Axis(0, 100, *_RIGHT)
    y = _Axis(math.log10(low), math.log10(high), _BOTTOM, _TOP)
    yield _label(_RIGHT[0], _TOP - 14, "KL divergence of a position, in nats", weight="bold")
    yield from _rows(y, _RIGHT, lambda power: f"{10.0**power:g}")
    yield from _columns(x, range(0, 101, 20), "% of positions, least first", _RIGHT)
    for each, colour in zip(measurements, _colours(), strict=False):
        last = len(each.quantiles) - 1
        yield _line(
            [
                (x.at(100 * index / last), y.at(math.log10(max(kl, low))))
                for index, kl in enumerate(each.quantiles)
            ],
            colour,
        )


def _legend(measurements: Sequence[Measurement]) -> Iterator[str]:
    for index, (each, colour) in enumerate(zip(measurements, _colours(), strict=False)):
        x, y = 64 + 300 * (index % 3), 412 + 18 * (index // 3)
        yield f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
        yield _label(
            x + 16, y,
            f"{each.form.name}: mean KL {each.mean_kl:.4f}, top {each.top1_agreement:.1%}",
        )  # fmt: skip


def _colours() -> Iterator[str]:
    while True:
        yield from _COLOURS


def _subtitle(receipt: Receipt) -> str:
    return (
        f"against {receipt.reference}; {receipt.text.num_positions:,} positions of "
        f"{_short(receipt.text.name, 30)} text; chatserve {receipt.version}"
    )


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around `values`; at least one decade."""
    positive = [value for value in values if value > 0] or [1.0]
    low = math.floor(math.log10(max(min(positive), _LEAST_KL)))
    high = max(low + 1, math.ceil(math.log10(max(max(positive), _LEAST_KL))))
    return 10.0**low, 10.0**high


def _rows(y: _Axis, sides: tuple[int, int], name: Callable[[int], str]) -> Iterator[str]:
    for power in range(round(y.low), round(y.high) + 1):
        at = y.at(power)
        yield _rule((sides[0], at), (sides[1], at))
        yield _label(sides[0] - 6, at + 4, name(power), anchor="end")


def _columns(x: _Axis, values: Sequence[int], title: str, sides: tuple[int, int]) -> Iterator[str]:
    for value in values:
        yield _rule((x.at(value), _BOTTOM), (x.at(value), _BOTTOM + 4))
        yield _label(x.at(value), _BOTTOM + 17, str(value), anchor="middle")
    yield _label(sides[1], _BOTTOM - 6, title, anchor="end")


def _rule(start: tuple[float, float], end: tuple[float, float]) -> str:
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
        'stroke="#ddd"/>'
    )


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _label(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _short(text: str, most: int) -> str:
    """Also without what XML does not allow."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= most else text[: most - 1] + "…"
