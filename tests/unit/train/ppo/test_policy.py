"""Log-probabilities, entropy and values beside the plainest way to compute them."""

from __future__ import annotations

import pytest
import torch

from chatserve.train.ppo.policy import Policy, Sample, collate
from tests.tiny import build_hf_model
from tests.unit.train.ppo.models import build_policy

pytest.importorskip("peft", reason="needs the extra [train]")

SAMPLES = [Sample((5, 6, 7), (8, 9, 10, 11)), Sample((1,), (2, 3))]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return build_policy()


def plainly(network: object, sample: Sample) -> torch.Tensor:
    """log pi of each token of the answer, from all logits of one text alone."""
    ids = torch.tensor([sample.query_ids + sample.answer_ids])
    with torch.no_grad():
        logits = network(ids).logits[0]  # type: ignore[operator]
    first = len(sample.query_ids) - 1
    rows = logits[first : first + len(sample.answer_ids)].log_softmax(-1)
    return rows.gather(-1, torch.tensor(sample.answer_ids)[:, None])[:, 0]


def test_a_padded_batch_says_what_each_text_alone_does(policy: Policy) -> None:
    batch = collate(SAMPLES, policy.device)
    with torch.no_grad():
        found = policy(batch)
    for index, sample in enumerate(SAMPLES):
        expected = plainly(policy.network, sample)
        torch.testing.assert_close(found.logprobs[index][batch.mask[index]], expected)
        alone = policy(collate([sample], policy.device))
        torch.testing.assert_close(alone.values[0], found.values[index][batch.mask[index]])
    assert found.values[batch.mask].abs().min() > 0
    assert found.entropy.isfinite().all()
    assert found.logprobs.isfinite().all()


def test_entropy_is_that_of_the_whole_distribution(policy: Policy) -> None:
    sample = SAMPLES[1]
    with torch.no_grad():
        found = policy(collate([sample], policy.device)).entropy[0, 0]
        logits = policy.network(torch.tensor([sample.query_ids])).logits[0, -1]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found, expected)


def test_the_reference_is_the_base_without_its_adapter(policy: Policy) -> None:
    base = build_hf_model()
    batch = collate(SAMPLES, policy.device)
    found = policy.reference_logprobs(batch)
    for index, sample in enumerate(SAMPLES):
        torch.testing.assert_close(found[index][batch.mask[index]], plainly(base, sample))
    with torch.no_grad():  # and the adapter is on again
        assert (policy(batch).logprobs - found)[batch.mask].abs().max() > 0.01


def test_only_adapter_and_value_head_are_trained(policy: Policy) -> None:
    found = policy(collate(SAMPLES, policy.device))
    (found.logprobs.sum() + found.values.sum()).backward()
    trained = [name for name, each in policy.named_parameters() if each.grad is not None]
    assert trained
    assert all(".lora_" in name or name.startswith("value_head.") for name in trained)
    assert len(trained) == len(policy.trained_parameters())
    policy.zero_grad()


def test_temperature_sharpens_what_is_drawn_from() -> None:
    policy = build_policy()
    warm = Policy(policy.model, temperature=2.0)
    batch = collate(SAMPLES, policy.device)
    with torch.no_grad():
        assert (warm(batch).entropy > policy(batch).entropy)[batch.mask].all()
