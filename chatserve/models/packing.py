"""How weights are compressed, whatever device packs them. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from chatserve.errors import UsageError

GROUP = 32
"""Weights of a row that share a scale, where scales are grouped."""


@dataclass(frozen=True)
class Packing:
    """8 or 4 bits a weight, with one scale per output row or per `GROUP` weights of it.

    has_minima: 4 bits from a minimum per `GROUP` weights upwards, as GGUF's Q4_1, not around zero.
    scale_bits: 16, or 8: scales and minima are counted in steps of the row's own then.
    activation_bits: 8 or 16, of what the weights are multiplied with; always a scale per `GROUP`.
    """

    bits: int = 8
    is_grouped: bool = False
    has_minima: bool = False
    scale_bits: int = 16
    activation_bits: int = 8

    @property
    def bytes_per_weight(self) -> float:
        """Codes, and scales and minima of groups; one scale a row is not counted."""
        per_group = self.scale_bits / 8 * (self.is_grouped + self.has_minima)
        return self.bits / 8 + per_group / GROUP

    @property
    def has_row_scales(self) -> bool:
        """Whether there is one scale a row, alone or beside those of groups."""
        return not self.is_grouped or self.scale_bits == 8

    def __str__(self) -> str:
        group = f"/{GROUP}" if self.is_grouped else ""
        fine = f"/{self.scale_bits}" if self.scale_bits != 16 else ""
        return f"int{self.bits}{group}" + ("+min" if self.has_minima else "") + fine


FOUR_BITS = Packing(bits=4, is_grouped=True, has_minima=True, scale_bits=8)
"""4 bits, and half a bit of scales and minima, which only the CPU kernels have."""

FINE = Packing(is_grouped=True, activation_bits=16)
"""8 bits as near to full precision as they get: `--quant-group 32`."""


def four_bits(kind: str) -> Packing:
    """What `--load-4bit` makes of weights on a kind of device."""
    return FOUR_BITS if kind == "cpu" else Packing(bits=4, is_grouped=True)


def choose_packing(
    kind: str, load_8bit: bool, load_4bit: bool, quant_group: str | None
) -> Packing | None:
    """What the flags of a worker ask for on this kind of device. Raises `UsageError`."""
    if load_8bit and load_4bit:
        raise UsageError("--load-8bit and --load-4bit exclude each other; choose one")
    if load_4bit:
        return four_bits(kind)
    if quant_group is not None and not load_8bit:
        raise UsageError("--quant-group is a finer form of --load-8bit; give both")
    if not load_8bit:
        return None
    return Packing() if quant_group is None else FINE
