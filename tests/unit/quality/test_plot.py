"""The picture is well-formed, keeps inside its frame, and shows what the receipt says."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest

from chatserve.models.packing import FOUR_BITS
from chatserve.models.receipt import LayerError
from chatserve.quality.plot import HEIGHT, WIDTH, draw
from tests.receipts import INT8, measurement, receipt

INT4 = dataclasses.replace(INT8, packing=FOUR_BITS)
SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    return root


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [
        (float(x), float(y))
        for x, y in (pair.split(",") for pair in line.get("points", "").split())
    ]


def test_a_line_for_each_form_in_each_panel() -> None:
    worse = tuple(LayerError(index, 0.2, 0.2) for index in range(5))
    both = receipt("w_1", measurement(), measurement(INT4, mean_kl=0.25, layers=worse))
    root = parsed(draw(both, "tiny"))
    lines = [points(line) for line in root.iter(f"{SVG}polyline")]
    int8_layers, int4_layers, *positions = lines
    assert len(int8_layers) == len(int4_layers) == 5 and [len(p) for p in positions] == [101, 101]
    assert len({line.get("stroke") for line in root.iter(f"{SVG}polyline")}) == 2
    # higher is worse, and later layers stand to the right
    assert all(four[1] < eight[1] for four, eight in zip(int4_layers, int8_layers, strict=True))
    assert int8_layers == sorted(int8_layers)
    said = " ".join(root.itertext())
    for words in ("tiny", "int8: mean KL 0.0059, top 95.8%", "int4/32+min/8: mean KL 0.2500",
                  "1,924 positions of shipped text"):  # fmt: skip
        assert words in said


EXTREMES = {
    "no error at all": measurement(
        quantiles=(0.0,) * 101, layers=tuple(LayerError(i, 0.0, 0.0) for i in range(3))
    ),
    "one layer": measurement(layers=(LayerError(0, 0.01, 0.01),)),
    "huge": measurement(
        quantiles=(*(0.0,) * 100, 5e7), layers=tuple(LayerError(i, 1e6**i, 1.0) for i in range(3))
    ),
    "one size": measurement(quantiles=(0.01,) * 101),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_all_stays_inside_the_frame(name: str) -> None:
    root = parsed(draw(receipt("w_1", EXTREMES[name]), "x"))
    places = [place for line in root.iter(f"{SVG}polyline") for place in points(line)]
    places += [
        (float(label.get("x", "-1")), float(label.get("y", "-1")))
        for label in root.iter(f"{SVG}text")
    ]
    assert places and all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


def test_names_cannot_break_out() -> None:
    text = draw(receipt("w_1"), '<script>alert("1")</script>&\x1b\x00' + "x" * 500)
    root = parsed(text)
    assert "script" not in {child.tag.removeprefix(SVG) for child in root.iter()}
    assert max(len(label.text or "") for label in root.iter(f"{SVG}text")) < 160


def test_more_forms_than_colours() -> None:
    forms = [dataclasses.replace(INT8, dtype_name=f"d{index}") for index in range(9)]
    root = parsed(draw(receipt("w_1", *map(measurement, forms)), "x"))
    assert len(list(root.iter(f"{SVG}polyline"))) == 18
