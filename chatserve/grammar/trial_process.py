"""The worker's end of the trial process: started for the first spec, kept, replaced when dead."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chatserve.errors import GenerationFailed
from chatserve.grammar.limits import START_S, TRIAL_BYTES, TRIAL_S
from chatserve.grammar.trial import TOO_SLOW
from chatserve.grammar.vocabulary import Vocabulary
from chatserve.helper_process import HelperProcess

logger = logging.getLogger(__name__)

# its children end by the clock themselves; only a process that has stopped is later
PATIENCE_S = 1.0
_MODULE = "chatserve.grammar.trial"


@dataclass(frozen=True)
class Passed:
    """text: the grammar for llguidance. num_bytes: what it takes compiled."""

    text: str
    num_bytes: int


@dataclass(frozen=True)
class Failed:
    """reason: behind the name of the field that is at fault. is_late: a calmer machine might do."""

    reason: str
    is_late: bool = False


class TrialProcess:
    """Tries one spec at a time. For one thread at a time."""

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        *,
        seconds: float = TRIAL_S,
        num_bytes: int = TRIAL_BYTES,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._num_bytes = num_bytes
        self._patience_s = patience_s
        self._process: HelperProcess | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def run(self, kind: str, source: str, *, after_space: bool) -> Passed | Failed:
        """Raises `GenerationFailed` when the process cannot be started."""
        request = {
            "kind": kind, "source": source, "after_space": after_space,
            "seconds": self._seconds, "num_bytes": self._num_bytes,
        }  # fmt: skip
        result = self._ask(request)
        if "grammar" in result:
            return Passed(result["grammar"], result["num_bytes"])
        if "rejected" in result:
            return Failed(result["rejected"])
        if result["failure"] == TOO_SLOW:
            return Failed(
                f"took longer than {self._seconds:g} s to compile; make it smaller: fewer "
                "alternatives, lower counts of repetition",
                is_late=True,
            )
        return Failed(
            f"needs more than {self._num_bytes >> 20} MB to compile, or is nested too deeply; make "
            "it smaller and flatter"
        )

    def close(self) -> None:
        """End the process, whatever it is doing; there will be no other. From any thread."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()  # whoever waits for its answer notices

    def end(self) -> None:
        """End the process and wait for it; the next spec starts another."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        for _ in range(2):
            is_warm = self._process is not None
            process = self._process or self._start()
            seconds = self._seconds + self._patience_s
            try:
                process.send(request, seconds=seconds)
                result = process.receive(seconds=seconds)
            except TimeoutError:
                self.end()
                return {"failure": TOO_SLOW}
            except OSError:
                result = None
            if result is not None:
                return dict(result)
            self.end()
            if not is_warm:
                break
            # somebody has killed it since the last spec
            logger.info("the process that tries grammars has gone; starting another")
        raise GenerationFailed("the process that tries grammars ended by itself; try again")

    def _start(self) -> HelperProcess:
        if self._is_closed:
            raise GenerationFailed("the server is about to stop; try again")
        try:
            self._process = process = HelperProcess(_MODULE)
            process.send(self._vocabulary().to_json(), seconds=START_S)
            if process.receive(seconds=START_S) is None:
                raise ConnectionError("it ended at once")
        except OSError as error:
            self.end()
            raise GenerationFailed(
                f"the process that tries grammars did not start ({error}); try again"
            ) from error
        return process
