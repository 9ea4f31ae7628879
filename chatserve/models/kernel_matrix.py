"""Packed matrices and plain vectors in the form that the CPU kernels read. No network, no policy.

Each owns its memory and fills itself from checkpoint rows; the kernels only point into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from chatserve.errors import DoesNotFit
from chatserve.kernels import library
from chatserve.kernels.library import Kernels
from chatserve.models.kernel_limits import padded
from chatserve.models.packing import Packing

DTYPES = {
    torch.float32: library.FLOAT32,
    torch.float16: library.FLOAT16,
    torch.bfloat16: library.BFLOAT16,
}


_own = threading.local()


class Team:
    """Threads that run one job together; one caller at a time."""

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        self.handle: int = kernels.functions.cs_team_create(num_threads)
        library.destroy_with(self, kernels.functions.cs_team_destroy, self.handle)


class KernelMatrix:
    """A packed matrix (rows, columns), filled by checkpoint rows of any float dtype."""

    def __init__(
        self, kernels: Kernels, team: Team, rows: int, columns: int, packing: Packing
    ) -> None:
        self._functions = kernels.functions
        self.team = team
        self._kernels = kernels
        self.shape = (rows, columns)
        handle = self._functions.cs_matrix_create(
            kernels.level_name, rows, columns, packing.bits,
            packing.is_grouped + packing.has_minima + (packing.scale_bits == 8),
            packing.activation_bits // 8,
        )  # fmt: skip
        if not handle:
            raise DoesNotFit(f"no memory for a packed matrix of {rows:,} x {columns:,} weights")
        self.handle: int = handle
        library.destroy_with(self, self._functions.cs_matrix_destroy, handle)

    @property
    def num_bytes(self) -> int:
        return int(self._functions.cs_matrix_bytes(self.handle))

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        self.load_mapped(start, rows, library.PLAIN, self.team)

    def load_apart(self, start: int, rows: torch.Tensor) -> None:
        self.load_mapped(start, rows, library.PLAIN, self.alone)

    @property
    def alone(self) -> Team:
        """A team of the calling thread alone, and its own: other threads have others."""
        teams: dict[object, Team] | None = getattr(_own, "teams", None)
        if teams is None:
            teams = _own.teams = {}
        if self._functions not in teams:
            teams[self._functions] = Team(self._kernels, 1)
        return teams[self._functions]

    def load_mapped(self, start: int, rows: torch.Tensor, row_map: int, team: Team) -> None:
        """Pack `rows` (n, columns) on the CPU, spread over panels by `row_map`."""
        if rows.dtype not in DTYPES:
            rows = rows.float()
        rows = rows.contiguous()
        check(
            self._functions.cs_matrix_load(
                self.handle, team.handle, start, rows.shape[0], rows.data_ptr(),
                DTYPES[rows.dtype], row_map,
            )
        )  # fmt: skip

    def row(self, index: int) -> torch.Tensor:
        """One row (columns,) float32 as the kernels see it."""
        out = torch.empty(self.shape[1])
        check(self._functions.cs_matrix_row(self.handle, index, out.data_ptr()))
        return out

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, columns) float32 times the transpose -> (M, rows); for tests and hybrids."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], padded(self.shape[0]))
        check(
            self._functions.cs_matrix_multiply(
                self.handle, self.team.handle, x.data_ptr(), x.shape[0], out.data_ptr()
            )
        )
        return out[:, : self.shape[0]]


class GateUpRows:
    """Gate and up share panels, 16 rows each, so that SwiGLU happens in registers."""

    def __init__(self, matrix: KernelMatrix) -> None:
        self._matrix = matrix
        self._half = matrix.shape[0] // 2

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        self._load(start, rows, self._matrix.team)

    def load_apart(self, start: int, rows: torch.Tensor) -> None:
        self._load(start, rows, self._matrix.alone)

    def _load(self, start: int, rows: torch.Tensor, team: Team) -> None:
        is_gate = start < self._half
        row_map = library.GATE if is_gate else library.UP
        self._matrix.load_mapped(start if is_gate else start - self._half, rows, row_map, team)


class Vector:
    """A float32 vector with room for whole panels; `order` says where each loaded value goes."""

    def __init__(self, size: int, order: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.values = torch.zeros(padded(size))
        self._order = order

    @property
    def address(self) -> int:
        return self.values.data_ptr()

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        places = torch.arange(start, start + rows.shape[0])
        if self._order is not None:
            places = self._order(places)
        self.values[places] = rows.float()


class Table:
    """An untied embedding (rows, columns) in float32 or bfloat16, only ever looked up."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self.values = torch.empty(rows, columns, dtype=dtype)

    def load_rows(self, start: int, rows: torch.Tensor) -> None:
        self.values[start : start + rows.shape[0]].copy_(rows)

    def rows(self, start: int, count: int) -> torch.Tensor:
        return self.values[start : start + count]


def interleaved(half: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Where the rows of gate (0..half) and up (half..) lie in panels of 16 and 16."""

    def order(places: torch.Tensor) -> torch.Tensor:
        row, is_up = places % half, places // half
        return row // 16 * 32 + row % 16 + 16 * is_up

    return order


def check(status: int) -> None:
    """A refusal is a bug here, never user input; a lack of memory is not."""
    if status == 2:
        raise DoesNotFit("no memory for the kernels' buffers")
    if status:
        raise RuntimeError(f"the kernels refused their arguments (status {status})")
