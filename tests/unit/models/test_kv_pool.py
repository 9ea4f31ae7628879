"""Keys and values in blocks: stored where a table says, read back in order."""

from __future__ import annotations

import pytest
import torch

from chatserve.errors import OutOfMemory
from chatserve.models.batch import Segment
from chatserve.models.kv_pool import TorchKVPool

CPU = torch.device("cpu")
SIZE = 4


def rows(*tokens: int, width: int = 3) -> torch.Tensor:
    """(T, 2, width): every value says which token it belongs to."""
    return torch.tensor(tokens).float()[:, None, None].expand(-1, 2, width)


def stored(pool: TorchKVPool, segments: list[Segment], tokens: list[int]) -> list[list[int]]:
    """Store a batch in two layers; returns what each segment reads back."""
    placement = pool.place(segments)
    for layer in range(2):
        pool.store(layer, placement, rows(*tokens), -rows(*tokens, width=5))
    found = []
    for span in placement.spans:
        keys, values = pool.read(1, span)
        assert keys.shape == (2, span.num_total, 3) and values.shape == (2, span.num_total, 5)
        assert torch.equal(keys[..., 0], -values[..., 0])
        found.append(keys[0, :, 0].int().tolist())
    return found


@pytest.mark.parametrize("block_ids", [(2, 3, 4), (4, 0, 3), (5, 1, 2)])
def test_a_sequence_reads_what_it_has_stored_whatever_its_blocks(
    block_ids: tuple[int, ...],
) -> None:
    pool = TorchKVPool(6, SIZE, CPU)
    total = 0
    for num_tokens in (3, 1, 1, 6, 1):
        segment = Segment(0, num_tokens, total, block_ids)
        new = list(range(total, total + num_tokens))
        total += num_tokens
        assert stored(pool, [segment], new) == [list(range(total))]


def test_the_sequences_of_a_batch_do_not_touch_each_other() -> None:
    pool = TorchKVPool(6, SIZE, CPU)
    tables = ((1, 2), (5, 0), (3, 4))
    first = [Segment(3 * index, 3, 0, table) for index, table in enumerate(tables)]
    stored(pool, first, [*range(3), *range(10, 13), *range(20, 23)])
    second = [Segment(0, 1, 3, tables[2]), Segment(1, 3, 3, tables[0]), Segment(4, 2, 3, tables[1])]
    assert stored(pool, second, [23, 3, 4, 5, 13, 14]) == [
        [20, 21, 22, 23], [0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14],
    ]  # fmt: skip


def test_consecutive_blocks_are_read_without_a_copy() -> None:
    pool = TorchKVPool(6, SIZE, CPU)
    [span] = (placement := pool.place([Segment(0, 7, 0, (3, 4))])).spans
    pool.store(0, placement, rows(*range(7)), rows(*range(7)))
    keys, _ = pool.read(0, span)
    assert keys.data_ptr() == pool.layer(0)[0][3].data_ptr()


def test_a_copied_block_is_the_same_in_all_layers_and_another_afterwards() -> None:
    pool = TorchKVPool(6, SIZE, CPU)
    stored(pool, [Segment(0, 6, 0, (0, 1))], list(range(6)))
    pool.copy_block(1, 5)
    assert stored(pool, [Segment(0, 1, 6, (0, 5))], [16]) == [[0, 1, 2, 3, 4, 5, 16]]
    assert stored(pool, [Segment(0, 1, 6, (0, 1))], [6]) == [[0, 1, 2, 3, 4, 5, 6]]
    assert pool.layer(0)[0][5][:3].equal(pool.layer(1)[0][5][:3])


def test_a_table_may_be_longer_than_what_is_used() -> None:
    pool = TorchKVPool(6, SIZE, CPU)
    assert stored(pool, [Segment(0, 2, 0, (1, 2, 5))], [7, 8]) == [[7, 8]]


def test_a_pool_that_does_not_fit_is_said_with_its_size() -> None:
    class Full:
        device = CPU
        shape = (5, 2, 3)

        def new_empty(self, *shape: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pool = TorchKVPool(500, SIZE, CPU)
    placement = pool.place([Segment(0, 5, 0, (0, 1))])
    with pytest.raises(OutOfMemory, match="no memory for 2,000 tokens of context on cpu"):
        pool.store(0, placement, Full(), Full())  # type: ignore[arg-type]
