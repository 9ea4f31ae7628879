"""GrammarCompiler: from what a request says to a grammar for the engine, tried first, then kept.

One thread compiles; answers that wait for a grammar hold up nothing else. A spec that fails is
remembered as well as one that does not.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatserve.engine.grammar import GrammarOrigin, GrammarSpec
from chatserve.errors import InvalidRequest, Overloaded
from chatserve.grammar.limits import (
    LATE_S,
    MAX_CACHED,
    MAX_CACHED_BYTES,
    MAX_GRAMMAR_BYTES,
    MAX_WAITING,
    MAX_WAITING_OF_ONE,
)
from chatserve.grammar.matcher import Grammar, Rejected, short_reason
from chatserve.grammar.one_of import places_of_one_of
from chatserve.grammar.trial_process import Failed, TrialProcess
from chatserve.grammar.vocabulary import Tokenizer, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    grammar: Grammar
    num_bytes: int


@dataclass(frozen=True)
class Refused:
    """reason: behind the name of the field that is at fault. until: by the monotonic clock."""

    reason: str
    until: float = math.inf


@dataclass(frozen=True)
class _Job:
    """A spec on its way. salts: of who waits for it; the first one's share is charged."""

    future: Future[Outcome]
    salts: list[bytes] = field(default_factory=list)


Outcome = Compiled | Refused
Key = tuple[str, str, bool]
_FAILED_BYTES = 1024
# what llguidance says, and what to do about it
_WAYS_OUT = (
    ("NoExtension", "matches no answer at all: it has a part that never ends, or contradicts "
     "itself"),
    ("special token", "names a token, which is not supported; write its text in quotes"),
    ("items; max is", "is too ambiguous, or has too many optional parts at one place; make it "
     "smaller or less ambiguous"),
    ("Too many items", "is too ambiguous, or has too many optional parts at one place; make it "
     "smaller or less ambiguous"),
    ("too many expressions", "has an expression that is too large; lower its counts of repetition"),
    ("fuel exhausted", "has an expression that is too large; lower its counts of repetition"),
    ("panic", "is not accepted by llguidance; make it simpler"),
)  # fmt: skip


