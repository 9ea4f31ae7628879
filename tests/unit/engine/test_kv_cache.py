"""Buffers that grow with a sequence, within what it reserved."""

from __future__ import annotations

import pytest
import torch

from chatserve.engine.kv_cache import KVCache, SequenceKV
from chatserve.errors import OutOfMemory


def rows(num_tokens: int, start: int = 0) -> torch.Tensor:
    """(2, T, 3): every value says which token it belongs to."""
    return torch.arange(start, start + num_tokens).float()[None, :, None].expand(2, -1, 3)


def test_appended_rows_stay_in_order_while_the_buffer_grows() -> None:
    cache = SequenceKV(1000)
    total = 0
    for num_tokens in (1, 100, 27, 1, 300, 571):
        keys, values = cache.append(0, rows(num_tokens, total), -rows(num_tokens, total))
        total += num_tokens
        assert torch.equal(keys, rows(total)) and torch.equal(values, -rows(total))


def test_growth_copies_rarely() -> None:
    cache = SequenceKV(5000)
    addresses = {cache.append(0, rows(1, index), rows(1, index))[0].data_ptr()
                 for index in range(5000)}  # fmt: skip
    assert len(addresses) <= 8


def test_truncate_forgets_the_newest_in_every_layer() -> None:
    cache = SequenceKV(10)
    cache.append(0, rows(5), rows(5))
    cache.append(1, rows(3), rows(3))
    cache.truncate(3)
    keys, _ = cache.append(0, rows(1, 3), rows(1, 3))
    assert torch.equal(keys, rows(4))
    assert cache.append(1, rows(1, 3), rows(1, 3))[0].shape[1] == 4


def test_memory_that_runs_out_is_said_with_the_size() -> None:
    class Full:
        device = torch.device("cpu")
        shape = (2, 5, 3)

        def new_empty(self, *shape: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="no memory for 128 tokens of context on cpu"):
        SequenceKV(1000).append(0, Full(), Full())  # type: ignore[arg-type]


def test_reservations_come_back() -> None:
    cache = KVCache(10)
    cache.allocate("a", 6)
    assert not cache.can_allocate(5) and cache.can_allocate(4)
    cache.free("a")
    cache.free("a")
    assert cache.num_free_tokens == 10
