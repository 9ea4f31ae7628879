"""Findings: what an error becomes, and the status of the whole."""

from __future__ import annotations

import pytest

from chatserve.doctor.finding import Finding, Status, refused, worst
from chatserve.errors import ModelLoadError


def test_an_error_is_cut_at_its_way_out() -> None:
    found = refused("weights", "fail", ModelLoadError("x is damaged; fetch it; or another"))
    assert found == Finding("weights", "fail", "x is damaged", "fetch it; or another")
    assert refused("x", "warn", OSError("gone")) == Finding("x", "warn", "gone", None)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([], "ok"), (["ok", "warn"], "warn"), (["fail", "ok", "warn"], "fail"), (["ok"], "ok")],
)
def test_the_worst_decides(statuses: list[Status], expected: Status) -> None:
    assert worst([Finding("x", status, "") for status in statuses]) == expected
