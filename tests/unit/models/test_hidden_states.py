"""Final normalised hidden states of wanted rows: what embeddings are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chatserve.errors import GenerationFailed
from chatserve.models.batch import Batch, Segment
from chatserve.models.device import choose_policy
from chatserve.models.fallback import load_fallback
from chatserve.models.placed_llama import PlacedLlama
from tests import tiny
from tests.networks import SCATTERED, Solo
from tests.unit.models.test_fallback import MODELS, state_of
from tests.unit.models.test_llama import FLOAT32, assert_near, load
from tests.unit.models.test_placed_llama import MAPS

IDS = torch.randint(0, tiny.VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(1))


class NoHead:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody wants logits")


def expected_states(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    states: torch.Tensor = model.base_model(ids[None]).last_hidden_state[0]
    return states


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_they_equal_transformers_whole_and_in_chunks(model_type: str) -> None:
    model = tiny.build_hf_model(model_type)
    native = load(model, FLOAT32)
    native.head = NoHead()  # type: ignore[assignment]  # it must not be called
    expected = expected_states(model)
    assert_near(Solo(native, SCATTERED).feed_for_states(IDS), expected)
    solo = Solo(native, SCATTERED)
    parts = [solo.feed_for_states(IDS[start:end]) for start, end in ((0, 40), (40, 41), (41, 90))]
    assert_near(torch.cat(parts), expected)


@torch.no_grad()
def test_beside_neighbours_that_want_logits_or_nothing() -> None:
    """One batch: a chunk whose states nobody wants, a prompt for logits, one for two states."""
    model = tiny.build_hf_model()
    native = load(model, FLOAT32)
    pool = native.build_kv_pool(4, 32)
    segments = [Segment(0, 5, 0, (1,)), Segment(5, 7, 0, (0,)), Segment(12, 20, 0, (3,))]
    ids = IDS[:32].tolist()
    hidden = torch.empty(2, native.hidden_size)
    batch = Batch(
        ids, [*range(5), *range(7), *range(20)], segments, [11], hidden_rows=[12, 31], hidden=hidden
    )
    logits = native.forward(batch, pool)
    assert_near(logits, model(IDS[None, 5:12]).logits[0, -1:])
    assert_near(hidden, expected_states(model, IDS[12:32])[[0, 19]])


@torch.no_grad()
@pytest.mark.parametrize("name", MAPS)
def test_a_spread_network_has_the_same_to_the_bit(name: str, tmp_path: Any) -> None:
    single = load(tiny.build_hf_model(num_hidden_layers=4), FLOAT32)
    placed = PlacedLlama(single.config, FLOAT32, MAPS[name], tmp_path)
    state = tiny.build_hf_model(num_hidden_layers=4).state_dict()
    for key, place in placed.destinations().items():
        place.target.load_rows(place.start, state[key])
    placed.head = NoHead()  # type: ignore[assignment]  # as above
    found, expected = Solo(placed, SCATTERED), Solo(single, SCATTERED)
    for part in (IDS[:50], IDS[50:]):
        assert torch.equal(found.feed_for_states(part), expected.feed_for_states(part))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_runs_through_transformers_has_them(name: str) -> None:
    model_type, changes = MODELS[name]
    model = tiny.build_hf_model(model_type, **changes)
    fallback = load_fallback(model.config.to_dict(), state_of(model), FLOAT32)
    solo = Solo(fallback)
    parts = [solo.feed_for_states(IDS[:30]), solo.feed_for_states(IDS[30:], [0, 59])]
    assert_near(torch.cat(parts), expected_states(model)[[*range(31), 89]])


@torch.no_grad()
def test_a_transformers_model_that_hides_its_states_is_told() -> None:
    model = tiny.build_hf_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=512)
    fallback = load_fallback(model.config.to_dict(), state_of(model), FLOAT32)
    inner = fallback._model
    fallback._model = SimpleNamespace(config=inner.config, base_model=inner)
    with pytest.raises(GenerationFailed, match="makes no embeddings"):
        Solo(fallback).feed_for_states(IDS[:3])


@torch.no_grad()
def test_in_bfloat16_they_come_as_float32() -> None:
    model = tiny.build_hf_model()
    native = load(model, choose_policy("cpu", "bfloat16", load_8bit=False))
    states = Solo(native).feed_for_states(IDS)
    assert states.dtype == torch.float32
    assert_near(states, expected_states(model), 0.1)
