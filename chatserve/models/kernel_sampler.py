"""The compiled sampler: logits and sequences' records in, token ids out. No formulas, no policy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chatserve.errors import DoesNotFit
from chatserve.kernels import library
from chatserve.kernels.library import Kernels, KernelsUnavailable
from chatserve.models.kernel_matrix import Team, check


class SamplingRecord(library.Sampling):
    """How one sequence's next token is picked, as the kernels read it.

    It holds addresses only: whoever fills it keeps the arrays alive.
    """

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class KernelSampler:
    """Picks ids of logits (R, V), each row for itself, on the threads of a team."""

    def __init__(
        self, kernels: Kernels, team: Team, vocab_size: int, forbidden_ids: Sequence[int] = ()
    ) -> None:
        """Raises `DoesNotFit` when there is no memory."""
        self._functions = kernels.functions
        self._team = team
        self._vocab_size = vocab_size
        forbidden = np.array(sorted(forbidden_ids), dtype=np.int32)
        handle = self._functions.cs_sampler_create(
            kernels.level_name, team.handle, vocab_size, forbidden.ctypes.data, len(forbidden)
        )
        if not handle:
            raise DoesNotFit(f"no memory to sample from {vocab_size:,} tokens")
        self.handle: int = handle
        library.destroy_with(self, self._functions.cs_sampler_destroy, handle)

    def sample(
        self, logits: torch.Tensor, addresses: Sequence[int], places: Sequence[int] | None = None
    ) -> list[int]:
        """An id for each record at `addresses`, from rows `places` of logits (R, V), or all in
        order; -1 for a row with a NaN, with +inf or without any finite logit.

        Overwrites the logits where they are float32 on the CPU.
        """
        if logits.dtype is not torch.float32 or not logits.is_cpu:
            logits = logits.to("cpu", torch.float32)
        stride, step = logits.stride()
        if step != 1 or stride < self._vocab_size:
            logits = logits.contiguous()
            stride = logits.shape[1]
        num_rows = len(addresses)
        out = (ctypes.c_int32 * num_rows)()
        check(
            self._functions.cs_sampler_sample(
                self.handle, logits.data_ptr(), stride, logits.shape[0],
                None if places is None else (ctypes.c_int32 * num_rows)(*places),
                (ctypes.c_void_p * num_rows)(*addresses), num_rows, out,
            )
        )  # fmt: skip
        return list(out)


@dataclass(slots=True)
class Ahead:
    """What a network needs to pick tokens while their logits are in its caches, and those tokens.

    `sampler` is on the network's own team. `samplings`: (R,) addresses of records, 0 for a row to
    leave alone. `token_ids`: (R,), -1 as in `KernelSampler.sample`, without meaning for rows left
    alone; None where the network has no such art.
    """

    sampler: KernelSampler
    samplings: Sequence[int]
    token_ids: Sequence[int] | None = None


def build_kernel_sampler(
    vocab_size: int, forbidden_ids: Sequence[int] = (), *, team: Team | None = None
) -> KernelSampler | None:
    """A sampler on `team`, or on the caller's thread alone; None where there are no kernels."""
    try:
        kernels = library.load_kernels()
    except KernelsUnavailable:
        return None
    return KernelSampler(kernels, team or Team(kernels, 1), vocab_size, forbidden_ids)
