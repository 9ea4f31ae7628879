"""The network on Triton kernels against the plain one, eagerly and by a stand-in for graphs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import pytest
import torch

from tests.unit.models.triton_device import DEVICE, is_close

# isort: split

from chatserve.models.batch import Batch, Segment
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.llama import Llama
from chatserve.models.loader import build_network
from chatserve.models.packing import Packing
from chatserve.models.triton import graphs as graphs_module
from chatserve.models.triton import matrices, step
from chatserve.models.triton.network import TritonLlama
from chatserve.models.triton.step import StepBuffer, plan_for
from tests import tiny
from tests.networks import Solo

BLOCK_SIZE = 32
# the interpreter runs a program for each row and head
FEW = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32, "head_dim": 16,
       "max_position_embeddings": 256}  # fmt: skip
CHANGES = {"mistral": {"sliding_window": 24}}
POLICY = DevicePolicy(DEVICE, torch.float32, "plain", None, ())


class CountingGraphs:
    """Repeats the function instead of a graph; counts captures."""

    def __init__(self) -> None:
        self.num_captured = 0

    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.num_captured += 1
        function()
        return function


class NoGraphs:
    def capture(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")


@cache
def hf_model(model_type: str) -> Any:
    return tiny.build_hf_model(model_type, **FEW, **CHANGES.get(model_type, {}))


@cache
def plain(model_type: str) -> Llama:
    config = ModelConfig.from_hf(hf_model(model_type).config.to_dict())
    return load(Llama(config, POLICY), model_type)


Network = TypeVar("Network", bound=Llama)


def load(network: Network, model_type: str) -> Network:
    state = hf_model(model_type).state_dict()
    with torch.no_grad():
        for name, place in network.destinations().items():
            place.target.load_rows(place.start, state[name])
    return network


def build(model_type: str, graphs: CountingGraphs | NoGraphs | None = None) -> TritonLlama:
    return load(TritonLlama(plain(model_type).config, POLICY, graphs), model_type)


class Pair:
    """Both networks over pools of their own, fed the same batches."""

    def __init__(self, network: TritonLlama, reference: Llama) -> None:
        self.network, self.reference = network, reference
        self.pools = [model.build_kv_pool(24, BLOCK_SIZE) for model in (network, reference)]
        self.past = [0, 0, 0]
        self.blocks = [(3, 1, 4, 15, 9, 2, 6, 5), (8, 7, 0, 10, 11, 12), (20, 13, 14, 16, 17)]

    @torch.inference_mode()
    def feed(self, *counts: int, has_all_rows: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """So many new tokens of each sequence; logits of both networks."""
        segments: list[Segment] = []
        positions: list[int] = []
        for index, count in enumerate(counts):
            if count:
                past = self.past[index]
                segments.append(Segment(len(positions), count, past, self.blocks[index]))
                positions += range(past, past + count)
                self.past[index] += count
        ids = [(7 * position + len(positions)) % 200 for position in positions]
        rows = range(len(ids)) if has_all_rows else [item.rows.stop - 1 for item in segments[1:]]
        batch = Batch(ids, positions, segments, list(rows))
        actual = self.network.forward(batch, self.pools[0])
        return actual.clone(), self.reference.forward(batch, self.pools[1])


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "mistral"])
def test_logits_match_the_plain_network(model_type: str) -> None:
    pair = Pair(build(model_type), plain(model_type))
    for counts in ((40, 0, 0), (1, 20, 3), (1, 1, 3), (0, 9, 1)):
        actual, expected = pair.feed(*counts)
        assert is_close(actual, expected, roundings=16), counts


def test_only_the_wanted_rows_have_logits() -> None:
    pair = Pair(build("llama"), plain("llama"))
    actual, expected = pair.feed(5, 12, 3, has_all_rows=False)
    assert actual.shape == (2, tiny.VOCAB_SIZE)
    assert is_close(actual, expected, roundings=16)
    nothing = pair.feed(4, has_all_rows=False)[0]
    assert nothing.shape == (0, tiny.VOCAB_SIZE)


@torch.inference_mode()
def test_hidden_states_match_the_plain_networks_and_need_no_head() -> None:
    """Also of a decode step, which is no graph then."""
    networks = build("qwen3", CountingGraphs()), plain("qwen3")
    ids = [(7 * position) % 200 for position in range(45)]
    both = []
    for network in networks:
        solo = Solo(network)
        head, network.head = network.head, cast(Any, None)
        try:
            parts = (solo.feed_for_states(ids[:40]), solo.feed_for_states(ids[40:], [1, 4]))
        finally:
            network.head = head
        both.append(torch.cat(parts))
    assert is_close(*both, roundings=16)


def test_a_long_prompt_goes_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: torch.Tensor, is_causal: bool, enable_gqa: bool) -> torch.Tensor:
        calls.append(is_causal)
        return real(*args, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(step, "MIN_WHOLE", 34)
    pair = Pair(build("llama"), plain("llama"))
    pair.feed(1, 1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    actual, expected = pair.feed(1, 33, 34)
    assert calls == [True, True]  # once a layer: the reference is of the plain backend
    assert is_close(actual, expected, roundings=16)


def test_a_window_keeps_longer_prompts_from_flash_attention() -> None:
    batch = Batch(range(200), range(200), [Segment(0, 200, 0, range(7))], [199])
    assert plan_for(batch, BLOCK_SIZE, None).whole == [slice(0, 200)]
    assert plan_for(batch, BLOCK_SIZE, 200).whole == [slice(0, 200)]
    limited = plan_for(batch, BLOCK_SIZE, 199)
    assert (limited.whole, len(limited.tiles)) == ([], 4)


def test_decode_replays_one_graph_a_bucket() -> None:
    graphs = CountingGraphs()
    pair = Pair(build("llama", graphs), plain("llama"))
    pair.feed(34, 9, 2)
    assert graphs.num_captured == 0
    # three rows padded to four; six with a drafted run padded to eight; back to the first graph
    for counts, num_captured in (((1, 1, 1), 1), ((1, 4, 1), 2), ((1, 0, 2), 2), ((1, 1, 1), 2)):
        actual, expected = pair.feed(*counts)
        assert graphs.num_captured == num_captured
        assert is_close(actual, expected, roundings=16), counts


def test_capturing_touches_no_block() -> None:
    graphs = CountingGraphs()
    pair = Pair(build("llama", graphs), plain("llama"))
    pair.feed(40)
    before = [pair.pools[0].layer(layer)[0].clone() for layer in range(2)]
    pair.feed(1)
    for layer, keys in enumerate(before):
        after = pair.pools[0].layer(layer)[0].clone()
        after[pair.blocks[0][1], 40 - BLOCK_SIZE] = keys[pair.blocks[0][1], 40 - BLOCK_SIZE]
        assert torch.equal(after.nan_to_num(), keys.nan_to_num())


def test_warming_up_captures_all_and_touches_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "BUCKETS", (1, 4))
    monkeypatch.setattr(matrices, "cuda_seconds", lambda function: 1.0)
    graphs = CountingGraphs()
    pair = Pair(build("llama", graphs), plain("llama"))
    pair.feed(20, 12)
    before = [pair.pools[0].layer(layer)[0].clone() for layer in range(2)]
    with torch.inference_mode():
        pair.network.warm_up()
    assert graphs.num_captured == 2
    for layer, keys in enumerate(before):
        assert torch.equal(pair.pools[0].layer(layer)[0].nan_to_num(), keys.nan_to_num())
    actual, expected = pair.feed(1, 1)
    assert graphs.num_captured == 2
    assert is_close(actual, expected, roundings=16)


def test_without_graphs_it_decodes_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(build("llama", NoGraphs()), plain("llama"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            actual, expected = pair.feed(1, 1)
            assert is_close(actual, expected, roundings=16)
    assert [record.message for record in caplog.records] == [
        "no CUDA graphs, decoding is slower: operation not permitted when stream is capturing"
    ]


def test_more_rows_than_the_largest_bucket_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "BUCKETS", (1, 2))
    graphs = CountingGraphs()
    network = build("llama", graphs)
    num_rows = 3
    pool = network.build_kv_pool(num_rows, BLOCK_SIZE)
    segments = [Segment(row, 1, 0, [row]) for row in range(num_rows)]
    batch = Batch([3] * num_rows, [0] * num_rows, segments, range(num_rows))
    with torch.inference_mode():
        logits = network.forward(batch, pool)
    assert graphs.num_captured == 0
    assert is_close(logits, logits[:1].expand_as(logits))


def test_a_buffer_pads_what_is_left_over() -> None:
    three = Batch([5, 6, 7], [0, 0, 0], [Segment(row, 1, 0, [row]) for row in range(3)], range(3))
    buffer = StepBuffer(plan_for(three, BLOCK_SIZE, None), BLOCK_SIZE, DEVICE)
    buffer.write(three)
    buffer.write(Batch([9], [3], [Segment(0, 1, 3, [4])], [0]))
    assert buffer.token_ids.tolist() == [9, 0, 0]
    assert buffer.slots.tolist() == [4 * BLOCK_SIZE + 3, -1, -1]
    assert buffer.lengths.tolist() == [4, 0, 0]
    assert buffer.table_rows.tolist() == [0, 0, 0]


def test_compressed_weights_give_the_plain_networks_logits() -> None:
    """4 bits by kernels against 4 bits dequantised: the same codes."""
    for packing, backend in ((Packing(), "triton"), (Packing(4, True), "triton")):
        policy = dataclasses.replace(POLICY, packing=packing, int8=backend)
        reference = dataclasses.replace(policy, int8="dequantise")
        config = plain("llama").config
        pair = Pair(
            load(TritonLlama(config, policy), "llama"), load(Llama(config, reference), "llama")
        )
        for counts in ((5, 3, 0), (1, 1, 1)):
            actual, expected = pair.feed(*counts)
            assert is_close(actual, expected, roundings=16), packing


def test_the_loader_builds_it_where_it_fits() -> None:
    config = plain("llama").config
    policy = dataclasses.replace(POLICY, network="triton")
    assert isinstance(build_network(config, policy), TritonLlama)
    assert type(build_network(config, POLICY)) is Llama
    wide = dataclasses.replace(config, head_dim=256)
    assert type(build_network(wide, policy)) is Llama
