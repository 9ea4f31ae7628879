"""The value head: what reward the policy expects, from the hidden state before each token."""

from __future__ import annotations

import torch
from torch import nn


class ValueHead(nn.Module):
    """One linear unit on the policy's last hidden states, in float32. It begins by expecting 0.

    Beginning at zero leaves the first advantages to the rewards alone, and draws no random numbers.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., H) in any float dtype to values (...) float32."""
        values: torch.Tensor = self.summary(hidden.float()).squeeze(-1)
        return values
