"""The compiled kernels at every level of this processor; without a library the tests skip."""

from __future__ import annotations

import pytest

from chatserve.kernels import library
from chatserve.kernels.library import Kernels, KernelsUnavailable
from chatserve.models.kernel_matrix import Team
from chatserve.models.packing import FINE, FOUR_BITS, Packing


def _levels() -> list[object]:
    try:
        levels = library.levels_of(library.open_library(library.LIBRARY))
        library.choose_level(levels, None)
    except KernelsUnavailable as error:
        return [pytest.param("none", marks=pytest.mark.skip(reason=f"no kernels: {error}"))]
    return list(levels)


PACKINGS = {
    "8 bits": Packing(8, is_grouped=False),
    "8 bits grouped": Packing(8, is_grouped=True),
    "8 bits fine": FINE,
    "4 bits": Packing(4, is_grouped=True),
    "4 bits and minima": Packing(4, is_grouped=True, has_minima=True),
    "4 bits and zero points": FOUR_BITS,
}


@pytest.fixture(scope="package", params=_levels())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(library.open_library(library.LIBRARY), request.param)


@pytest.fixture(scope="package", params=PACKINGS)
def packing(request: pytest.FixtureRequest) -> Packing:
    return PACKINGS[request.param]


@pytest.fixture(scope="package")
def team(kernels: Kernels) -> Team:
    return Team(kernels, 2)
