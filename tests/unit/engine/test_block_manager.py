"""Blocks are held, shared, cached and given back; nothing is lost and nothing owned twice."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chatserve.engine.block_manager import BlockManager, BlockTable

SIZE = 4
NUM_BLOCKS = 12


def filled(blocks: BlockManager, token_ids: list[int], salt: bytes = b"") -> BlockTable:
    table = BlockTable(salt)
    assert blocks.can_allocate(table, token_ids)
    blocks.allocate(table, token_ids)
    blocks.publish(table, token_ids, len(token_ids))
    return table


def test_a_table_grows_in_one_piece_while_there_is_room() -> None:
    blocks = BlockManager(256, SIZE)
    first, second = filled(blocks, list(range(5))), filled(blocks, list(range(9, 12)))
    for end in range(6, 200):
        for table in (first, second):
            blocks.append(table, end - 1, end)
    for table in (first, second):
        start = table.block_ids[0]
        assert table.block_ids == list(range(start, start + 50))


def test_a_cached_beginning_is_found_until_its_place_is_wanted() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.free(filled(blocks, list(range(10))))
    assert blocks.num_free_blocks == 4
    table = BlockTable()
    assert blocks.allocate(table, [*range(8), 77, 78])[0] == 8
    blocks.free(table)
    blocks.free(filled(blocks, list(range(100, 116))))
    assert blocks.allocate(BlockTable(), list(range(9)))[0] == 0


def test_what_was_used_last_is_forgotten_last_and_the_end_before_the_beginning() -> None:
    blocks = BlockManager(6, SIZE)
    for start in (0, 100):
        blocks.free(filled(blocks, list(range(start, start + 12))))
    filled(blocks, list(range(200, 208)))  # takes two places
    assert len(blocks._find(BlockTable(), list(range(12)))) == 1
    assert len(blocks._find(BlockTable(), list(range(100, 112)))) == 3


def test_old_cached_blocks_are_reused_before_memory_is_touched() -> None:
    blocks = BlockManager(100, SIZE, num_warm_blocks=6)
    used: set[int] = set()
    for start in range(0, 1000, 100):  # two full blocks and a part of one
        table = filled(blocks, list(range(start, start + 2 * SIZE + 1)))
        used.update(table.block_ids)
        blocks.free(table)
    assert used == set(range(6))
    assert len(blocks._find(BlockTable(), list(range(900, 900 + 2 * SIZE)))) == 2
    # who needs more gets more
    tables = [filled(blocks, list(range(i, i + 2 * SIZE))) for i in range(0, 4000, 100)]
    assert len({id_ for table in tables for id_ in table.block_ids}) == 80


def test_the_same_tokens_after_others_are_not_the_same() -> None:
    blocks = BlockManager(9, SIZE)
    filled(blocks, [1, 1, 1, 1, 2, 2, 2, 2])
    assert blocks._find(BlockTable(), [2, 2, 2, 2]) == []
    assert blocks._find(BlockTable(), [3, 3, 3, 3, 2, 2, 2, 2]) == []


def test_a_hash_says_salt_and_all_tokens_so_far() -> None:
    blocks = BlockManager(9, SIZE)
    filled(blocks, [1, 2, 3, 2**40], b"key")
    root = hashlib.sha256(b"key").digest()
    tokens = b"".join(id_.to_bytes(8, "little") for id_ in (1, 2, 3, 2**40))
    assert list(blocks._cached) == [hashlib.sha256(root + tokens).digest()]
    assert blocks._find(BlockTable(b"other"), [1, 2, 3, 2**40]) == []


def test_free_can_forget_what_nobody_else_holds() -> None:
    blocks = BlockManager(9, SIZE)
    token_ids = list(range(12))
    table, other = filled(blocks, token_ids), BlockTable()
    blocks.allocate(other, token_ids[:9])
    blocks.free(table, forget=True)
    assert len(blocks._find(BlockTable(), token_ids)) == 2
    blocks.free(other, forget=True)
    assert blocks._find(BlockTable(), token_ids) == [] and len(blocks._free) == 9


def test_trim_gives_back_what_lies_behind() -> None:
    blocks = BlockManager(9, SIZE)
    table = filled(blocks, list(range(6)))
    blocks.append(table, 6, 17)
    assert blocks.num_free_blocks == 4
    blocks.trim(table, 8)
    assert (len(table.block_ids), blocks.num_free_blocks) == (2, 7)


class Blocks(RuleBasedStateMachine):
    """Any sequence of operations, beside a model of what each slot holds."""

    num_warm_blocks: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, SIZE, num_warm_blocks=self.num_warm_blocks)
        self.tables: list[tuple[BlockTable, list[int]]] = []
        # what the pool holds: per block the history that ends in each of its slots
        self.slots: list[list[tuple[object, ...]]] = [[()] * SIZE for _ in range(NUM_BLOCKS)]
        self.history_of: dict[bytes, tuple[object, ...]] = {}

    def write(self, table: BlockTable, token_ids: list[int], first: int) -> None:
        for position in range(first, len(token_ids)):
            history = (table.salt, *token_ids[: position + 1])
            block_id = table.block_ids[position // SIZE]
            self.slots[block_id][position % SIZE] = history
        self.blocks.publish(table, token_ids, len(token_ids))

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            self.slots[target] = list(self.slots[source])

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from("xy")
    )
    def allocate(self, token_ids: list[int], salt: str) -> None:
        table = BlockTable(salt.encode())
        if self.blocks.can_allocate(table, token_ids):
            num_cached, copies = self.blocks.allocate(table, token_ids)
            assert 0 <= num_cached < len(token_ids)
            self.copy(copies)
            self.write(table, token_ids, num_cached)
            self.tables.append((table, token_ids))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), num_tokens=st.integers(1, 6), num_kept=st.integers(0, 6))
    def append(self, data: st.DataObject, num_tokens: int, num_kept: int) -> None:
        """As after a draft: all slots are made, some of the tokens stay."""
        table, token_ids = data.draw(st.sampled_from(self.tables))
        first = len(token_ids)
        if self.blocks.can_append(table, first, first + num_tokens):
            self.copy(self.blocks.append(table, first, first + num_tokens))
            token_ids += [1] * min(num_kept, num_tokens)
            self.write(table, token_ids, first)
            self.blocks.trim(table, len(token_ids))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, token_ids = data.draw(st.sampled_from(self.tables))
        num_tokens = data.draw(st.integers(1, len(token_ids)))
        if self.blocks.num_free_blocks:
            child = BlockTable(parent.salt)
            self.blocks.fork(parent, child, num_tokens)
            self.copy(self.blocks.append(child, num_tokens - 1, num_tokens))
            self.write(child, token_ids[:num_tokens], num_tokens - 1)
            self.tables.append((child, token_ids[:num_tokens]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), forget=st.booleans())
    def free(self, data: st.DataObject, forget: bool) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.blocks.free(self.tables.pop(index)[0], forget=forget)

    @invariant()
    def every_block_is_free_or_held_as_often_as_counted(self) -> None:
        holders = Counter(id_ for table, _ in self.tables for id_ in table.block_ids)
        assert self.blocks.num_free_blocks + len(holders) == NUM_BLOCKS
        assert [holders[id_] for id_ in range(NUM_BLOCKS)] == self.blocks._num_holders
        assert not holders.keys() & (self.blocks._free.keys() | self.blocks._idle.keys())

    @invariant()
    def every_sequence_reads_its_own_history(self) -> None:
        for table, token_ids in self.tables:
            for position in range(len(token_ids)):
                slot = self.slots[table.block_ids[position // SIZE]][position % SIZE]
                assert slot == (table.salt, *token_ids[: position + 1])

    @invariant()
    def a_cached_hash_finds_the_tokens_it_was_made_of(self) -> None:
        for digest, block_id in self.blocks._cached.items():
            assert self.blocks._hash_of[block_id] == digest
            history = self.slots[block_id][-1]
            assert self.history_of.setdefault(digest, history) == history
        assert len(self.blocks._cached) == sum(
            digest is not None for digest in self.blocks._hash_of
        )

    def teardown(self) -> None:
        for table, _ in self.tables:
            self.blocks.free(table)
        assert self.blocks.num_free_blocks == NUM_BLOCKS


class BlocksKeptWarm(Blocks):
    num_warm_blocks = 4


TestBlocks = Blocks.TestCase
TestBlocksKeptWarm = BlocksKeptWarm.TestCase
TestBlocksKeptWarm.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
