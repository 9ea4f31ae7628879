"""Which blocks of the KV pool hold whose tokens: free list, block tables, prefix cache. No tensors.

A full block whose tokens are computed can be found by a hash of them and of all before them, and
serves every sequence that begins alike. It is never written again: who has to, gets a copy. Blocks
that nobody holds stay in the cache until their place is wanted, the least recently used first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

BLOCK_SIZE = 32

Copy = tuple[int, int]
"""(source, target): to be copied, in order, before anything is written."""

# Sequences begin so many blocks apart while there is room: their tables can grow in one piece.
_SPREAD = 64


@dataclass(eq=False)
class BlockTable:
    """One sequence's blocks in order. `salt` keeps its cached blocks apart from other salts'.

    `reads_cache` is false for who wants all of its tokens computed, and not only their keys and
    values. `num_shared`: only so many of its tokens may come from the cache or go to it, and the
    block with the last of them never comes from it; None: all. `hashes` are of its tokens' full
    blocks, each chained to the one before; `num_published` of them have been offered to the cache.
    """

    salt: bytes = b""
    reads_cache: bool = True
    num_shared: int | None = None
    block_ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0


class BlockManager:
    """Hands out the blocks 0 … `num_blocks` - 1. Questions and deeds come in pairs."""

    def __init__(
        self, num_blocks: int, block_size: int = BLOCK_SIZE, *, num_warm_blocks: int | None = None
    ) -> None:
        """`num_warm_blocks`: a block costs memory from its first use on, so when so many have been
        used, the cache gives up its oldest before an unused one is taken. None: all blocks cost
        alike, and a table that lies in one piece is preferred.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_warm = num_warm_blocks
        spread = _SPREAD if num_warm_blocks is None else 1
        order = sorted(range(num_blocks), key=lambda id_: (id_ % spread, id_), reverse=True)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(order)
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the cache, held by nobody
        self._num_holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks  # of blocks in the cache
        self._cached: dict[bytes, int] = {}
        self._highest = -1  # block that was ever used, where they are taken in order

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, whether the cache remembers them or not."""
        return len(self._free) + len(self._idle)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, table: BlockTable, token_ids: Rows[int], num_spare: int = 0) -> bool:
        """Whether `allocate` would find its blocks and leave `num_spare` free."""
        cached = self._find(table, token_ids)
        num_needed = self.num_blocks_for(len(token_ids)) - len(cached)
        if len(cached) * self.block_size == len(token_ids):
            num_needed += 1  # the last token is computed again, in a copy of its block
        num_woken = sum(not self._num_holders[block_id] for block_id in cached)
        return num_needed + num_woken + num_spare <= self.num_free_blocks

    def allocate(self, table: BlockTable, token_ids: Rows[int]) -> tuple[int, list[Copy]]:
        """Give an empty table blocks for `token_ids`, cached ones first. Asked `can_allocate`?

        Returns how many tokens need no computing, never all of them, and what to copy.
        """
        assert not table.block_ids
        for block_id in self._find(table, token_ids):
            self._hold(block_id)
            table.block_ids.append(block_id)
        table.num_published = len(table.block_ids)
        num_cached = min(len(table.block_ids) * self.block_size, len(token_ids) - 1)
        return num_cached, self.append(table, num_cached, len(token_ids))

    def can_append(self, table: BlockTable, first: int, end: int) -> bool:
        """Whether `append` would find its blocks."""
        num_needed = self.num_blocks_for(end) - len(table.block_ids)
        num_needed += self._must_copy(table, first // self.block_size)
        return num_needed <= self.num_free_blocks

    def append(self, table: BlockTable, first: int, end: int) -> list[Copy]:
        """Make the slots of tokens `first` … `end` - 1 writable. Asked `can_append`?

        Returns what to copy: the block of `first`, where others may read it.
        """
        ids, index = table.block_ids, first // self.block_size
        copies: list[Copy] = []
        if self._must_copy(table, index):
            source = ids[index]
            ids[index] = self._take(ids[index - 1] if index else None)
            copies.append((source, ids[index]))
            self._release(source)
        while len(ids) * self.block_size < end:
            ids.append(self._take(ids[-1] if ids else None))
        return copies

    def fork(self, parent: BlockTable, child: BlockTable, num_tokens: int) -> None:
        """Let an empty table share the blocks of the parent's first `num_tokens` tokens."""
        assert not child.block_ids
        child.block_ids = parent.block_ids[: self.num_blocks_for(num_tokens)]
        for block_id in child.block_ids:
            self._hold(block_id)

    def trim(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks behind the first `num_tokens` tokens."""
        while len(table.block_ids) > self.num_blocks_for(num_tokens):
            self._release(table.block_ids.pop())

    def publish(self, table: BlockTable, token_ids: Rows[int], num_computed: int) -> None:
        """Offer the full blocks among the first `num_computed` tokens to the cache."""
        shared = num_computed if table.num_shared is None else min(num_computed, table.num_shared)
        num_full = shared // self.block_size
        if num_full <= table.num_published:
            return
        self._extend_hashes(table, token_ids, num_full)
        for index in range(table.num_published, num_full):
            block_id, digest = table.block_ids[index], table.hashes[index]
            if digest not in self._cached and self._hash_of[block_id] is None:
                self._cached[digest] = block_id
                self._hash_of[block_id] = digest
        table.num_published = num_full

    def free(self, table: BlockTable, *, forget: bool = False) -> None:
        """Give back all blocks. `forget`: what nobody else holds leaves the cache, too."""
        # from the end, so that a cached beginning outlives what follows it
        for block_id in reversed(table.block_ids):
            self._release(block_id)
            if forget and block_id in self._idle:
                del self._idle[block_id]
                self._unpublish(block_id)
                self._free[block_id] = None
        table.block_ids = []
        table.num_published = 0

    def _find(self, table: BlockTable, token_ids: Rows[int]) -> list[int]:
        """The cached blocks that hold the beginning of `token_ids`."""
        if not table.reads_cache:
            return []
        self._extend_hashes(table, token_ids, len(token_ids) // self.block_size)
        hashes = table.hashes
        if table.num_shared is not None:
            hashes = hashes[: max(0, table.num_shared - 1) // self.block_size]
        found: list[int] = []
        for digest in hashes:
            block_id = self._cached.get(digest)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def _extend_hashes(self, table: BlockTable, token_ids: Rows[int], num_full: int) -> None:
        hashes = table.hashes
        while len(hashes) < num_full:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else hashlib.sha256(table.salt).digest()
            tokens = array("q", token_ids[start : start + self.block_size]).tobytes()
            hashes.append(hashlib.sha256(parent + tokens).digest())

    def _must_copy(self, table: BlockTable, index: int) -> bool:
        if index >= len(table.block_ids):
            return False
        block_id = table.block_ids[index]
        return self._num_holders[block_id] > 1 or self._hash_of[block_id] is not None

    def _hold(self, block_id: int) -> None:
        self._num_holders[block_id] += 1
        self._idle.pop(block_id, None)

    def _release(self, block_id: int) -> None:
        self._num_holders[block_id] -= 1
        if not self._num_holders[block_id]:
            is_cached = self._hash_of[block_id] is not None
            (self._idle if is_cached else self._free)[block_id] = None

    def _take(self, previous: int | None) -> int:
        """A block for one holder: the one behind `previous` if it is free, else any."""
        if self._num_warm is None and previous is not None and previous + 1 in self._free:
            block_id = previous + 1
            del self._free[block_id]
        elif self._free and not self._prefers_idle():
            block_id, _ = self._free.popitem()
            self._highest = max(self._highest, block_id)
        else:
            block_id, _ = self._idle.popitem(last=False)
            self._unpublish(block_id)
        self._num_holders[block_id] = 1
        return block_id

    def _prefers_idle(self) -> bool:
        """Whether the next free block was never used, and enough have been."""
        is_unused = next(reversed(self._free)) > self._highest
        return bool(
            self._num_warm is not None
            and self._idle
            and is_unused
            and self._highest + 1 >= self._num_warm
        )

    def _unpublish(self, block_id: int) -> None:
        digest = self._hash_of[block_id]
        assert digest is not None
        del self._cached[digest]
        self._hash_of[block_id] = None
