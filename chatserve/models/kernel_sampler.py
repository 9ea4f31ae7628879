"""The compiled sampler: logits and sequences' records in, token ids and logprobs out.

No formulas, no policy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

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

    def logprobs(
        self,
        logits: torch.Tensor,
        addresses: Sequence[int],
        places: Sequence[int],
        token_ids: Sequence[int],
        num_tops: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Of rows `places` of logits (R, V) float32 on the CPU, each stored in one piece: natural
        logarithms of the probabilities with which the records at `addresses` pick `token_ids`.

        The logits are as `sample` has left them, or a step that has picked ahead. Returns
        (N, 1 + T) logprobs, first each token's own, then its `num_tops` likeliest ones', falling,
        whose ids are in (N, T), -1 where there are no more; T is the largest of `num_tops`. NaN for
        a row that `sample` has no id for.
        """
        num_rows, most = len(addresses), max(num_tops)
        logprobs = np.empty((num_rows, 1 + most), np.float32)
        top_ids = np.empty((num_rows, most), np.int32)
        check(
            self._functions.cs_sampler_logprobs(
                self.handle, logits.data_ptr(), logits.stride(0), logits.shape[0],
                (ctypes.c_int32 * num_rows)(*places), (ctypes.c_void_p * num_rows)(*addresses),
                (ctypes.c_int32 * num_rows)(*token_ids), (ctypes.c_int32 * num_rows)(*num_tops),
                num_rows, most, logprobs.ctypes.data, top_ids.ctypes.data,
            )
        )  # fmt: skip
        return logprobs, top_ids

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
