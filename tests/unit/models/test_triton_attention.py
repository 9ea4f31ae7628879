"""Paged attention kernels against the plain attention of one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from tests.unit.models.triton_device import DEVICE, is_close

# isort: split

from chatserve.models.attention import attend
from chatserve.models.triton.attention_decode import attend_rows, num_splits_for
from chatserve.models.triton.attention_prefill import QUERY_TILE, Run, attend_runs, tiles_of

BLOCK_SIZE = 32


class PagedCase:
    """Random keys and values of sequences, whole and scattered over blocks in random order."""

    def __init__(
        self,
        lengths: list[int],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
        self.num_heads, self.dtype = num_heads, dtype
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        num_blocks = sum(counts) + 2
        order = torch.randperm(num_blocks, generator=generator).int()
        # what no sequence owns is NaN, so that reading it shows
        shape = (2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        self.pool = torch.full(shape, torch.nan, dtype=dtype)
        self.tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
        self.sequences: list[torch.Tensor] = []
        start = 0
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            blocks = order[start : start + count]
            self.tables[row, :count] = blocks
            start += count
            sequence = torch.randn(2, length, num_kv_heads, head_dim, generator=generator)
            sequence = sequence.to(dtype)
            self.sequences.append(sequence)
            for token in range(length):
                block = blocks[token // BLOCK_SIZE]
                self.pool[:, block, token % BLOCK_SIZE] = sequence[:, token]
        self.generator = generator

    def queries(self, num_rows: int, head_dim: int) -> torch.Tensor:
        """Rows of a wider buffer, as the fused q, k, v rows are."""
        buffer = torch.randn(num_rows, self.num_heads + 2, head_dim, generator=self.generator)
        return buffer.to(self.dtype)[:, : self.num_heads]

    @property
    def device_pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.pool.to(DEVICE)
        return keys, values

    def expected(
        self, queries: torch.Tensor, sequence: int, num_tokens: int, window: int | None
    ) -> torch.Tensor:
        """queries: (T, H, D), the newest of the first `num_tokens` tokens. Returns (T, H * D)."""
        keys, values = self.sequences[sequence][:, :num_tokens].float().transpose(1, 2)
        mixed = attend(
            queries.float().transpose(0, 1), keys, values, backend="plain", window=window
        )
        return mixed.transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "window", "num_splits"), [
    (4, 4, 64, torch.float16, None, 1),
    (4, 2, 64, torch.bfloat16, None, 4),
    (6, 2, 48, torch.float32, None, 2),
    (8, 1, 128, torch.float16, 40, 4),
    (3, 3, 16, torch.float32, 33, 1),
])  # fmt: skip
def test_decode_rows_match_plain_attention(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None,
    num_splits: int,
) -> None:  # fmt: skip
    lengths = [1, 32, 33, 64, 131, 200]
    case = PagedCase(
        lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    # the last sequence has three rows, as when drafted tokens are verified
    table_rows = [0, 1, 2, 3, 4, 5, 5, 5]
    row_lengths = [1, 32, 33, 64, 131, 198, 199, 200]
    queries = case.queries(len(table_rows), head_dim)
    mixed = attend_rows(
        queries.to(DEVICE),
        case.device_pool,
        case.tables.to(DEVICE),
        torch.tensor(table_rows, dtype=torch.int32, device=DEVICE),
        torch.tensor(row_lengths, dtype=torch.int32, device=DEVICE),
        num_splits=num_splits,
        window=window,
    )
    for row, (sequence, length) in enumerate(zip(table_rows, row_lengths, strict=True)):
        expected = case.expected(queries[row : row + 1], sequence, length, window)
        assert is_close(mixed[row : row + 1], expected), (row, length)


def test_a_row_is_the_same_beside_other_rows() -> None:
    case = PagedCase([70, 200], num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float16)
    queries = case.queries(2, 32).to(DEVICE)
    lengths = torch.tensor([70, 200], dtype=torch.int32, device=DEVICE)
    rows = torch.arange(2, dtype=torch.int32, device=DEVICE)
    tables = case.tables.to(DEVICE)
    both = attend_rows(queries, case.device_pool, tables, rows, lengths, num_splits=2)
    alone = attend_rows(queries[1:], case.device_pool, tables, rows[1:], lengths[1:], num_splits=2)
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize(("num_rows", "kv_heads", "max_tokens", "expected"), [
    (1, 32, 4096, 16), (8, 32, 4096, 2), (64, 32, 4096, 1), (1, 1, 64, 1), (1, 4, 200, 4),
])  # fmt: skip
def test_few_rows_are_split_more(
    num_rows: int, kv_heads: int, max_tokens: int, expected: int
) -> None:
    assert num_splits_for(num_rows, kv_heads, max_tokens) == expected


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "dtype", "window"), [
    (2, 2, 64, torch.float16, None),
    (4, 2, 48, torch.bfloat16, None),
    (2, 1, 32, torch.float32, 50),
    (4, 1, 128, torch.float16, 3),
])  # fmt: skip
def test_prefill_chunks_match_plain_attention(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None
) -> None:
    lengths = [70, 131, 33]
    case = PagedCase(
        lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    # whole, a chunk after 31 tokens of past, and a single row; row 0 of the batch is not theirs
    runs = [Run(1, 70, 0, 0), Run(71, 100, 31, 1), Run(171, 1, 32, 2)]
    queries = case.queries(172, head_dim)
    out = torch.full((172, heads * head_dim), 7, dtype=dtype, device=DEVICE)
    tiles = torch.tensor(tiles_of(runs), dtype=torch.int32, device=DEVICE)
    attend_runs(
        queries.to(DEVICE), case.device_pool, case.tables.to(DEVICE), tiles, out, window=window
    )
    assert (out[0] == 7).all()
    for run in runs:
        rows = slice(run.start, run.start + run.num_tokens)
        expected = case.expected(
            queries[rows], run.table_row, run.num_past + run.num_tokens, window
        )
        assert is_close(out[rows], expected), run


def test_tiles_cover_each_row_once() -> None:
    runs = [Run(3, 2 * QUERY_TILE + 1, 10, 0), Run(3 + 2 * QUERY_TILE + 1, 1, 0, 4)]
    assert tiles_of(runs) == [
        (3, QUERY_TILE, 10, 0),
        (3 + QUERY_TILE, QUERY_TILE, 10 + QUERY_TILE, 0),
        (3 + 2 * QUERY_TILE, 1, 10 + 2 * QUERY_TILE, 0),
        (4 + 2 * QUERY_TILE, 1, 0, 4),
    ]
