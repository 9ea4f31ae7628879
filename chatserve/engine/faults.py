"""Faults of single sequences: what they are told, and when they are the engine's own.

A network may fail at one request and go on with all others. Where it fails several times in a row,
with no token between, or at all requests of a step, the engine tries itself out: what fails at
that, too, has to be replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from typing import Any

from chatserve.engine.block_manager import BlockManager, BlockTable
from chatserve.engine.runner import Runner
from chatserve.engine.scheduler import Scheduled
from chatserve.engine.sequence import SamplingParams, Sequence, TokenEvent
from chatserve.errors import (
    ChatserveError,
    EngineStopped,
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    StartupError,
)
from chatserve.models.memory import is_out_of_memory

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3


def told(seq_id: str, error: Exception) -> ChatserveError:
    """What whoever waits for the sequence is told of a fault. A bug also goes to the log."""
    if isinstance(error, ChatserveError) and not isinstance(error, StartupError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(
            "the device ran out of memory while it generated this answer; "
            "shorten the conversation or ask for fewer max_tokens"
        )
    logger.error("sequence %s failed: %s", seq_id, error, exc_info=error)
    return GenerationFailed(f"the engine failed on this request: {type(error).__name__}")


class Faults:
    """Of one engine, whose `blocks` and `runner` are used to try it out."""

    def __init__(self, blocks: BlockManager, runner: Runner[Any]) -> None:
        self._blocks = blocks
        self._runner = runner
        self.num_in_a_row = 0

    def note(self, error: Exception) -> None:
        # what a request may not ask for is not the engine's fault
        self.num_in_a_row += not isinstance(error, InvalidRequest)

    def judge(self, events: Rows[TokenEvent]) -> None:
        """After a step that ended in `events`.

        Raises `EngineStopped` where it is the engine: what has failed might go well elsewhere.
        """
        if any(event.error is None for event in events):
            self.num_in_a_row = 0
        is_common = len(events) > 1 and self.num_in_a_row >= len(events)
        if is_common or self.num_in_a_row >= MAX_IN_A_ROW:
            logger.warning("%d faults in a row: the engine tries itself out", self.num_in_a_row)
            self.num_in_a_row = 0
            self._try_out()

    def _try_out(self) -> None:
        table = BlockTable(reads_cache=False)
        sequence = Sequence("", (0,), SamplingParams(max_tokens=1), seed=0, table=table)
        if not self._blocks.can_allocate(table, sequence.token_ids):
            return
        self._blocks.allocate(table, sequence.token_ids)
        try:
            logits, _ = self._runner.run([Scheduled(sequence, 1, is_sampled=True)])
            is_sound = not logits.isnan().any()
        except Exception as error:  # whatever it is, it is nobody's request
            raise EngineStopped("the engine fails at whatever it is given") from error
        finally:
            self._blocks.free(table, forget=True)
        if not is_sound:
            raise EngineStopped("the engine computes no finite logits any more")
