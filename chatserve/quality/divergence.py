"""Two sets of logits compared, position by position. No network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from chatserve.errors import ModelLoadError


def next_losses(log_probabilities: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods of next_ids (R,); where a text ends it is -1, and left out."""
    is_known = next_ids >= 0
    rows = log_probabilities[is_known]
    return -rows.gather(1, next_ids[is_known][:, None])[:, 0]


@dataclass
class Divergence:
    """Collects, some positions at a time."""

    kl: list[torch.Tensor] = field(default_factory=list)
    agreements: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

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
        self.kl.append(kl)
        self.agreements.append(ours.argmax(-1) == reference.argmax(-1))
        self.losses.append(next_losses(ours, next_ids))

    @property
    def divergences(self) -> torch.Tensor:
        """Of every position, never below 0, where rounding alone would take them."""
        return torch.cat(self.kl).clamp_min(0)

    @property
    def agreement(self) -> tuple[float, float]:
        """Share of positions with the same top token, and its standard error."""
        same = torch.cat(self.agreements).double()
        share = float(same.mean())
        return share, math.sqrt(share * (1 - share) / len(same))

    @property
    def perplexity(self) -> float:
        return perplexity(self.losses)


def perplexity(losses: list[torch.Tensor]) -> float:
    """exp of the mean loss; of a network that knows nothing at all at most e^80."""
    return math.exp(min(80.0, float(torch.cat(losses).double().mean())))
