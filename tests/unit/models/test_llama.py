"""The native network against transformers, family by family, in float32 on tiny random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chatserve.models.batch import Batch, Segment
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.device import DevicePolicy, choose_policy, policy_for
from chatserve.models.llama import Llama
from tests import tiny
from tests.networks import CONSECUTIVE, SCATTERED, Solo, logits

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama no gqa": ("llama", {"num_key_value_heads": 4}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 32}),
    "linear rope": ("llama", {"rope_parameters": {
        "rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama3 rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "dynamic rope": ("llama", {"rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16,
                               "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}  # fmt: skip


def load(model: Any, policy: DevicePolicy) -> Llama:
    config = model.config.to_dict()
    assert is_native(config)
    native = Llama(ModelConfig.from_hf(config), policy)
    state = model.state_dict()
    for name, place in native.destinations().items():
        assert tuple(state[name].shape) == place.shape
        place.target.load_rows(place.start, state[name])
    return native


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Any:
    model_type, changes = FAMILIES[request.param]
    return tiny.build_hf_model(model_type, **changes)


FLOAT32 = choose_policy("cpu", "float32", load_8bit=False)


@torch.no_grad()
@pytest.mark.parametrize("block_ids", [CONSECUTIVE, SCATTERED], ids=["in one piece", "scattered"])
def test_logits_equal_transformers_in_prefill_and_step_by_step(
    family: Any, block_ids: tuple[int, ...]
) -> None:
    ids = torch.randint(0, tiny.VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(1))
    expected = family(ids[None]).logits[0]
    native = load(family, FLOAT32)
    assert_near(Solo(native, block_ids).feed(ids), expected)
    solo = Solo(native, block_ids)
    parts = [solo.feed(ids[:40]), *(solo.feed(ids[i : i + 1]) for i in range(40, 90))]
    assert_near(torch.cat(parts), expected)


@torch.no_grad()
def test_a_batch_of_sequences_gives_each_its_own_logits(family: Any) -> None:
    native = load(family, FLOAT32)
    prompts = [torch.arange(3, 3 + n) for n in (7, 30, 1)]
    segments, start = [], 0
    for prompt, block_ids in zip(prompts, ((1, 3, 5), (0, 4, 2), (6,)), strict=True):
        segments.append(Segment(start, len(prompt), 0, block_ids))
        start += len(prompt)
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    last = [item.start + item.num_tokens - 1 for item in segments]
    batch = Batch(torch.cat(prompts).tolist(), positions.tolist(), segments, last)
    together = native.forward(batch, native.build_kv_pool(8, 16))
    alone = torch.stack([logits(native, prompt)[-1] for prompt in prompts])
    assert_near(together, alone, 1e-5)
    assert together.argmax(-1).tolist() == alone.argmax(-1).tolist()


@torch.no_grad()
def test_dynamic_rope_beyond_the_trained_context_equals_transformers_decoding() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.build_hf_model(max_position_embeddings=32, rope_parameters=rope)
    ids = torch.randint(0, tiny.VOCAB_SIZE, (60,), generator=torch.Generator().manual_seed(1))
    native = load(model, FLOAT32)
    solo = Solo(native)
    ours = [solo.feed(ids[:30]), *(solo.feed(ids[i : i + 1]) for i in range(30, 60))]
    output = model(ids[None, :30], use_cache=True)
    theirs = [output.logits[0]]
    for index in range(30, 60):
        output = model(
            ids[None, index : index + 1], past_key_values=output.past_key_values, use_cache=True
        )
        theirs.append(output.logits[0])
    assert_near(torch.cat(ours), torch.cat(theirs))


@torch.no_grad()
def test_the_metal_policy_on_cpu_tensors_is_near_the_reference(family: Any) -> None:
    ids = torch.arange(2, 60)
    expected = family(ids[None]).logits[0]
    native = load(family, policy_for("mps", torch.float16, load_8bit=False))
    assert_near(logits(native, ids).float(), expected, 0.02)
