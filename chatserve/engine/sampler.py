"""Logits to token ids, row by row: in C++ where the kernels are, else in the same words in PyTorch.

A row's arithmetic never mixes with its neighbours', so a sequence gets the same text alone and in a
busy batch. The functions below the class are the reference that the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch

from chatserve.engine.sampler_state import SamplerState, min_p_margin, uniform
from chatserve.engine.sequence import SamplingParams, TokenLogprobs
from chatserve.models.batch import Model
from chatserve.models.kernel_sampler import Ahead, KernelSampler, build_kernel_sampler


def build_sampler(model: Model[Any], forbidden_ids: Rows[int]) -> Sampler:
    """With the kernels where there are any, on the model's own threads if it has a team of them."""
    team = getattr(model, "team", None)
    kernel = build_kernel_sampler(model.vocab_size, forbidden_ids, team=team)
    return Sampler(forbidden_ids, kernel, can_pick_ahead=team is not None)


class Sampler:
    """Picks a token for each of a step's sequences."""

    def __init__(
        self,
        forbidden_ids: Rows[int] = (),
        kernel: KernelSampler | None = None,
        *,
        can_pick_ahead: bool = False,
    ) -> None:
        """`forbidden_ids` are never picked; a `kernel` knows them already. `can_pick_ahead`: the
        kernel is on the model's own team."""
        self._forbidden_ids = torch.tensor(forbidden_ids, dtype=torch.int64)
        self._kernel = kernel
        self._can_pick_ahead = can_pick_ahead

    def ahead(self, states: Rows[SamplerState | None]) -> Ahead | None:
        """For the logits of a step, of which those with a state are sampled in any case."""
        if self._kernel is None or not self._can_pick_ahead:
            return None
        return Ahead(self._kernel, [state.address if state else 0 for state in states])

    def sample(
        self, logits: torch.Tensor, states: Rows[SamplerState], places: Rows[int] | None = None
    ) -> list[int]:
        """Pick one id for each state, from rows `places` of logits (R, V), or all in order.

        Any float dtype and device. A row with a NaN, with +inf or without any finite logit gives
        -1: the caller fails that sequence alone. Logits of `on_host` are left as they were sampled
        from, others may be.
        """
        if not states:
            return []
        if logits.device.type != "cpu" and all(state.is_plain_greedy for state in states):
            return self._argmax(logits if places is None else logits[list(places)])
        if self._kernel is not None:
            return self._kernel.sample(logits, [state.address for state in states], places)
        return self._sample_rows(logits.to("cpu", torch.float32), states, places)

    @torch.inference_mode()
    def _sample_rows(
        self, rows: torch.Tensor, states: Rows[SamplerState], places: Rows[int] | None
    ) -> list[int]:
        token_ids = []
        for place, state in zip(places or range(len(states)), states, strict=True):
            rows[place] = adjust(rows[place], state, self._forbidden_ids)
            token_ids.append(sample_row(rows[place], state))
        return token_ids

    def logprobs(
        self,
        logits: torch.Tensor,
        states: Rows[SamplerState],
        places: Rows[int],
        token_ids: Rows[int],
        num_tops: Rows[int],
    ) -> list[TokenLogprobs | None]:
        """How likely each of `token_ids` was, from rows `places` of logits (R, V) of `on_host`.

        The logits are those that the tokens were sampled from. None for a row that gives no token.
        """
        if not states:
            return []
        if self._kernel is None:
            rows = zip(states, places, token_ids, num_tops, strict=True)
            return [
                row_logprobs(logits[place], state.params, token_id, num_top)
                for state, place, token_id, num_top in rows
            ]
        addresses = [state.address for state in states]
        values, top_ids = self._kernel.logprobs(logits, addresses, places, token_ids, num_tops)
        rows_of_values, rows_of_ids = values.tolist(), top_ids.tolist()
        return [
            TokenLogprobs(token_id, own, tuple(_until_none(ids, rest)[:num_top]))
            if own == own
            else None
            for token_id, (own, *rest), ids, num_top in zip(
                token_ids, rows_of_values, rows_of_ids, num_tops, strict=True
            )
        ]

    def _argmax(self, logits: torch.Tensor) -> list[int]:
        if self._forbidden_ids.numel():
            self._forbidden_ids = self._forbidden_ids.to(logits.device)
            logits = logits.index_fill(1, self._forbidden_ids, -torch.inf)
        best = logits.argmax(dim=-1)
        is_healthy = torch.isfinite(logits.gather(1, best[:, None])[:, 0])
        return torch.where(is_healthy, best, -1).tolist()


