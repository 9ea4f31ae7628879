"""A row's logits are the same bits whatever comes with it: batch, chunks, blocks, threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserve.kernels.library import Kernels
from chatserve.models.llama_kernels import KernelKVPool, KernelLlama
from chatserve.models.packing import Packing
from tests.unit.kernels.networks import (
    BLOCK_SIZE,
    Prompt,
    build,
    config,
    load,
    pool_of,
    prompt,
    random_state,
    step,
    whole,
)

SHAPES: dict[str, dict[str, Any]] = {
    "groups of 3": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 32, "hidden_size": 96},
    "groups of 7, a window": {
        "num_heads": 14, "num_kv_heads": 2, "sliding_windows": (None, 21), "has_qk_norm": True,
    },
}  # fmt: skip
NAN_TOKEN = 0
NUM_BLOCKS = 12
PROMPTS = [prompt(length, length) for length in (97, 40, 5)]


@dataclass(frozen=True)
class Subject:
    """A network in whose vocabulary one token is not a number; its logits of the prompts."""

    network: KernelLlama
    pool: KernelKVPool
    one_by_one: list[torch.Tensor]

    def spoil(self) -> None:
        """Fill every block with keys and values of another sequence that are NaN."""
        stale = Prompt([NAN_TOKEN] * BLOCK_SIZE * NUM_BLOCKS, range(NUM_BLOCKS))
        for _ in range(3):
            logits = step(self.network, self.pool, [(stale, 128)])[0]
            assert logits.isnan().all()


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def subject(kernels: Kernels, packing: Packing, request: pytest.FixtureRequest) -> Subject:
    network = build(kernels, packing, config(**request.param))
    state = random_state(network)
    state["model.embed_tokens.weight"][NAN_TOKEN] = float("nan")
    load(network, state)
    pool = pool_of(network, NUM_BLOCKS)

    def feed(ids: list[int]) -> torch.Tensor:
        sequence = Prompt(ids, range(4))
        return torch.cat([step(network, pool, [(sequence, 1)])[0] for _ in ids])

    return Subject(network, pool, [feed(ids) for ids in PROMPTS])


def counts(data: st.DataObject, sequences: list[Prompt]) -> list[tuple[Prompt, int]]:
    """How many tokens of which sequences the next step takes; at least one."""
    waiting = [s for s in sequences if s.num_past < len(s.token_ids)]
    chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique_by=id))
    return [
        (s, data.draw(st.sampled_from((1, 2, 3, 7, 16, 31, 64)) | st.integers(1, 97)))
        for s in chosen
    ]


@torch.no_grad()
@settings(max_examples=8)
@given(st.data(), st.integers(1, 3), st.permutations(range(NUM_BLOCKS)), st.booleans())
def test_logits_are_the_same_bits_in_any_batch_and_any_chunks(
    subject: Subject, data: st.DataObject, num_threads: int, block_ids: list[int], fetch: bool
) -> None:
    subject.network.set_num_threads(num_threads)
    subject.network.set_prefetch(8192 if fetch else 0)
    subject.spoil()
    tables = (block_ids[:4], block_ids[4:6], block_ids[6:7])
    sequences = [Prompt(ids, table) for ids, table in zip(PROMPTS, tables, strict=True)]
    others = Prompt([NAN_TOKEN] * 64, block_ids[7:9])  # is always worth NaN, and stays alone
    rows: dict[int, list[torch.Tensor]] = {id(s): [] for s in sequences}
    while any(s.num_past < len(s.token_ids) for s in sequences):
        parts = [(s, min(n, len(s.token_ids) - s.num_past)) for s, n in counts(data, sequences)]
        at = data.draw(st.integers(0, len(parts)))
        others.num_past = data.draw(st.integers(0, 60))
        parts.insert(at, (others, data.draw(st.integers(1, 3))))
        if sum(count for _, count in parts) > subject.network.max_rows:
            continue
        before = [s.num_past for s, _ in parts]
        logits = step(subject.network, subject.pool, parts)
        assert before == [s.num_past - n for s, n in parts]
        assert logits.pop(at).isnan().all()
        del parts[at]
        for (s, _), part in zip(parts, logits, strict=True):
            rows[id(s)].append(part)
    for s, expected in zip(sequences, subject.one_by_one, strict=True):
        assert torch.equal(torch.cat(rows[id(s)]), expected)


@torch.no_grad()
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_decode_step_of_many_sequences_gives_each_its_own_bits(
    subject: Subject, num_threads: int
) -> None:
    subject.network.set_num_threads(num_threads)
    subject.spoil()
    sequences = [Prompt(PROMPTS[i % 2][:30], (NUM_BLOCKS - 1 - i,)) for i in range(NUM_BLOCKS)]
    for index, sequence in enumerate(sequences):
        step(subject.network, subject.pool, [(sequence, 1 + index)])
    for number in range(1, NUM_BLOCKS + 1):
        past = [sequence.num_past for sequence in sequences[:number]]
        logits = step(subject.network, subject.pool, [(s, 1) for s in sequences[:number]])
        for index, at in enumerate(past):
            assert torch.equal(logits[index][0], subject.one_by_one[index % 2][at])


@torch.no_grad()
def test_a_sequence_may_fill_the_whole_pool(subject: Subject) -> None:
    ids = prompt(NUM_BLOCKS * BLOCK_SIZE, 3)
    subject.spoil()
    pieces = Prompt(ids, range(NUM_BLOCKS))
    chunks = [step(subject.network, subject.pool, [(pieces, n)])[0] for n in (128, 127, 128, 1)]
    subject.spoil()
    other = Prompt(ids, range(NUM_BLOCKS - 1, -1, -1))
    again = [step(subject.network, subject.pool, [(other, n)])[0] for n in (1, 100, 100, 100, 83)]
    assert torch.equal(torch.cat(chunks), torch.cat(again))
    assert torch.cat(chunks).isfinite().all()


@torch.no_grad()
def test_a_token_that_is_no_number_leaves_what_came_before_it(subject: Subject) -> None:
    ids = [*PROMPTS[0][:20], NAN_TOKEN, *PROMPTS[0][21:30]]
    sequence = Prompt(ids, (5,))
    before = step(subject.network, subject.pool, [(sequence, 20)])[0]
    after = step(subject.network, subject.pool, [(sequence, 10)])[0]
    assert torch.equal(before, subject.one_by_one[0][:20])
    assert after[0].isnan().all()
    # the window of one layer may have passed it, the other sees it for ever
    assert after.isnan().all()


@torch.no_grad()
def test_a_head_row_that_is_no_number_spoils_one_logit(kernels: Kernels, packing: Packing) -> None:
    network = build(kernels, packing, config())
    state = random_state(network)
    load(network, state)
    clean = whole(network, pool_of(network, 4), prompt(50, 1), (0, 1))
    state["lm_head.weight"][7, 3] = float("nan")
    load(network, state)
    spoilt = whole(network, pool_of(network, 4), prompt(50, 1), (0, 1))
    assert spoilt[:, 7].isnan().all()
    spoilt[:, 7] = clean[:, 7]
    assert torch.equal(spoilt, clean)
