"""What makes an adapter a reward model: the text that it rates, and the number that comes of it.

Plain numbers and texts; knows no network, no HTTP and no files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatserve.errors import ModelLoadError

QUESTION, ANSWER = "{question}", "{answer}"
DEFAULT_TEMPLATE = f"Question: {QUESTION}\n\nAnswer: {ANSWER}"
"""Of the StackLLaMA recipe; `chatserve train reward` writes its own beside the adapter."""

Turn = tuple[str, str]
"""A question and the answer to it."""


@dataclass(frozen=True, eq=False)
class Reward:
    """The score head of a reward model, and the text that it was trained on.

    weight: (hidden,). template: has `{question}`, and behind it `{answer}`, each once. end_ids:
    what ends every text that is rated, as it did in training.
    """

    weight: NDArray[np.float64]
    template: str = DEFAULT_TEMPLATE
    end_ids: tuple[int, ...] = ()

    def score(self, state: NDArray[np.float32]) -> float:
        """Of the hidden state (hidden,), behind the final norm, of a text's last token."""
        return float(self.weight @ state.astype(np.float64))

    def text(self, question: str, answer: str) -> str:
        """A pair, as the model reads it."""
        return f"{self.before(question)}{answer}{self.after}"

    def before(self, question: str, earlier: Iterable[Turn] = ()) -> str:
        """What comes in front of an answer; `earlier` turns of the chat have the same form."""
        asked, _, _ = self.template.partition(ANSWER)
        turns = [self.text(*turn) for turn in earlier]
        # a question may hold the words of the template itself: they are put in, not looked for
        first, _, second = asked.partition(QUESTION)
        return "\n\n".join([*turns, f"{first}{question}{second}"])

    @property
    def after(self) -> str:
        """What comes behind an answer."""
        _, _, after = self.template.partition(ANSWER)
        return after


def check_template(template: str, where: str) -> str:
    """`template`, which `where` names. Raises `ModelLoadError` for one that no pair fits into."""
    places = [template.find(QUESTION), template.find(ANSWER)]
    counts = [template.count(QUESTION), template.count(ANSWER)]
    if counts != [1, 1] or places[0] > places[1]:
        raise ModelLoadError(
            f"{where}: the template {template[:80]!r} must have {QUESTION} once and {ANSWER} once "
            "behind it; correct it, or take it out for the usual one, "
            f"{DEFAULT_TEMPLATE!r}"
        )
    return template
