"""Measures forms of a model against itself in full precision, one layer of all in memory at a time.

The hidden states of a text pass through a layer of the reference and of each form before the next
layer is read. Each tensor is read once, some rows at a time: the reference multiplies by them, the
forms pack them. Knows no terminal and stores nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.receipt import NUM_QUANTILES, LayerError, MeasuredForm, Measurement
from chatserve.models.weights import WeightSource
from chatserve.progress import Progress
from chatserve.quality.divergence import Divergence, next_losses, perplexity
from chatserve.quality.reference import Windows, run_layer
from chatserve.quality.served import EMBEDDING, ServedForm, build_form
from chatserve.quality.texts import TokenText

_SLICE_VALUES = 1 << 20  # of a matrix, read at a time
_BLOCK = 64  # positions whose logits are there at once: for as many the kernels keep a buffer


@dataclass(frozen=True)
class Result:
    """What was measured, a measurement for each policy in its order."""

    reference_perplexity: float
    measurements: tuple[Measurement, ...]


def measure(
    checkpoint: Checkpoint,
    config: ModelConfig,
    policies: Sequence[DevicePolicy],
    text: TokenText,
    *,
    progress: Progress | None = None,
) -> Result:
    """Read `text` in each policy's form and in full precision.

    The caller has checked the checkpoint's tensors against `config`. Raises `DoesNotFit`, and
    `ModelLoadError` when a form computes no numbers.
    """
    run = _Run(checkpoint, config, policies, text, progress or (lambda done, total: None))
    with torch.inference_mode():
        return run.result()


@dataclass
class _Candidate:
    """One form, its hidden states on their own way, and what has been found of it."""

    policy: DevicePolicy
    served: ServedForm
    x: torch.Tensor
    layers: list[LayerError]
    divergence: Divergence

    def layer_done(self, index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """`before`, `after`: the reference's hidden states at both ends of the layer."""
        self.x = self.served.run_layer(self.x)
        given_the_same = self.served.run_layer(before)
        added = _relative(given_the_same - after, after - before)
        self.layers.append(LayerError(index, added, _relative(self.x - after, after)))

    def measurement(self) -> Measurement:
        kl = self.divergence.divergences
        share, error = self.divergence.agreement
        points = torch.linspace(0, 1, NUM_QUANTILES + 1, dtype=kl.dtype)
        return Measurement(
            form=MeasuredForm.of(self.policy),
            mean_kl=_rounded(kl.mean()),
            p99_kl=_rounded(kl.quantile(0.99)),
            top1_agreement=_rounded(share),
            top1_error=_rounded(error),
            perplexity=_rounded(self.divergence.perplexity),
            quantiles=tuple(map(_rounded, kl.quantile(points))),
            layers=tuple(self.layers),
        )


