"""The policy in PyTorch: a causal language model with a LoRA adapter, and a value head on top.

One copy of the base: the reference is the same network with the adapter off. Answers are told in
token ids; knows no engine and no reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chatserve.train.ppo.value_head import ValueHead

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
"""The name of the policy's adapter in the PEFT model: the one that is saved without a folder of its
own, and that TRL trains."""


@dataclass(frozen=True)
class Sample:
    """A question's tokens, and those of the answer to it. Neither is empty."""

    query_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """B samples side by side, padded on the right to S tokens; answers have at most T.

    ids, attention_mask: (B, S). rows: (B, T) int64, the positions whose logits draw the answer's
    tokens; answer_ids: (B, T); mask: (B, T) bool, True for tokens of the answer.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    rows: torch.Tensor
    answer_ids: torch.Tensor
    mask: torch.Tensor


def collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Side by side, on `device`."""
    longest = max(len(each.query_ids) + len(each.answer_ids) for each in samples)
    width = max(len(each.answer_ids) for each in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(ids)
    rows = torch.zeros(len(samples), width, dtype=torch.int64)
    answer_ids = torch.zeros_like(rows)
    mask = torch.zeros(len(samples), width, dtype=torch.bool)
    for index, each in enumerate(samples):
        first, count = len(each.query_ids), len(each.answer_ids)
        ids[index, : first + count] = torch.tensor(each.query_ids + each.answer_ids)
        attention_mask[index, : first + count] = 1
        rows[index, :count] = torch.arange(first - 1, first + count - 1)
        answer_ids[index, :count] = torch.tensor(each.answer_ids)
        mask[index, :count] = True
    parts = (ids, attention_mask, rows, answer_ids, mask)
    return Batch(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class Evaluation:
    """Of each token of the answers, (B, T) float32: its log-probability, the entropy of what it was
    drawn from, and the value expected before it. What padding gets means nothing, but is finite."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


class Policy(nn.Module):
    """What PPO trains: the adapter `ADAPTER` of `model`, and the value head."""

    def __init__(self, model: PeftModel, *, temperature: float = 1.0) -> None:
        """`temperature`: that answers are drawn with, and their probabilities are of."""
        super().__init__()
        self.model = model
        self.value_head = ValueHead(int(model.config.hidden_size))
        self._temperature = temperature

    @property
    def network(self) -> Any:
        """transformers' causal language model, with the adapter's layers in it."""
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.network.lm_head.weight.device
        return device

    def forward(self, batch: Batch) -> Evaluation:
        """As the policy, with the gradients of whoever calls."""
        hidden = self._hidden(batch)
        logprobs, entropy = self._logprobs(hidden, batch)
        return Evaluation(logprobs, entropy, self.value_head(hidden))

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> torch.Tensor:
        """(B, T) float32, of the base without its adapter."""
        with self.model.disable_adapter():
            logprobs, _ = self._logprobs(self._hidden(batch), batch)
        return logprobs

    def trained_parameters(self) -> list[nn.Parameter]:
        """The adapter's and the value head's, in a fixed order."""
        return [each for each in self.parameters() if each.requires_grad]

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Final states (B, T, H) at `batch.rows`: no logits are computed of what is not asked."""
        output = self.network.model(
            input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False
        )
        states: torch.Tensor = output.last_hidden_state
        return states.gather(1, batch.rows[:, :, None].expand(-1, -1, states.shape[-1]))

    def _logprobs(self, hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network.lm_head(hidden).float() / self._temperature
        every = logits.log_softmax(-1)
        logprobs = every.gather(-1, batch.answer_ids[:, :, None]).squeeze(-1)
        with torch.no_grad():  # entropy is watched, not trained
            entropy = -(every.exp() * every).sum(-1)
        return logprobs, entropy
