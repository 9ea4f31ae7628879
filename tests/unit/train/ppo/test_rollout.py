"""The engine draws from the trainer's own policy: its weights, with the adapter on."""

from __future__ import annotations

import pytest
import torch

from chatserve.errors import UsageError
from chatserve.train.ppo.policy import Policy, Sample, collate
from chatserve.train.ppo.rollout import (
    Drawn,
    EngineRollout,
    Form,
    Request,
    Sampling,
    _plain,
    choose_form,
)
from tests.tiny import EOS_ID
from tests.unit.train.ppo.models import build_policy

pytest.importorskip("peft", reason="needs the extra [train]")

REQUESTS = [Request(tuple(range(5 + index)), 12 + index, seed=index) for index in range(4)]
FORCED = Sampling(ignores_end=True)


def engine_of(policy: Policy, form: Form) -> EngineRollout:
    return EngineRollout(policy.network, [EOS_ID], form, max_answers=4, max_tokens=96)


def mismatch(policy: Policy, drawn: list[Drawn]) -> float:
    """The largest difference between the engine's log-probability of a token and the trainer's."""
    samples = [
        Sample(request.query_ids, answer.token_ids)
        for request, answer in zip(REQUESTS, drawn, strict=True)
    ]
    batch = collate(samples, policy.device)
    with torch.no_grad():
        trainers = policy(batch).logprobs[batch.mask]
    engines = torch.tensor([each for answer in drawn for each in answer.logprobs])
    return float((engines - trainers).abs().max())


@pytest.mark.parametrize("tied", [False, True])
def test_shared_weights_draw_from_the_policy_itself(tied: bool) -> None:
    policy = build_policy(tie_word_embeddings=tied)
    engine = engine_of(policy, "shared")
    drawn = engine.draw(REQUESTS, FORCED)
    assert [len(each.token_ids) for each in drawn] == [12, 13, 14, 15]
    assert mismatch(policy, drawn) < 1e-4


def test_shared_weights_are_one_copy() -> None:
    policy = build_policy()
    engine = engine_of(policy, "shared")
    block = policy.network.model.layers[0]
    before = engine.draw(REQUESTS, FORCED)
    with torch.no_grad():  # what changes in the trainer's module has changed in the engine
        block.mlp.down_proj.weight.mul_(-1)
        block.self_attn.k_proj.weight.mul_(-1)
    after = engine.draw(REQUESTS, FORCED)
    assert before != after
    assert mismatch(policy, after) < 1e-4


@pytest.mark.parametrize("form", ["shared", "int8"])
def test_each_batch_is_drawn_with_the_adapter_as_it_is(form: Form) -> None:
    policy = build_policy()
    engine = engine_of(policy, form)
    # longer than a block of the cache, so that there is something to remember
    requests = [Request(tuple(range(64 + index)), 12, seed=index) for index in range(4)]
    first = engine.draw(requests, FORCED)
    assert engine.draw(requests, FORCED) == first  # the seeds decide, nothing is left over
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3)
    second = engine.draw(requests, FORCED)
    assert second != first
    assert second == engine_of(policy, form).draw(requests, FORCED)  # nothing is remembered


def test_8_bits_are_near_the_policy() -> None:
    policy = build_policy()
    engine = engine_of(policy, "int8")
    weight = policy.network.model.layers[0].mlp.down_proj.weight
    before = weight.clone()
    assert mismatch(policy, engine.draw(REQUESTS, FORCED)) < 1.0
    assert torch.equal(weight, before)  # the trainer's own weights stay as they are


def test_an_answer_ends_at_an_end_token_unless_its_length_is_forced() -> None:
    policy = build_policy()
    with torch.no_grad():
        policy.network.lm_head.weight.zero_()
    engine = EngineRollout(policy.network, range(320), "shared", max_answers=4, max_tokens=32)
    ended, *_ = engine.draw(REQUESTS, Sampling())
    assert (len(ended.token_ids), ended.has_ended) == (1, True)
    forced, *_ = engine.draw(REQUESTS, FORCED)
    assert (len(forced.token_ids), forced.has_ended) == (12, False)


def test_rows_in_8_bits_of_bitsandbytes_are_unpacked() -> None:
    codes = torch.nn.Parameter(torch.tensor([[127, -127], [64, 0]], dtype=torch.int8), False)
    codes.SCB = torch.tensor([2.0, 127.0])
    torch.testing.assert_close(_plain(codes), torch.tensor([[2.0, -2.0], [64.0, 0.0]]))


def test_what_the_engine_cannot_share_is_told() -> None:
    policy = build_policy()
    assert choose_form(policy.network, "auto") == "int8"
    assert choose_form(policy.network, "shared") == "shared"
    weight = policy.network.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.SCB = torch.ones(64)  # as bitsandbytes marks rows in 8 bits
    assert choose_form(policy.network, "auto") == "int8"
    with pytest.raises(UsageError, match="--rollout shared"):
        choose_form(policy.network, "shared")