class _Run:
    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, policies: Sequence[DevicePolicy],
        text: TokenText, progress: Progress,
    ) -> None:  # fmt: skip
        self._weights = checkpoint.weights
        self._config = config
        self._lengths = [len(window) for window in text.windows]
        self._ids = torch.tensor([token for window in text.windows for token in window])
        self._next_ids = torch.cat([torch.tensor([*window[1:], -1]) for window in text.windows])
        self._policies = policies
        self._head = EMBEDDING if config.is_tied else "lm_head.weight"
        num_passes = 1 + math.ceil(len(self._ids) / _BLOCK)
        infos = self._weights.tensors()
        num_bytes = {name: info.num_bytes for name, info in infos.items()}
        of_layers = sum(size for name, size in num_bytes.items() if ".layers." in name)
        self._meter = _Meter(of_layers + num_passes * num_bytes[self._head], num_bytes, progress)

    def result(self) -> Result:
        x, candidates = self._embedded()
        windows = Windows.of(self._config, self._lengths)
        for index in range(self._config.num_layers):
            for each in candidates:
                each.served.begin_layer(index)
            rows = _LayerRows(self._reader(), f"model.layers.{index}.", candidates)
            before, x = x, run_layer(self._config, index, x, rows, windows)
            for each in candidates:
                each.layer_done(index, before, x)
        losses = self._compare_logits(x, candidates)
        return Result(_rounded(perplexity(losses)), tuple(c.measurement() for c in candidates))

    def _reader(self) -> _Reader:
        return _Reader(self._weights, self._meter)

    def _embedded(self) -> tuple[torch.Tensor, list[_Candidate]]:
        ids, places = torch.unique(self._ids, return_inverse=True)
        rows = torch.cat(
            [self._weights.read(EMBEDDING, range(token, token + 1)) for token in ids.tolist()]
        )

        def candidate(policy: DevicePolicy) -> _Candidate:
            served = build_form(self._config, policy, self._lengths)
            return _Candidate(policy, served, served.embed(rows, places), [], Divergence())

        return rows.float()[places], [candidate(policy) for policy in self._policies]

    def _compare_logits(self, x: torch.Tensor, candidates: Sequence[_Candidate]) -> list[float]:
        """Fills the candidates' divergences; returns the reference's losses."""
        norm = self._weights.read("model.norm.weight")
        for each in candidates:
            each.served.begin_head(_BLOCK)
            each.served.load_norm(norm)
        for start, rows in self._reader().slices(self._head):
            for each in candidates:
                each.served.load_head(start, rows)
        losses: list[float] = []
        kept = torch.empty(_BLOCK, self._config.vocab_size)
        for start in range(0, len(x), _BLOCK):
            part = slice(start, start + _BLOCK)
            normed = F.rms_norm(x[part], x.shape[1:], norm.float(), self._config.rms_norm_eps)
            reference = kept[: len(normed)]
            for row, weight in self._reader().slices(self._head):
                reference[:, row : row + len(weight)] = normed @ weight.float().T
            logits = [each.served.logits(each.x[part]) for each in candidates]
            for few in self._few_rows(len(normed)):
                next_ids = self._next_ids[part][few]
                log_probabilities = reference[few].log_softmax(-1)
                losses += next_losses(log_probabilities, next_ids)
                for each, its in zip(candidates, logits, strict=True):
                    each.divergence.add(its[few], log_probabilities, next_ids)
        return losses

    def _few_rows(self, num_rows: int) -> Iterator[slice]:
        """All, but so few at a time that what is computed of them takes no room."""
        step = max(1, _SLICE_VALUES // self._config.vocab_size)
        return (slice(start, start + step) for start in range(0, num_rows, step))


class _Meter:
    """How many bytes of all that will be read have been."""

    def __init__(self, total: int, num_bytes: Mapping[str, int], progress: Progress) -> None:
        self._total, self._num_bytes, self._progress = total, num_bytes, progress
        self._done = 0.0

    def add(self, name: str, share: float) -> None:
        self._done += self._num_bytes[name] * share
        self._progress(min(self._total, round(self._done)), self._total)


class _Reader:
    """Rows of matrices in the dtype of the file."""

    def __init__(self, weights: WeightSource, meter: _Meter) -> None:
        self._weights = weights
        self._meter = meter
        self.infos = weights.tensors()

    def slices(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of a whole matrix, some at a time."""
        shape = self.infos[name].shape
        step = max(1, _SLICE_VALUES // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            end = min(start + step, shape[0])
            yield start, self._weights.read(name, range(start, end))
            self._meter.add(name, (end - start) / shape[0])

    def vector(self, name: str) -> torch.Tensor:
        self._meter.add(name, 1)
        return self._weights.read(name)


class _LayerRows:
    """A layer's tensors for the reference, each handed to the forms on the way."""

    def __init__(self, reader: _Reader, prefix: str, candidates: Sequence[_Candidate]) -> None:
        self._reader, self._prefix, self._candidates = reader, prefix, candidates

    def slices(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        for start, rows in self._reader.slices(self._prefix + name):
            self._hand_on(name, start, rows)
            yield start, rows.float()

    def vector(self, name: str) -> torch.Tensor:
        values = self._reader.vector(self._prefix + name)
        self._hand_on(name, 0, values)
        return values.float()

    def num_rows(self, name: str) -> int:
        return self._reader.infos[self._prefix + name].shape[0]

    def _hand_on(self, name: str, start: int, rows: torch.Tensor) -> None:
        for each in self._candidates:
            each.served.load(name, start, rows)


def _relative(error: torch.Tensor, whole: torch.Tensor) -> float:
    """Mean over positions of their lengths' ratio; a few positions are hundreds of times as long as
    the others, and would be all that counts in a ratio of sums."""
    ratio = error.norm(dim=1) / whole.norm(dim=1).clamp_min(1e-30)
    return _rounded(ratio.mean())


def _rounded(value: torch.Tensor | float) -> float:
    """Six digits: more are noise."""
    return float(f"{float(value):.6g}")
