"""Rotary position embedding as a table by position. No network, no cache.

Source: Su et al. 2021, arXiv 2104.09864; scalings as in transformers 5.23 modeling_rope_utils.py.
"""

from __future__ import annotations

import math

import torch

from chatserve.models.config import RopeConfig

_GROWTH = 2048  # positions


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Frequencies of the rotation, (D/2,) float32, for positions within the trained context."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "factors":
        return inverse / torch.tensor(rope.factors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _llama3(inverse, rope)
    return inverse


def _llama3(inverse: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between are blended."""
    wavelength = 2 * math.pi / inverse
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    blend = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * inverse / rope.factor + blend * inverse
    scaled = torch.where(wavelength > longest, inverse / rope.factor, inverse)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, scaled)


class RotaryTable:
    """cos and sin of every position, grown on demand; float32 until the cast to the model's dtype.

    With `dynamic` scaling the base of position p follows from the length p + 1, as it does in
    step-by-step decoding of transformers: the table depends on the position alone, so chunked
    prefill, decode and a resumed sequence agree.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._device = device
        self._dtype = dtype
        self._cos = torch.empty(0, head_dim, device=device, dtype=dtype)
        self._sin = self._cos

    def at(self, positions: torch.Tensor, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin for positions (N,), each (N, 1, D); every position is below `num_positions`."""
        cos, sin = self.tables(num_positions)
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def tables(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of at least the positions below `num_positions`, in order: (P, D).

        The same tensors each time, until more positions are asked for.
        """
        if num_positions > self._cos.shape[0]:
            self._grow(-(-num_positions // _GROWTH) * _GROWTH)
        return self._cos, self._sin

    def _grow(self, num_positions: int) -> None:
        cos, sin = angles(self._rope, self._head_dim, num_positions)
        self._cos = torch.cat((cos, cos), dim=-1).to(device=self._device, dtype=self._dtype)
        # rotate_half's sign lives in the table: out = x * cos + swap(x) * sin
        self._sin = torch.cat((-sin, sin), dim=-1).to(device=self._device, dtype=self._dtype)


def angles(
    rope: RopeConfig, head_dim: int, num_positions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position below `num_positions`, each (num_positions, D/2) float32."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    turns = positions[:, None] * inverse_frequencies(rope, head_dim)
    if rope.kind == "dynamic" and num_positions > rope.original_context:
        tail = positions[rope.original_context :]
        turns[rope.original_context :] = tail[:, None] * _dynamic(rope, head_dim, tail + 1)
    return turns.cos(), turns.sin()


def _dynamic(rope: RopeConfig, dim: int, lengths: torch.Tensor) -> torch.Tensor:
    """Frequencies for sequences of `lengths` (N,) beyond the trained context: (N, D/2)."""
    stretch = rope.factor * lengths / rope.original_context - (rope.factor - 1)
    theta = rope.theta * stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / theta[:, None] ** exponents


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads x (N, H, D) by tables (N, 1, D), halves layout; returns a new tensor."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin
