"""Which stop string ended an answer: the engine says only that one did."""

from __future__ import annotations

from collections.abc import Sequence

from chatserve.engine.output import Detokenizer
from chatserve.engine.sequence import TokenEvent
from chatserve.server.contract import Tokenizer


class StopSequence:
    """Reads the events of one answer. `found` is the stop string that hides its end, if any.

    Of two that begin at the same place the longer one counts.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, strip_leading_space: bool
    ) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._detokenizer = Detokenizer(tokenizer, strip_leading_space=strip_leading_space)
        self._hidden = ""
        self.found: str | None = None

    def feed(self, event: TokenEvent) -> None:
        if not self._stops:
            return
        said = self._hidden + "".join(map(self._detokenizer.add, event.token_ids))
        self._hidden = said[len(event.text) :]
        if event.finish_reason == "stop":
            matches = (stop for stop in self._stops if self._hidden.startswith(stop))
            self.found = next(matches, None)
