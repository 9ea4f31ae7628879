"""Known ways in which reinforcement learning goes wrong, watched while it runs.

A policy finds what its reward model overrates: the published run of StackLLaMA met answers full of
code fences, and a divergence below zero where lengths were forced. A `Health` compares the last
steps with the first ones and says what to change. No tensors, no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

Kind = Literal["repetition", "code-fences", "negative-kl", "length-bias"]

_RUN = 16  # characters; shorter ones recur in any text
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)

# Judged on small and published runs: well above what answers of the first steps do by themselves.
_MORE_REPETITION = 0.15  # of a text's characters, than at first
_MORE_FENCES = 2.0  # an answer, than at first
_BELOW_ZERO = 1.0  # nats an answer; less is within what a few samples scatter
_ERRORS = 3.0  # standard errors below zero
_CORRELATION = 0.6  # of reward and length: above it, length explains over a third of the reward
_MIN_ANSWERS = 40  # for a correlation


@dataclass(frozen=True)
class StepFacts:
    """One step's answers: their texts, lengths in tokens, rewards without penalty, and the
    divergence from the reference in nats an answer."""

    texts: Sequence[str]
    lengths: Sequence[int]
    rewards: Sequence[float]
    kl: float


@dataclass(frozen=True)
class Finding:
    """Something that has gone wrong: what is seen, and what to change."""

    kind: Kind
    message: str


@dataclass(frozen=True)
class _Summary:
    """What is kept of a step."""

    repetition: float
    fences: float
    reward: float
    kl: float
    lengths: tuple[int, ...]
    rewards: tuple[float, ...]


class Health:
    """Watches steps; each kind of trouble is told once, and again after it had gone."""

    def __init__(self, window: int = 10) -> None:
        """`window`: of so many steps at the beginning and at the end means are compared."""
        self._window = window
        self._first: list[_Summary] = []
        self._last: list[_Summary] = []
        self._told: set[Kind] = set()

    def observe(self, facts: StepFacts) -> list[Finding]:
        """Take in a step; what there is to say after it."""
        summary = _Summary(
            repetition=fmean(repetition(text) for text in facts.texts),
            fences=fmean(len(_FENCE.findall(text)) for text in facts.texts),
            reward=fmean(facts.rewards),
            kl=facts.kl,
            lengths=tuple(facts.lengths),
            rewards=tuple(facts.rewards),
        )
        if len(self._first) < self._window:
            self._first.append(summary)
        self._last = [*self._last, summary][-self._window :]
        if len(self._last) < self._window:
            return []
        found = [
            finding
            for finding in (
                self._repetition(), self._code_fences(), self._negative_kl(), self._length_bias()
            )
            if finding is not None
        ]  # fmt: skip
        new = [finding for finding in found if finding.kind not in self._told]
        self._told = {finding.kind for finding in found}
        return new

    def state(self) -> Mapping[str, Any]:
        """For a checkpoint, as JSON holds it."""
        return {
            "first": [asdict(each) for each in self._first],
            "last": [asdict(each) for each in self._last],
            "told": sorted(self._told),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._first = [_read(each) for each in state["first"]]
        self._last = [_read(each) for each in state["last"]]
        self._told = set(state["told"])

    def _repetition(self) -> Finding | None:
        before, now = _mean(self._first, "repetition"), _mean(self._last, "repetition")
        if now < before + _MORE_REPETITION or not self._reward_rose():
            return None
        return Finding(
            "repetition",
            f"answers repeat themselves: {now:.0%} of their characters are in runs said before "
            f"({before:.0%} at first), and the reward likes it ({self._rewards()}); hold them "
            "nearer to the reference (a higher --init-kl, a lower --target-kl), show the "
            "reward model such answers as rejected ones, or go back to an earlier checkpoint",
        )

    def _code_fences(self) -> Finding | None:
        before, now = _mean(self._first, "fences"), _mean(self._last, "fences")
        if now < before + _MORE_FENCES or not self._reward_rose():
            return None
        return Finding(
            "code-fences",
            f"answers have {now:.1f} code fences each ({before:.1f} at first), and the reward "
            f"likes it ({self._rewards()}): the reward model takes fences for good answers; hold "
            "them nearer to the reference (a higher --init-kl, a lower --target-kl), or "
            "train the reward model on more pairs in which both sides have code",
        )

    def _negative_kl(self) -> Finding | None:
        values = [each.kl for each in self._last]
        mean = fmean(values)
        error = math.sqrt(
            sum((each - mean) ** 2 for each in values) / len(values) / (len(values) - 1)
        )
        if mean > -_BELOW_ZERO or mean > -_ERRORS * error:
            return None
        return Finding(
            "negative-kl",
            f"the divergence from the reference is {mean:.1f} nats an answer over "
            f"{len(values)} steps, which no real divergence is: answers are not drawn from the "
            "policy itself, and the penalty rewards leaving the reference; draw with --temperature "
            "1 --top-k 0 --top-p 1, let answers end by themselves (--end stop), and try --rollout "
            "shared",
        )

    def _length_bias(self) -> Finding | None:
        lengths = [length for each in self._last for length in each.lengths]
        rewards = [reward for each in self._last for reward in each.rewards]
        if len(lengths) < _MIN_ANSWERS:
            return None
        found = correlation(lengths, rewards)
        if abs(found) < _CORRELATION:
            return None
        way = "long" if found > 0 else "short"
        return Finding(
            "length-bias",
            f"the reward follows the length (correlation {found:.2f} over {len(lengths)} answers): "
            f"the policy learns to be {way}, not good; train the reward model on pairs of about "
            "the same length, or bring --min-new-tokens and --max-new-tokens closer together",
        )

    def _reward_rose(self) -> bool:
        return _mean(self._last, "reward") > _mean(self._first, "reward")

    def _rewards(self) -> str:
        return f"{_mean(self._first, 'reward'):.2f} at first, {_mean(self._last, 'reward'):.2f} now"


def repetition(text: str) -> float:
    """The share of a text's runs of 16 characters that have occurred in it before: 0 … 1."""
    num_runs = len(text) - _RUN + 1
    if num_runs < 2:
        return 0.0
    return 1 - len({text[start : start + _RUN] for start in range(num_runs)}) / num_runs


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    mean_x, mean_y = fmean(xs), fmean(ys)
    product = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    squares = sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys)
    return product / math.sqrt(squares) if squares > 0 else 0.0


def _mean(steps: Sequence[_Summary], name: str) -> float:
    return fmean(getattr(each, name) for each in steps)


def _read(table: Mapping[str, Any]) -> _Summary:
    lists = {"lengths": tuple(table["lengths"]), "rewards": tuple(table["rewards"])}
    return _Summary(**{**table, **lists})
