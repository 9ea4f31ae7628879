"""Masks of grammars, filled in a thread while the network computes the logits that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor

from chatserve.engine.sampler_state import SamplerState
from chatserve.errors import ChatserveError

Failures = Mapping[SamplerState, ChatserveError]


class Masks:
    """One step's masks at a time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None  # most engines never see a grammar
        self._filling: Future[Failures] | None = None

    def begin(self, states: Rows[SamplerState]) -> None:
        """Fill `allowed` of states with a grammar. Call `finish` before the next, come what may."""
        if not states:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "masks")
        self._filling = self._pool.submit(_fill, states)

    def finish(self) -> Failures:
        """Wait until they are filled. Returns why some are not: those sequences cannot go on."""
        filling, self._filling = self._filling, None
        return {} if filling is None else filling.result()


def _fill(states: Rows[SamplerState]) -> Failures:
    failures: dict[SamplerState, ChatserveError] = {}
    for state in states:
        assert state.matcher is not None
        try:
            state.matcher.fill_mask(state.allowed)
        except ChatserveError as error:
            failures[state] = error
    return failures
