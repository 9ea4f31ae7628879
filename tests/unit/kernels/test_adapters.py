"""Adapters of rows on the kernels: against the plain network, and their own bits."""

from __future__ import annotations

import ctypes
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.kernels import library
from chatserve.kernels.library import Kernels, LowRank
from chatserve.models.adapter_places import num_matrices
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.packing import FINE, Packing
from tests.unit.kernels.networks import (
    FLOAT32,
    Prompt,
    Reference,
    as_packed,
    build,
    config,
    load,
    pool_of,
    prompt,
    random_adapter,
    random_network,
    random_state,
    step,
    whole,
)

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "all biases": {"has_qkv_bias": True, "has_output_bias": True, "has_mlp_bias": True},
    "parts that end within a panel": {
        "num_heads": 6, "num_kv_heads": 3, "head_dim": 16, "hidden_size": 96, "vocab_size": 47,
    },
    "tied": {"is_tied": True},
}  # fmt: skip
TARGETS: dict[str, tuple[str, ...]] = {
    "all": ("",), "q and v": ("q_proj", "v_proj"), "up": ("up_proj",), "head": ("lm_head",),
    "k, o, gate, down": ("k_proj", "o_proj", "gate_proj", "down_proj"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_equal_the_plain_networks(
    kernels: Kernels, packing: Packing, changes: dict[str, Any]
) -> None:
    shape = config(**changes)
    network = build(kernels, packing, shape)
    state = random_state(network)
    load(network, state)
    reference = Reference(shape, as_packed(kernels, packing, state), packing)
    pools = [pool_of(network, 10), reference.build_kv_pool(10, 32)]
    adapters = [
        random_adapter(shape, seed, rank=rank, targets=TARGETS[targets])
        for seed, (rank, targets) in enumerate(((3, "all"), (8, "q and v")))
    ]

    def run(model: Any, pool: Any) -> torch.Tensor:
        built = [model.build_adapter(adapter) for adapter in adapters]
        one, two, three = (
            Prompt(prompt(length, seed, vocab_size=shape.vocab_size), block_ids, adapter)
            for seed, (length, block_ids, adapter) in enumerate(
                ((60, (7, 2), built[0]), (40, (1, 9), built[1]), (20, (4,), None))
            )
        )
        rows = [*step(model, pool, [(one, 50), (two, 5), (three, 4)])]
        rows += step(model, pool, [(two, 31), (three, 1), (one, 9)])
        rows += step(model, pool, [(one, 1), (three, 1)])
        rows += step(model, pool, [(two, 1)])
        return torch.cat(rows)

    actual, expected = run(network, pools[0]), run(reference, pools[1])
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    # as without adapters; an adapter that is left out gives 0.5 and more
    assert error.max() < 0.1
    assert error.mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_says_what_the_merged_weights_say(kernels: Kernels, targets: str) -> None:
    shape = config(is_tied=targets == "all")
    plain = build(kernels, FINE, shape)
    state = random_state(plain)
    adapter = random_adapter(shape, 1, rank=5, targets=TARGETS[targets])
    merged_state = dict(state)
    for name, pair in adapter.pairs.items():
        merged_state[name] = state[name] + pair.scale * pair.b @ pair.a
    merged, exact = build(kernels, FINE, shape), Llama(shape, FLOAT32)
    load(plain, state)
    load(merged, merged_state)
    load(exact, merged_state)
    ids = prompt(50, 2)
    pool = pool_of(plain, 4)
    expected = whole(exact, exact.build_kv_pool(2, 32), ids, (1, 0))

    def error(logits: torch.Tensor) -> float:
        return float(((logits - expected).norm(dim=1) / expected.norm(dim=1)).mean())

    adapted = error(whole(plain, pool, ids, (1, 0), plain.build_adapter(adapter)))
    rounded = error(whole(merged, pool_of(merged, 4), ids, (1, 0)))
    # what 8 bits round away, of weights with and without the adapter in them
    assert adapted < max(1.5 * rounded, 0.01)
    assert error(whole(plain, pool, ids, (3, 2))) > 5 * adapted


@torch.no_grad()
def test_a_row_depends_on_its_own_adapter_alone(kernels: Kernels, packing: Packing) -> None:
    network = random_network(kernels, packing, config())
    pool = pool_of(network, 40)
    built = [
        None,
        network.build_adapter(random_adapter(network.config, 1, rank=3)),
        network.build_adapter(random_adapter(network.config, 2, targets=TARGETS["q and v"])),
        network.build_adapter(random_adapter(network.config, 3, targets=TARGETS["head"])),
    ]
    ids = [prompt(40, seed) for seed in range(8)]
    alone = [whole(network, pool, ids[i], (0, 1), built[i % 4]) for i in range(8)]
    sequences = [Prompt(ids[i], (2 + 2 * i, 3 + 2 * i), built[i % 4]) for i in range(8)]
    # whole prompts, chunks, one token of each (16 wide, 2 small), and one alone
    rows: list[list[torch.Tensor]] = [[] for _ in sequences]
    for counts in ((9, 1, 20, 3, 1, 2, 30, 4), (1,) * 8, (0, 0, 1, 1, 0, 0, 0, 0), (5, *(0,) * 7)):
        parts = [(i, count) for i, count in enumerate(counts) if count]
        parts.reverse()
        done = step(network, pool, [(sequences[i], count) for i, count in parts])
        for (i, _), logits in zip(parts, done, strict=True):
            rows[i].append(logits)
    for i, pieces in enumerate(rows):
        actual = torch.cat(pieces)
        assert torch.equal(actual, alone[i][: len(actual)]), i


@torch.no_grad()
def test_threads_and_prefetch_change_no_bit(kernels: Kernels) -> None:
    network = random_network(kernels, Packing(), config())
    pool = pool_of(network, 4)
    adapter = network.build_adapter(random_adapter(network.config, 1))
    results = []
    for num_threads in (1, 3, 2):
        network.set_num_threads(num_threads)
        for ahead in (0, 8192):
            network.set_prefetch(ahead)
            results.append(whole(network, pool, prompt(40, 1), (0, 1), adapter))
    assert all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_tiny_and_large_numbers_survive_half_precision(kernels: Kernels) -> None:
    network = random_network(kernels, Packing(), config())
    pool = pool_of(network, 4)
    plain = random_adapter(network.config, 1)
    pairs = {
        name: replace(pair, a=pair.a * 2.0**-30, b=pair.b * 2.0**40, scale=pair.scale * 2.0**-10)
        for name, pair in plain.pairs.items()
    }
    logits = [
        whole(network, pool, prompt(40, 1), (0, 1), network.build_adapter(adapter))
        for adapter in (plain, replace(plain, pairs=pairs))
    ]
    assert torch.equal(*logits)


def test_ranks_over_the_limit_are_refused(kernels: Kernels) -> None:
    network = random_network(kernels, Packing(), config(num_layers=1))
    pool_of(network, 1)
    adapter = random_adapter(network.config, 1, rank=library.MAX_RANK // 3, targets=("_proj",))
    assert network.build_adapter(adapter).num_bytes > 1 << 20
    adapter = random_adapter(network.config, 1, rank=library.MAX_RANK // 3 + 1, targets=("_proj",))
    with pytest.raises(ModelLoadError, match=r"4,098 ranks.*take 4,096"):
        network.build_adapter(adapter)


@torch.no_grad()
def test_an_adapter_goes_with_its_last_user(kernels: Kernels) -> None:
    network = random_network(kernels, Packing(), config())
    pool = pool_of(network, 2)
    adapter = network.build_adapter(random_adapter(network.config, 1))
    gone = weakref.ref(adapter)
    user = Prompt(prompt(40, 1), (0, 1), adapter)
    first = step(network, pool, [(user, 30)])[0]
    del adapter
    step(network, pool, [(user, 10)])
    del user
    gc.collect()
    assert gone() is None
    # nothing of it is looked at any more
    assert not torch.equal(whole(network, pool, prompt(40, 1), (0, 1))[:30], first)


def _create(network: KernelLlama, **changes: Any) -> int | None:
    """An adapter that changes the first layer's output matrix, as far as `changes` say."""
    rank = 4
    half = torch.zeros(1 << 12, dtype=torch.float16)
    scales = torch.zeros(rank)
    spans = torch.zeros(4, 3, dtype=torch.int32)
    spans[:, 1] = rank
    for name in ("first", "count", "start"):
        if name in changes:
            spans[3, ("first", "count", "start").index(name)] = changes.pop(name)
    values: dict[str, Any] = {
        "a": half.data_ptr(), "b": half.data_ptr(), "scales": scales.data_ptr(),
        "spans": spans.data_ptr(), "rank": rank, "num_b": 4, **changes,
    }  # fmt: skip
    table = (LowRank * num_matrices(network.config))()
    table[1] = LowRank(**values)
    functions = network._kernels.functions
    handle: int | None = functions.cs_adapter_create(ctypes.byref(network._shape()), table)
    if handle:
        functions.cs_adapter_destroy(handle)
    return handle


@pytest.mark.parametrize(
    "fault",
    [
        {"a": None}, {"b": None}, {"scales": None}, {"spans": None}, {"rank": 3}, {"rank": -4},
        {"rank": library.MAX_RANK + 4}, {"first": -1}, {"first": 1}, {"count": -1}, {"count": 5},
        {"start": -1}, {"start": 1}, {"num_b": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_change_that_leaves_its_memory_is_refused(
    kernels: Kernels, fault: dict[str, Any]
) -> None:
    network = random_network(kernels, Packing(), config())
    pool_of(network, 1)
    assert _create(network)
    assert not _create(network, **fault)


@torch.no_grad()
def test_another_networks_adapter_is_refused(kernels: Kernels) -> None:
    network = random_network(kernels, Packing(), config())
    pool = pool_of(network, 2)
    sizes: tuple[dict[str, Any], ...] = (
        {"hidden_size": 96}, {"intermediate_size": 64}, {"num_layers": 1}, {"num_heads": 2},
        {"num_kv_heads": 1}, {"head_dim": 32}, {"vocab_size": 102},
    )  # fmt: skip
    for changes in sizes:
        other = build(kernels, Packing(), config(**changes))
        adapter = other.build_adapter(random_adapter(other.config, 1))
        with pytest.raises(RuntimeError, match="refused"):
            whole(network, pool, prompt(40, 1), (0, 1), adapter)
    other = build(kernels, Packing(), config())
    whole(network, pool, prompt(40, 1), (0, 1), other.build_adapter(random_adapter(config(), 1)))


def test_a_shape_that_no_network_has_takes_no_adapter(kernels: Kernels) -> None:
    shape = build(kernels, Packing(), config())._shape()
    create, table = kernels.functions.cs_adapter_create, (LowRank * num_matrices(config()))()
    handle = create(ctypes.byref(shape), table)
    assert handle
    kernels.functions.cs_adapter_destroy(handle)
    shape.num_layers = 0
    assert not create(ctypes.byref(shape), table)
