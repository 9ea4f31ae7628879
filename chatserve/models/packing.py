"""How weights are compressed, whatever device packs them. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32
"""Weights of a row that share a scale, where scales are grouped."""


@dataclass(frozen=True)
class Packing:
    """8 or 4 bits a weight, with one scale per output row or per `GROUP` weights of it.

    activation_bits: 8 or 16, of what the weights are multiplied with; always a scale per `GROUP`.
    """

    bits: int = 8
    is_grouped: bool = False
    activation_bits: int = 8

    @property
    def bytes_per_weight(self) -> float:
        """Codes, and half-precision scales where grouped; one scale a row is not counted."""
        return self.bits / 8 + (2 / GROUP if self.is_grouped else 0)

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"/{GROUP}" if self.is_grouped else "")


FINE = Packing(is_grouped=True, activation_bits=16)
"""8 bits as near to full precision as they get: `--quant-group 32`."""
