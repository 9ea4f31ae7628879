"""The C interface refuses what does not fit, before it touches memory; each check is taken."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from chatserve.kernels import library
from chatserve.kernels.library import Ends, Kernels, Layer, Shape, Step

OK, BAD_ARGUMENT = 0, 1
INT_MAX = 2**31 - 1
SHAPE = {
    "hidden": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn": 96, "num_layers": 2,
    "vocab": 40, "max_rows": 16, "max_positions": 96, "eps": 1e-5,
}  # fmt: skip
ROWS = {"qkv": 128, "output": 32, "gate_up": 192, "down": 32, "head": 40}
COLUMNS = {"qkv": 32, "output": 64, "gate_up": 32, "down": 96, "head": 32}
NUM_BLOCKS = 8
STRIDE = 64  # 40 logits fill two panels

Change = Callable[["Parts"], None]


class Parts:
    """A small network through the bare C interface: every argument can be made wrong."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.c = kernels.functions
        self._frees: list[Callable[[], None]] = []
        self.team = self.own("team", self.c.cs_team_create(2))
        self.vector = np.ones(1024, np.float32)
        self.matrices = {name: self.matrix(ROWS[name], COLUMNS[name]) for name in ROWS}
        self.network = self.build_network()
        self.pool = self.own(
            "pool", self.c.cs_pool_create(ctypes.byref(Shape(**SHAPE)), NUM_BLOCKS)
        )
        self.tokens = np.arange(10, dtype=np.int32)
        self.positions = np.array([0, 1, 2, 30, 31, 32, 33, 34, 35, 95], np.int32)
        self.starts = np.array([0, 3, 9], np.int32)
        self.counts = np.array([3, 6, 1], np.int32)
        self.tables = [np.array(ids, np.int32) for ids in ([0], [1, 2], [5, 4, 7])]
        self.outputs = np.array([2, 8, 9], np.int32)
        self.logits = np.zeros((3, STRIDE), np.float32)
        self.addresses = np.array([table.ctypes.data for table in self.tables], np.uintp)
        self.step = Step(
            num_rows=10, num_segments=3, num_outputs=3, logits_stride=STRIDE,
            tokens=self.tokens.ctypes.data, positions=self.positions.ctypes.data,
            segment_starts=self.starts.ctypes.data, segment_rows=self.counts.ctypes.data,
            block_tables=self.addresses.ctypes.data, output_rows=self.outputs.ctypes.data,
            logits=self.logits.ctypes.data,
        )  # fmt: skip

    def own(self, kind: str, handle: int | None) -> int:
        assert handle
        self._frees.append(lambda: getattr(self.c, f"cs_{kind}_destroy")(handle))
        return handle

    def close(self) -> None:
        for free in reversed(self._frees):
            free()

    def matrix(self, rows: int, columns: int, kernels: Kernels | None = None) -> int:
        level = (kernels or self.kernels).level_name
        handle = self.own("matrix", self.c.cs_matrix_create(level, rows, columns, 8, 0, 1))
        values = np.full((rows, columns), 0.01, np.float32)
        status = self.c.cs_matrix_load(handle, self.team, 0, rows, values.ctypes.data, 0, 0)
        assert status == OK
        return handle

    def build_network(self, *, is_set: bool = True, **changes: Any) -> int:
        shape = Shape(**{**SHAPE, **changes})
        handle = self.own(
            "network",
            self.c.cs_network_create(ctypes.byref(shape), self.kernels.level_name, self.team),
        )
        if is_set:
            assert self.set_ends(handle) == OK
            for index in range(shape.num_layers):
                assert self.set_layer(handle, index) == OK
        return handle

    def set_layer(self, network: int, index: int, **changes: Any) -> int:
        address = self.vector.ctypes.data
        parts = {name: self.matrices[name] for name in ("qkv", "output", "gate_up", "down")}
        norms = {"attention_norm": address, "mlp_norm": address}
        layer = Layer(**{**parts, **norms, **changes})
        return int(self.c.cs_network_set_layer(network, index, ctypes.byref(layer)))

    def set_ends(self, network: int, **changes: Any) -> int:
        address = self.vector.ctypes.data
        values = {"head": self.matrices["head"], "norm": address, "cos": address, "sin": address}
        ends = Ends(**{**values, **changes})
        return int(self.c.cs_network_set_ends(network, ctypes.byref(ends)))

    def forward(self, network: int | None = None, pool: int | None = None) -> int:
        return int(
            self.c.cs_network_forward(
                network or self.network, pool or self.pool, ctypes.byref(self.step)
            )
        )


