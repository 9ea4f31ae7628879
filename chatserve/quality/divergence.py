"""Two sets of logits compared, position by position. No network.

What is kept are Python's numbers: small tensors among large ones that come and go would leave holes
in the heap, a gigabyte for a model of 135 M weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from chatserve.errors import ModelLoadError


def next_losses(log_probabilities: torch.Tensor, next_ids: torch.Tensor) -> list[float]:
    """Negative log-likelihoods of next_ids (R,); where a text ends it is -1, and left out."""
    known = (next_ids >= 0).nonzero()[:, 0]
    found: list[float] = (-log_probabilities[known, next_ids[known]]).tolist()
    return found


@dataclass
class Divergence:
    """Collects, some positions at a time."""

    kl: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, logits: torch.Tensor, reference: torch.Tensor, next_ids: torch.Tensor) -> None:
        """logits: (R, V); reference: (R, V) log-probabilities; next_ids: (R,) or -1.

        Raises `ModelLoadError` for logits that are no numbers.
        """
        ours = logits.log_softmax(-1)
        kl = (reference.exp() * (reference - ours)).sum(-1)
        if not kl.isfinite().all():
            raise ModelLoadError(
                "the compressed network computes no numbers; the weights are damaged, or too large "
                "for this form"
            )
        # rounding alone would take it below 0
        self.kl += kl.clamp_min(0).tolist()
        self.agreements += (ours.argmax(-1) == reference.argmax(-1)).tolist()
        self.losses += next_losses(ours, next_ids)

    @property
    def divergences(self) -> torch.Tensor:
        """Of every position."""
        return torch.tensor(self.kl, dtype=torch.float64)

    @property
    def agreement(self) -> tuple[float, float]:
        """Share of positions with the same top token, and its standard error."""
        share = sum(self.agreements) / len(self.agreements)
        return share, math.sqrt(share * (1 - share) / len(self.agreements))

    @property
    def perplexity(self) -> float:
        return perplexity(self.losses)


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean loss; of a network that knows nothing at all at most e^80."""
    return math.exp(min(80.0, sum(losses) / len(losses)))