def on_host(logits: torch.Tensor) -> torch.Tensor:
    """Logits (R, V) float32 on the CPU, each row in one piece; themselves where they are so."""
    logits = logits.to("cpu", torch.float32)
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def adjust(
    logits: torch.Tensor, state: SamplerState, forbidden_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Penalties, biases and masks on logits (V,) float32; returns a new tensor.

    Repetition (Keskar et al. 2019, arXiv 1909.05858 §4.1) counts prompt and answer; presence and
    frequency (OpenAI's formula) count generated tokens only.
    """
    logits = logits.clone()
    seen_ids, offset_ids = torch.from_numpy(state.seen_ids), torch.from_numpy(state.offset_ids)
    values, penalty = logits[seen_ids], state.params.repetition_penalty
    logits[seen_ids] = torch.where(values > 0, values / penalty, values * penalty)
    logits[offset_ids] += torch.from_numpy(state.offsets)
    logits[torch.from_numpy(state.masked_ids)] = -torch.inf
    if forbidden_ids is not None:
        logits[forbidden_ids] = -torch.inf
    if state.matcher is not None:
        logits[torch.from_numpy(state.ruled_out[: len(logits)])] = -torch.inf
    return logits


def sample_row(logits: torch.Tensor, state: SamplerState) -> int:
    """Pick an id of adjusted logits (V,) float32 on the CPU; -1 as in `Sampler.sample`."""
    best = int(logits.argmax())  # a NaN counts as the largest, the first of equals is taken
    if not torch.isfinite(logits[best]):
        return -1
    if state.params.is_greedy:
        return best
    cumulative = weights(logits, state.params).cumsum(0)
    point = uniform(state.seed, state.choice, state.position) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True))


def row_logprobs(
    logits: torch.Tensor, params: SamplingParams, token_id: int, num_top: int
) -> TokenLogprobs | None:
    """Of adjusted logits (V,) float32; None where `sample_row` gives -1. See `TokenLogprobs`."""
    if not torch.isfinite(logits.max()):
        return None
    if params.is_greedy:
        params = SamplingParams()
    mass = weights(logits, params)
    best, total = logits.max().double(), mass.sum().log()

    def logprob(id_: int) -> float:
        return float((logits[id_].double() - best) / params.temperature - total)

    kept = torch.where(mass > 0, logits, -torch.inf)
    top_ids = kept.sort(descending=True, stable=True).indices[:num_top].tolist()
    top = [(id_, logprob(id_)) for id_ in top_ids if kept[id_] > -torch.inf]
    return TokenLogprobs(token_id, logprob(token_id), tuple(top))


def weights(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """(V,) float64: e^((logit - largest) / temperature) of the ids that the filters keep, else 0.

    Order of filters: top-k, top-p, min-p; temperature comes before them all. Of equal logits the
    lower ids are kept first.
    """
    best = logits.max().double()
    kept = logits
    if 0 < params.top_k < len(logits):
        kept = _keep_largest(kept, params.top_k)
    if params.top_p < 1:
        kept = _keep_largest(kept, _num_up_to(kept, params.top_p, params.temperature))
    if params.min_p > 0:
        kept = torch.where(kept.double() >= best + min_p_margin(params), kept, -torch.inf)
    return _weigh(kept, best, params.temperature)


def _weigh(logits: torch.Tensor, best: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.exp((logits.double() - best) / temperature)


def _keep_largest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """All but the `count` largest logits become -inf."""
    limit = logits.topk(count).values[-1]
    is_above, is_equal = logits > limit, logits == limit
    is_kept = is_above | (is_equal & (is_equal.cumsum(0) <= count - is_above.sum()))
    return torch.where(is_kept, logits, -torch.inf)


def _num_up_to(logits: torch.Tensor, top_p: float, temperature: float) -> int:
    """How many of the largest logits it takes to hold a share `top_p` of all weight."""
    mass = _weigh(logits, logits.max().double(), temperature)
    wanted = top_p * mass.sum()
    # all that weigh less than their part of what may be missing are missing; mostly nearly all
    heavy = logits[mass * len(logits) >= mass.sum() - wanted]
    heavy = heavy.sort(descending=True).values
    before = _weigh(heavy, heavy[0].double(), temperature).cumsum(0)
    return 1 + int((before[:-1] < wanted).sum())


def _until_none(ids: list[int], logprobs: list[float]) -> list[tuple[int, float]]:
    return [(id_, logprob) for id_, logprob in zip(ids, logprobs, strict=True) if id_ >= 0]
