"""How weights are compressed, whatever device packs them. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32
"""Weights of a row that share a scale, where scales are grouped."""


@dataclass(frozen=True)
class Packing:
    """8 or 4 bits a weight, with one scale per output row or per `GROUP` weights of it.

    has_minima: 4 bits from a minimum per `GROUP` weights upwards, as GGUF's Q4_1, not around zero.
    activation_bits: 8 or 16, of what the weights are multiplied with; always a scale per `GROUP`.
    """

    bits: int = 8
    is_grouped: bool = False
    has_minima: bool = False
    activation_bits: int = 8

    @property
    def bytes_per_weight(self) -> float:
        """Codes, and half-precision scales and minima of groups; one scale a row is not counted."""
        return self.bits / 8 + (2 / GROUP) * (self.is_grouped + self.has_minima)

    def __str__(self) -> str:
        group = f"/{GROUP}" if self.is_grouped else ""
        return f"int{self.bits}{group}" + ("+min" if self.has_minima else "")


FINE = Packing(is_grouped=True, activation_bits=16)
"""8 bits as near to full precision as they get: `--quant-group 32`."""
