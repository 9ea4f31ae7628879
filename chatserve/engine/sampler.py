"""Logits to token ids, row by row. Pure: nothing is remembered between calls.

Each row has its own parameters, history and random number, and its arithmetic never mixes with its
neighbours', so a sequence gets the same text alone and in a busy batch. The random number of a
token is a hash of (seed, choice, position).
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from chatserve.engine.sequence import SamplingParams

_TOP_P_CANDIDATES = 1024


@dataclass(frozen=True)
class SamplingRow:
    """What the sampler needs to know of one sequence.

    `prompt_ids` and `generated_ids` feed the penalties; `position` is the index of the token to be
    sampled, counted from the start of the prompt. `masked_ids` are never produced.
    """

    params: SamplingParams
    seed: int
    choice: int
    position: int
    prompt_ids: Rows[int]
    generated_ids: Rows[int]
    masked_ids: Rows[int] = ()


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    data = struct.pack("<qqq", seed, choice, position)
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Rows[SamplingRow]) -> list[int]:
    """Pick one id for each row of logits (R, V), any float dtype and device.

    A row with a NaN or without any finite logit gives -1: the caller fails that sequence alone.
    """
    if all(_is_plain_greedy(row) for row in rows):
        best = logits.argmax(dim=-1)
        healthy = torch.isfinite(logits.gather(1, best[:, None])[:, 0])
        return torch.where(healthy, best, -1).tolist()
    scores = logits.float().cpu()
    return [_sample_row(scores[index], row) for index, row in enumerate(rows)]


def _is_plain_greedy(row: SamplingRow) -> bool:
    params = row.params
    return (
        params.is_greedy
        and not params.logit_bias
        and not row.masked_ids
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
    )


def _sample_row(logits: torch.Tensor, row: SamplingRow) -> int:
    """`logits` (V,) float32 on the CPU."""
    params = row.params
    logits = penalise(logits, row)
    best = int(logits.argmax())  # a NaN counts as the largest
    if not torch.isfinite(logits[best]):
        return -1
    if params.is_greedy:
        return best
    probabilities, ids = distribution(logits, params)
    cumulative = probabilities.double().cumsum(0)
    point = uniform(row.seed, row.choice, row.position) * cumulative[-1]
    index = int(torch.searchsorted(cumulative, point, right=True))
    index = min(index, len(probabilities) - 1)
    return index if ids is None else int(ids[index])


def penalise(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """Penalties and biases on logits (V,) float32; returns a new tensor where anything changes.

    Repetition (Keskar et al. 2019, arXiv 1909.05858 §4.1) counts prompt and answer; presence and
    frequency (OpenAI's formula) count generated tokens only.
    """
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.generated_ids}), dtype=torch.int64)
        values = logits[seen]
        factor = params.repetition_penalty
        logits = logits.index_copy(
            0, seen, torch.where(values > 0, values / factor, values * factor)
        )
    if (params.presence_penalty or params.frequency_penalty) and row.generated_ids:
        counts = Counter(row.generated_ids)
        ids = torch.tensor(list(counts), dtype=torch.int64)
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        logits = logits.index_add(
            0, ids, -(params.presence_penalty + params.frequency_penalty * times)
        )
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        logits = logits.index_add(0, ids, torch.tensor(list(params.logit_bias.values())))
    if row.masked_ids:
        logits = logits.index_fill(0, torch.tensor(list(row.masked_ids)), -torch.inf)
    return logits


def distribution(
    logits: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities that the filters leave, and their ids (None: in vocabulary order, all of them).

    logits: (V,) float32. Order of filters: temperature, top-k, top-p, min-p. The probabilities are
    not normalised again after filtering.
    """
    probabilities = torch.softmax(logits / params.temperature, dim=-1)
    is_filtered = 0 < params.top_k < len(logits) or params.top_p < 1
    if not is_filtered and params.min_p <= 0:
        return probabilities, None
    if params.top_k > 0:
        values, ids = probabilities.topk(min(params.top_k, len(logits)))
    elif params.top_p < 1:
        values, ids = _largest_up_to(probabilities, params.top_p)
    else:
        ids = (probabilities >= params.min_p * probabilities.max()).nonzero()[:, 0]
        return probabilities[ids], ids
    if params.top_p < 1:
        total = values.double().sum() if params.top_k > 0 else 1.0
        before = values.double().cumsum(0) - values
        keep = before < params.top_p * total
        keep[0] = True
        values, ids = values[keep], ids[keep]
    if params.min_p > 0:
        keep = values >= params.min_p * values[0]
        values, ids = values[keep], ids[keep]
    return values, ids


def _largest_up_to(probabilities: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probabilities in descending order, enough to hold `mass`; rarely sorts all."""
    count = min(_TOP_P_CANDIDATES, len(probabilities))
    values, ids = probabilities.topk(count)
    if count < len(probabilities) and float(values.double().sum()) < mass:
        values, ids = probabilities.sort(descending=True, stable=True)
    return values, ids