@pytest.fixture
def parts(kernels: Kernels) -> Iterator[Parts]:
    made = Parts(kernels)
    yield made
    made.close()


def test_the_arguments_that_the_other_tests_change_are_accepted(parts: Parts) -> None:
    assert parts.forward() == OK
    assert np.isfinite(parts.logits[:, :40]).all()
    parts.step.num_outputs, parts.step.logits, parts.step.logits_stride = 0, None, 0
    assert parts.forward() == OK


def test_the_version_and_the_levels_are_those_of_the_python_side(kernels: Kernels) -> None:
    assert kernels.functions.cs_version() == library.VERSION
    assert kernels.level in library.levels_of(kernels.functions)


# ---- matrices ----


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "scaling", "num_terms"),
    [
        (0, 32, 8, 0, 1), (-1, 32, 8, 0, 1), (INT_MAX, 32, 8, 0, 1),
        (32, 0, 8, 0, 1), (32, 31, 8, 0, 1), (32, 48, 8, 0, 1), (32, -32, 8, 0, 1),
        (32, 65568, 8, 0, 1), (32, 32, 7, 1, 1), (32, 32, 16, 0, 1), (32, 32, 0, 0, 1),
        (32, 32, 4, 0, 1), (32, 32, 8, 2, 1), (32, 32, 4, 4, 1), (32, 32, 8, 3, 1),
        (32, 32, 8, -1, 1),
        (32, 32, 8, 0, 0), (32, 32, 8, 0, 3), (32, 32, 8, 0, -1),
    ],
)  # fmt: skip
def test_a_matrix_of_a_size_that_there_is_not_is_refused(
    kernels: Kernels, rows: int, columns: int, bits: int, scaling: int, num_terms: int
) -> None:
    create = kernels.functions.cs_matrix_create
    assert not create(kernels.level_name, rows, columns, bits, scaling, num_terms)


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """128 GiB of addresses: some systems lend any amount until it is touched."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (128 << 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit of addresses")
@pytest.mark.usefixtures("limited_memory")
def test_a_matrix_that_does_not_fit_into_memory_is_refused(kernels: Kernels) -> None:
    assert not kernels.functions.cs_matrix_create(kernels.level_name, 1 << 24, 65536, 8, 0, 1)


def test_an_unknown_level_is_refused(parts: Parts) -> None:
    shape = ctypes.byref(Shape(**SHAPE))
    assert not parts.c.cs_matrix_create(b"sse2", 32, 32, 8, 0, 1)
    assert not parts.c.cs_network_create(shape, b"sse2", parts.team)


@pytest.mark.parametrize(
    ("start", "num_rows", "dtype", "row_map"),
    [
        (-1, 1, 0, 0), (0, 0, 0, 0), (0, -1, 0, 0), (0, 65, 0, 0), (64, 1, 0, 0), (60, 5, 0, 0),
        (INT_MAX, INT_MAX, 0, 0), (0, 1, 3, 0), (0, 1, -1, 0), (0, 1, 0, 3), (0, 1, 0, -1),
        (0, 33, 0, 1), (31, 2, 0, 2), (32, 1, 0, 1),
    ],
)  # fmt: skip
def test_rows_that_do_not_lie_in_the_matrix_are_refused(
    parts: Parts, start: int, num_rows: int, dtype: int, row_map: int
) -> None:
    matrix, rows = parts.matrix(64, 32), parts.vector.ctypes.data
    load = parts.c.cs_matrix_load
    assert load(matrix, parts.team, start, num_rows, rows, dtype, row_map) == BAD_ARGUMENT


def test_gate_and_up_need_whole_panels(parts: Parts) -> None:
    matrix, rows = parts.matrix(48, 32), parts.vector.ctypes.data
    assert parts.c.cs_matrix_load(matrix, parts.team, 0, 1, rows, 0, 1) == BAD_ARGUMENT


@pytest.mark.parametrize("row", [-1, 40, INT_MAX])
def test_a_row_outside_of_the_matrix_is_refused(parts: Parts, row: int) -> None:
    out = parts.vector.ctypes.data
    assert parts.c.cs_matrix_row(parts.matrices["head"], row, out) == BAD_ARGUMENT


@pytest.mark.parametrize("num_rows", [0, -1])
def test_a_product_of_no_rows_is_refused(parts: Parts, num_rows: int) -> None:
    x = parts.vector.ctypes.data
    multiply = parts.c.cs_matrix_multiply
    assert multiply(parts.matrices["head"], parts.team, x, num_rows, x) == BAD_ARGUMENT


# ---- networks and pools ----


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": 0}, {"hidden": 40}, {"hidden": -32}, {"hidden": 1 << 17},
        {"ffn": 0}, {"ffn": 33}, {"ffn": 1 << 17},
        {"num_heads": 0}, {"num_heads": -4}, {"num_heads": 3}, {"num_heads": 1 << 27},
        {"num_heads": 1 << 13},
        {"num_kv_heads": 0}, {"num_kv_heads": 3}, {"num_kv_heads": 8}, {"num_kv_heads": -2},
        {"head_dim": 0}, {"head_dim": 24}, {"head_dim": -16}, {"head_dim": 272},
        {"num_heads": 3, "num_kv_heads": 3},  # 48 columns
        {"num_layers": 0}, {"num_layers": INT_MAX},
        {"vocab": 0}, {"vocab": -1}, {"vocab": INT_MAX},
        {"max_rows": 0}, {"max_rows": INT_MAX},
        {"max_positions": 0}, {"max_positions": -1}, {"max_positions": INT_MAX},
    ],
    ids=str,
)  # fmt: skip
def test_a_network_of_a_shape_that_there_is_not_is_refused(
    parts: Parts, changes: dict[str, int]
) -> None:
    shape = ctypes.byref(Shape(**{**SHAPE, **changes}))
    assert not parts.c.cs_network_create(shape, parts.kernels.level_name, parts.team)
    assert not parts.c.cs_pool_create(shape, NUM_BLOCKS)


@pytest.mark.parametrize("num_blocks", [0, -1, INT_MAX])
def test_a_pool_of_no_or_too_many_blocks_is_refused(parts: Parts, num_blocks: int) -> None:
    assert not parts.c.cs_pool_create(ctypes.byref(Shape(**SHAPE)), num_blocks)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to the limit of addresses")
@pytest.mark.usefixtures("limited_memory")
def test_buffers_and_pools_that_do_not_fit_into_memory_are_refused(parts: Parts) -> None:
    large = {**SHAPE, "hidden": 65536, "num_heads": 256, "num_kv_heads": 256, "head_dim": 256}
    buffers = Shape(**{**large, "max_rows": 1 << 20})
    assert not parts.c.cs_network_create(
        ctypes.byref(buffers), parts.kernels.level_name, parts.team
    )
    layers = Shape(**{**large, "num_layers": 4096})
    assert not parts.c.cs_pool_create(ctypes.byref(layers), 1 << 24)


@pytest.mark.parametrize(("source", "target"), [(-1, 0), (0, -1), (8, 0), (0, 8)])
def test_a_block_outside_of_the_pool_is_not_copied(parts: Parts, source: int, target: int) -> None:
    assert parts.c.cs_pool_copy_block(parts.pool, source, target) == BAD_ARGUMENT


@pytest.mark.parametrize("index", [-1, 2, INT_MAX])
def test_a_layer_that_there_is_not_is_refused(parts: Parts, index: int) -> None:
    assert parts.set_layer(parts.network, index) == BAD_ARGUMENT


@pytest.mark.parametrize("name", ["qkv", "output", "gate_up", "down"])
def test_a_layers_matrix_of_another_size_or_none_is_refused(parts: Parts, name: str) -> None:
    rows, columns = ROWS[name], COLUMNS[name]
    assert parts.set_layer(parts.network, 0, **{name: None}) == BAD_ARGUMENT
    for size in ((rows + 32, columns), (rows, columns + 32)):
        changes = {name: parts.matrix(*size)}
        assert parts.set_layer(parts.network, 0, **changes) == BAD_ARGUMENT


@pytest.mark.parametrize(
    "changes", [{"attention_norm": None}, {"mlp_norm": None}, {"window": -1}], ids=str
)
def test_a_layer_without_norms_or_with_a_negative_window_is_refused(
    parts: Parts, changes: dict[str, Any]
) -> None:
    assert parts.set_layer(parts.network, 0, **changes) == BAD_ARGUMENT


def test_a_head_of_another_size_or_none_is_refused(parts: Parts) -> None:
    assert parts.set_ends(parts.network, head=None) == BAD_ARGUMENT
    for size in ((41, 32), (72, 32), (40, 64)):
        assert parts.set_ends(parts.network, head=parts.matrix(*size)) == BAD_ARGUMENT


@pytest.mark.parametrize("name", ["norm", "cos", "sin"])
def test_ends_without_a_part_are_refused(parts: Parts, name: str) -> None:
    assert parts.set_ends(parts.network, **{name: None}) == BAD_ARGUMENT


@pytest.mark.parametrize("dtype", [-1, 1, 3])
def test_an_embedding_of_another_dtype_is_refused(parts: Parts, dtype: int) -> None:
    changes = {"embedding": parts.vector.ctypes.data, "embedding_dtype": dtype}
    assert parts.set_ends(parts.network, **changes) == BAD_ARGUMENT


def test_matrices_packed_for_another_level_are_refused(parts: Parts) -> None:
    for level in library.levels_of(parts.c):
        if level != parts.kernels.level:
            other = Kernels(parts.c, level)
            head = parts.matrix(ROWS["head"], COLUMNS["head"], other)
            assert parts.set_ends(parts.network, head=head) == BAD_ARGUMENT
            down = parts.matrix(ROWS["down"], COLUMNS["down"], other)
            assert parts.set_layer(parts.network, 0, down=down) == BAD_ARGUMENT
    assert parts.forward() == OK


@pytest.mark.parametrize("num_threads", [0, -1, library.MAX_THREADS + 1])
def test_a_number_of_threads_that_no_team_has_is_refused(parts: Parts, num_threads: int) -> None:
    assert parts.c.cs_network_set_threads(parts.network, num_threads) == BAD_ARGUMENT
    assert parts.forward() == OK


def test_a_team_has_at_least_the_calling_thread(parts: Parts) -> None:
    x, y = parts.vector.ctypes.data, np.zeros(1024, np.float32)
    for num_threads in (-5, 0, 10**6):
        team = parts.own("team", parts.c.cs_team_create(num_threads))
        status = parts.c.cs_matrix_multiply(parts.matrices["head"], team, x, 1, y.ctypes.data)
        assert status == OK


# ---- steps ----


def test_a_network_that_is_not_complete_computes_nothing(parts: Parts) -> None:
    empty = parts.build_network(is_set=False)
    assert parts.forward(empty) == BAD_ARGUMENT
    assert parts.set_ends(empty) == OK
    assert parts.forward(empty) == BAD_ARGUMENT
    assert parts.set_layer(empty, 1) == OK
    assert parts.forward(empty) == BAD_ARGUMENT
    assert parts.set_layer(empty, 0) == OK
    assert parts.forward(empty) == OK


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {"num_kv_heads": 4}], ids=str)
def test_a_pool_of_another_network_is_refused(parts: Parts, changes: dict[str, int]) -> None:
    shape = ctypes.byref(Shape(**{**SHAPE, **changes}))
    pool = parts.own("pool", parts.c.cs_pool_create(shape, NUM_BLOCKS))
    assert parts.forward(pool=pool) == BAD_ARGUMENT


def set_field(name: str, value: Any) -> Change:
    return lambda parts: setattr(parts.step, name, value)


def set_item(array: str, index: int, value: int) -> Change:
    def change(parts: Parts) -> None:
        getattr(parts, array)[index] = value

    return change


def set_block(segment: int, index: int, value: int) -> Change:
    def change(parts: Parts) -> None:
        parts.tables[segment][index] = value

    return change


BAD_STEPS: dict[str, Change] = {
    "no rows": set_field("num_rows", 0),
    "negative rows": set_field("num_rows", -1),
    "more rows than there is room": set_field("num_rows", 17),
    "fewer rows than the segments": set_field("num_rows", 9),
    "more rows than the segments": set_field("num_rows", 11),
    "no segments": set_field("num_segments", 0),
    "negative segments": set_field("num_segments", -1),
    "more segments than rows": set_field("num_segments", 11),
    "rows of no segment": set_field("num_segments", 2),
    "negative outputs": set_field("num_outputs", -1),
    "more outputs than rows": set_field("num_outputs", 11),
    "nowhere to put logits": set_field("logits", None),
    "logits that overlap": set_field("logits_stride", 40),
    "logits without room for whole panels": set_field("logits_stride", 63),
    "negative token": set_item("tokens", 4, -1),
    "token beyond the vocabulary": set_item("tokens", 9, 40),
    "first position negative": set_item("positions", 0, -1),
    "positions not consecutive": set_item("positions", 5, 33),
    "positions going back": set_item("positions", 1, 0),
    "first position beyond the last": set_item("positions", 9, 96),
    "far position": set_item("positions", 9, INT_MAX),
    "segment start with a gap": set_item("starts", 1, 4),
    "segment start that overlaps": set_item("starts", 1, 2),
    "first segment not at the start": set_item("starts", 0, 1),
    "empty segment": set_item("counts", 1, 0),
    "negative segment": set_item("counts", 1, -1),
    "segment longer than the batch": set_item("counts", 1, 8),
    "huge segment": set_item("counts", 1, INT_MAX),
    "negative block": set_block(1, 1, -1),
    "block beyond the pool": set_block(2, 2, 8),
    "block of the past beyond the pool": set_block(2, 0, INT_MAX),
    "negative output row": set_item("outputs", 0, -1),
    "output row beyond the batch": set_item("outputs", 2, 10),
}


def walk_out(parts: Parts) -> None:
    """A segment that starts inside of the context and ends outside."""
    parts.positions[3:9] = range(91, 97)
    parts.tables[1] = np.array([1, 2, 3, 4], np.int32)
    parts.addresses[1] = parts.tables[1].ctypes.data


BAD_STEPS["a segment that leaves the context"] = walk_out


@pytest.mark.parametrize("change", BAD_STEPS.values(), ids=BAD_STEPS)
def test_a_step_that_points_outside_is_refused(parts: Parts, change: Change) -> None:
    change(parts)
    parts.logits[:] = 7
    assert parts.forward() == BAD_ARGUMENT
    assert (parts.logits == 7).all()


def test_nothing_is_written_outside_of_the_logits(parts: Parts) -> None:
    room = np.full(3 * STRIDE + 64, 7, np.float32)
    parts.step.logits = room[32:].ctypes.data
    assert parts.forward() == OK
    assert (room[:32] == 7).all() and (room[32 + 3 * STRIDE :] == 7).all()
    assert (room[32:] != 7).any()