class GrammarCompiler:
    """For one model. Costs nothing before `prepare` or the first spec. Safe to use from any thread.

    `stop_ids` end an answer as the tokenizer's own end ids do.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_ids: Iterable[int] = (),
        *,
        trial: TrialProcess | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = tuple(stop_ids)
        self._trial = trial or TrialProcess(self._read_vocabulary)
        self._built: LLTokenizer | None = None
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[Key, Outcome] = OrderedDict()
        self._under_way: dict[Key, _Job] = {}
        self._thread: ThreadPoolExecutor | None = None

    async def compile(
        self, spec: GrammarSpec, *, after_space: bool = False, salt: bytes = b""
    ) -> Grammar:
        """The grammar of `spec`; `after_space`: of answers whose first space is taken away.

        Raises `InvalidRequest` naming the spec's field where it cannot be compiled within the
        limits, `Overloaded` where too many wait, of all or of `salt`.
        """
        key = (spec.kind, spec.source, after_space)
        outcome = self._outcome(key, salt)
        if isinstance(outcome, _Job):
            job = outcome
            try:
                # other requests may wait for the same: one that gives up must not cancel it
                outcome = await asyncio.shield(asyncio.wrap_future(job.future))
            finally:
                self._leave(key, job, salt)
        if isinstance(outcome, Refused):
            raise InvalidRequest(f"{spec.param} {outcome.reason}", param=spec.param)
        return outcome.grammar

    def prepare(self) -> None:
        """Build what all grammars need, before there are any streams. llguidance keeps the
        interpreter to itself meanwhile, 0.1 s for 50,000 tokens: they would all stand still.

        What goes wrong here, the first spec will say.
        """
        try:
            self._build()
        except Exception:  # a server without grammars serves all else
            logger.warning("grammars cannot be prepared", exc_info=True)

    def close(self) -> None:
        """End the trial process and the thread; a spec that is being tried fails."""
        self._trial.close()
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.submit(self._trial.end)
            thread.shutdown()

    def _outcome(self, key: Key, salt: bytes) -> Outcome | _Job:
        with self._lock:
            known = self._outcomes.get(key)
            if isinstance(known, Refused) and known.until < time.monotonic():
                known = None
            if known is not None:
                self._outcomes.move_to_end(key)
                return known
            job = self._under_way.get(key)
            if job is None:
                self._check_room(salt)
                job = self._under_way[key] = _Job(self._executor().submit(self._settle, key))
            job.salts.append(salt)
            return job

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammar")
        return self._thread

    def _check_room(self, salt: bytes) -> None:
        if len(self._under_way) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} grammars and schemas wait to be compiled; try again")
        num_own = sum(job.salts[:1] == [salt] for job in self._under_way.values())
        if salt and num_own >= MAX_WAITING_OF_ONE:
            raise Overloaded(
                f"{MAX_WAITING_OF_ONE} grammars and schemas of this API key wait to be compiled; "
                "try again when one of them is done"
            )

    def _leave(self, key: Key, job: _Job, salt: bytes) -> None:
        """One waits no longer for `job`; one that nobody waits for is not begun."""
        with self._lock:
            job.salts.remove(salt)
            if not job.salts and job.future.cancel():
                del self._under_way[key]

    def _settle(self, key: Key) -> Outcome:
        try:
            outcome = self._compile(key)
        except BaseException:
            with self._lock:
                del self._under_way[key]
            raise
        with self._lock:
            del self._under_way[key]
            self._outcomes[key] = outcome
            while len(self._outcomes) > MAX_CACHED or self._num_bytes() > MAX_CACHED_BYTES:
                self._outcomes.popitem(last=False)
        return outcome

    def _num_bytes(self) -> int:
        return sum(
            len(source) + (each.num_bytes if isinstance(each, Compiled) else _FAILED_BYTES)
            for (_, source, _), each in self._outcomes.items()
        )

    def _compile(self, key: Key) -> Outcome:
        kind, source, after_space = key
        started_at = time.monotonic()
        if not self._read_vocabulary().end_ids:
            return Refused("needs a model that has an end token; this one has none")
        found = self._trial.run(kind, source, after_space=after_space)
        if isinstance(found, Failed):
            until = time.monotonic() + LATE_S if found.is_late else math.inf
            return Refused(_way_out(found.reason, kind, source), until)
        if found.num_bytes > MAX_GRAMMAR_BYTES:
            return Refused(
                f"takes {found.num_bytes >> 20} MB compiled, the limit is "
                f"{MAX_GRAMMAR_BYTES >> 20} MB; make it smaller"
            )
        built = self._build()
        assert built is not None, "it has an end token"
        try:
            grammar = Grammar.compile(built, found.text, GrammarOrigin(*key))
        except Rejected as error:
            return Refused(_way_out(short_reason(str(error)), kind, source))
        logger.info(
            "compiled a grammar (%s, %d bytes) in %.0f ms",
            kind, len(source), (time.monotonic() - started_at) * 1e3,
        )  # fmt: skip
        return Compiled(grammar, found.num_bytes)

    def _build(self) -> LLTokenizer | None:
        """None for a model without an end token."""
        if self._built is None and self._read_vocabulary().end_ids:
            self._built = self._read_vocabulary().build()
        return self._built

    def _read_vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self._tokenizer, self._vocab_size, self._stop_ids)
        return self._vocabulary


def _way_out(reason: str, kind: str, source: str) -> str:
    for sign, words in _WAYS_OUT:
        if sign in reason:
            return words
    if "oneOf constraints are not supported" in reason:
        places = places_of_one_of(kind, source)
        return (
            f"has a oneOf{f' ({places})' if places else ''} whose parts are not plainly disjoint; "
            "give each a property with another const, or use anyOf"
        )
    starts = ("is ", "takes ", "took ", "needs ", "has ")
    return reason if reason.startswith(starts) else f"cannot be compiled: {reason}"
