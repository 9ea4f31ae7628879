"""The engine: `add`, `abort`, `step`. Synchronous; has never heard of HTTP, asyncio or threads."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Sequence as Rows
from typing import Any, Protocol

import torch

from chatserve.engine.block_manager import BLOCK_SIZE, BlockManager, BlockTable
from chatserve.engine.faults import Faults, told
from chatserve.engine.masks import Failures, Masks
from chatserve.engine.output import OutputText, ShownTokenBytes, TokenBytes
from chatserve.engine.pooling import Pooler
from chatserve.engine.runner import Runner
from chatserve.engine.sampler import build_sampler, on_host
from chatserve.engine.sampler_state import SamplerState
from chatserve.engine.say_again import say_again
from chatserve.engine.scheduler import Scheduled, Scheduler
from chatserve.engine.sequence import (
    Begun,
    FinishReason,
    LoadedAdapter,
    Phase,
    SamplingParams,
    Sequence,
    TokenEvent,
    TokenLogprobs,
)
from chatserve.engine.speaker import Scores, Speaker
from chatserve.engine.speculation import Drafter
from chatserve.engine.turn import Live, Turn
from chatserve.engine.waiting_line import Priority
from chatserve.errors import (
    GenerationFailed,
    InvalidRequest,
)
from chatserve.models.batch import Model

logger = logging.getLogger(__name__)


class EngineTokenizer(TokenBytes, Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def forbidden_ids(self) -> frozenset[int]: ...

    @property
    def strips_leading_space(self) -> bool: ...


class Engine:
    """Generates several sequences at once."""

    def __init__(
        self,
        model: Model[Any],
        tokenizer: EngineTokenizer,
        *,
        num_kv_tokens: int,
        num_warm_tokens: int | None = None,
        block_size: int = BLOCK_SIZE,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        seed: int | None = None,
        speculation: bool = False,
        by_blocks: bool = False,
    ) -> None:
        """`num_kv_tokens`: of how many tokens memory holds keys and values, in whole blocks.
        `num_warm_tokens`: see `BlockManager`, for a pool that is committed as it is used.

        `speculation`: let sequences guess from their own past, a few tokens a step. It changes how
        soon a text comes, not what it is, where a row's logits do not depend on its neighbours.
        `by_blocks`: see `Scheduler`.
        """
        self.model = model
        self._tokenizer = tokenizer
        self._blocks = BlockManager(
            num_kv_tokens // block_size,
            block_size,
            num_warm_blocks=None if num_warm_tokens is None else num_warm_tokens // block_size,
        )
        self._runner = Runner(model, self._blocks.num_blocks, block_size)
        self._faults = Faults(self._blocks, self._runner)
        self._vocab_size = model.vocab_size
        # a tokenizer may know padding that the model has no row for
        forbidden_ids = sorted(id_ for id_ in tokenizer.forbidden_ids if id_ < model.vocab_size)
        self._sampler = build_sampler(model, forbidden_ids)
        self._speaker = Speaker(self._sampler, tokenizer.eos_ids)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            by_blocks=by_blocks,
        )
        self._seed = seed
        self._speculation = speculation
        self._masks = Masks()
        self._live: dict[str, Live] = {}
        self.admitted: Rows[str] = ()
        """Sequences whose turn has come, for the first time, in the last step."""

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_held(self) -> int:
        return self._scheduler.num_held

    @property
    def num_preempted(self) -> int:
        """How often a running sequence has had to give its blocks back."""
        return self._scheduler.num_preempted

    @property
    def num_kv_tokens(self) -> int:
        """Of how many there is place for the keys and values."""
        return self._blocks.num_blocks * self._blocks.block_size

    @property
    def num_free_kv_tokens(self) -> int:
        return self._blocks.num_free_blocks * self._blocks.block_size

    def phase(self, seq_id: str) -> Phase:
        """What a sequence is at, for its deadlines; one that is not known yet waits. From any
        thread: it may be a step ahead or behind."""
        live = self._live.get(seq_id)
        return "waiting" if live is None else self._scheduler.phase(live.sequence)

    def read(self, token_ids: Rows[int]) -> torch.Tensor:
        """Logits (N, V) after each token of a text; only before the first sequence is added.

        No more tokens than a step and the cache hold.
        """
        return self._runner.read(token_ids)

    def limit_steps(self, num_tokens: int) -> None:
        """No step has more tokens than so many, or than running sequences need."""
        self._scheduler.limit_steps(num_tokens)

    def check(self, prompt_ids: Rows[int], params: SamplingParams) -> None:
        """Raises `InvalidRequest` for a prompt that is empty or has ids the model has no row for,
        `ContextLengthExceeded` when memory could never hold such a sequence.

        Reads constants only: safe to call from another thread.
        """
        if not prompt_ids:
            raise InvalidRequest("the prompt has no tokens; send some text")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._vocab_size:
            raise InvalidRequest(
                f"the prompt has token ids outside the model's {self._vocab_size:,}: the tokenizer "
                "knows tokens that the model lacks; leave them out, or repair the model's files"
            )
        self._scheduler.check(len(prompt_ids), params)

    def draw_seed(self) -> int:
        """For a request that brings none: the base seed, else a new one. From any thread."""
        return self._seed if self._seed is not None else secrets.randbits(63)

    def add(
        self,
        seq_id: str,
        prompt_ids: Rows[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        group: str | None = None,
        salt: bytes = b"",
        adapter: LoadedAdapter | None = None,
        strip_leading_space: bool = False,
        priority: Priority = "interactive",
        begun: Begun | None = None,
    ) -> Rows[TokenEvent]:
        """Queue a sequence. `choice` tells the n answers of one request apart.

        The prompt is computed once for all of a `group` that have the same; prompts that begin
        alike share that beginning's keys and values if their `salt` and `adapter` are the same.
        `strip_leading_space` drops the space that a word-start mark puts before an answer.
        Where sequences have to wait, salts take turns, and those of priority `batch` come later.

        Returns the events of what it has `begun` with elsewhere; it may have ended with them.

        Raises what `check` raises, and `InvalidRequest` where it cannot have begun so.
        """
        assert seq_id not in self._live, f"sequence {seq_id} exists already"
        self.check(prompt_ids, params)
        seed = params.seed if params.seed is not None else self.draw_seed()
        share = salt
        if adapter is not None:
            salt = hashlib.sha256(salt + adapter.fingerprint.encode()).digest()
        # the mean needs all tokens' states; nor should documents drive chats from the cache
        num_shared = 0 if params.pooling == "mean" else None
        table = BlockTable(salt, reads_cache=params.prompt_logprobs is None, num_shared=num_shared)
        sequence = Sequence(
            seq_id, tuple(prompt_ids), params, seed, choice, group, table, adapter=adapter,
            share=share, priority=priority,
        )  # fmt: skip
        # a grammar's mask is known for the next token only
        if self._speculation and params.grammar is None and params.max_tokens > 1:
            sequence.drafter = Drafter(sequence.token_ids)
        output = OutputText(
            ShownTokenBytes(self._tokenizer, params.shown) if params.shown else self._tokenizer,
            params.stop,
            strip_leading_space=strip_leading_space and self._tokenizer.strips_leading_space,
        )
        state = SamplerState(
            params, sequence.prompt_ids, seed=seed, choice=choice, end_ids=self._tokenizer.eos_ids,
            vocab_size=self._vocab_size,
        )  # fmt: skip
        pooler = Pooler(params.pooling, len(prompt_ids)) if params.pooling else None
        live = Live(sequence, output, state, pooler)
        said: list[TokenEvent] = []
        if begun is not None:
            said = say_again(
                live, begun, end_ids=self._tokenizer.eos_ids, vocab_size=self._vocab_size
            )
        if not (said and said[-1].is_last):
            self._live[seq_id] = live
            self._scheduler.add(sequence)
        return said

    def abort(self, seq_id: str) -> None:
        """Forget a sequence and free what it holds; unknown and finished ones are left alone."""
        if live := self._live.pop(seq_id, None):
            self._scheduler.remove(live.sequence)

    def hold(self, seq_id: str) -> None:
        """Compute no more of a sequence that has begun to speak, until `release`; one that has
        ended is left alone."""
        if live := self._live.get(seq_id):
            self._scheduler.hold(live.sequence)

    def release(self, seq_id: str) -> None:
        """Let a held sequence go on; any other is left alone."""
        if live := self._live.get(seq_id):
            self._scheduler.release(live.sequence)

    def places(self) -> dict[str, int]:
        """Of the sequences that have never run: their place among those who wait; 1 is next."""
        return self._scheduler.places()

    def step(self) -> list[TokenEvent]:
        """Run one batch. Returns an event for each sequence that got a token, ended or failed.

        A fault in the model fails only the sequences whose own retry fails too. A device that is
        lost raises, and so do several faults in a row where the engine cannot do a thing by itself
        either: no retry can help, the process has to be replaced.
        """
        events = self._step()
        if self._faults.num_in_a_row:
            self._faults.judge(events)
        return events

    def _step(self) -> list[TokenEvent]:
        plan = self._scheduler.schedule()
        self.admitted = plan.admitted
        batch = plan.items
        if not batch:
            return []
        self._runner.copy(plan.copies)
        try:
            return self._run(batch)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # whatever a model raises, other sequences go on
            if len(batch) == 1 and not batch[0].draft_ids:
                return [self._fail(batch[0].sequence, error)]
            logger.warning("a batch of %d failed, each runs alone now: %s", len(batch), error)
        return [event for item in batch for event in self._run_alone(item)]

    def _run_alone(self, item: Scheduled) -> list[TokenEvent]:
        try:
            if item.is_sampled and item.sequence.num_uncomputed > item.num_tokens:
                raise GenerationFailed("the engine failed in the middle of a step; try again")
            return self._run([item._replace(draft_ids=())])
        except torch.AcceleratorError:
            raise
        except Exception as error:  # as in `step`: this sequence alone fails
            return [self._fail(item.sequence, error)]

    def _run(self, batch: Rows[Scheduled]) -> list[TokenEvent]:
        early: list[SamplerState | None] = []
        masked: list[SamplerState] = []
        wants_logprobs = False
        for item in batch:
            params = item.sequence.params
            wants_logprobs |= params.logprobs is not None or params.prompt_logprobs is not None
            early += [None] * len(item.scored)
            if item.is_sampled:
                state = self._live[item.sequence.seq_id].state
                if state.matcher is None:
                    early.append(state)
                else:  # its mask may take longer than the step
                    early.append(None)
                    masked.append(state)
                early += [None] * len(item.draft_ids)  # depends on what is picked before it
        self._masks.begin(masked)
        try:
            ahead = self._sampler.ahead(early)
            logits, hidden = self._runner.run(batch, ahead)
        finally:
            failures = self._masks.finish()
        scores: Scores = {}
        if wants_logprobs:
            logits = on_host(logits)
            scores = self._speaker.score(batch, logits)
        turns = self._turns(batch, failures)
        picked = ahead.token_ids if ahead else None
        self._speaker.say(turns.values(), logits, picked, wants_logprobs=wants_logprobs)
        if hidden is not None:
            self._pool(batch, hidden)
        events = []
        for item in batch:
            seq_id = item.sequence.seq_id
            turn = turns.get(seq_id)
            self._scheduler.complete(item, turn.num_accepted if turn else 0)
            if turn or item.is_final or seq_id in scores:
                events.append(self._close(item, turn, scores.get(seq_id, ())))
        return events

    def _pool(self, batch: Rows[Scheduled], hidden: torch.Tensor) -> None:
        """Hand the states to those that become embeddings. Nothing may fail in the step after it:
        a retry would hand them over twice."""
        first = 0
        for item in batch:
            pooler = self._live[item.sequence.seq_id].pooler
            if pooler and item.pooled:
                end = first + len(item.pooled)
                pooler.add(item.pooled.start, hidden[first:end])
                first = end

    def _turns(self, batch: Rows[Scheduled], failures: Failures) -> dict[str, Turn]:
        """One for each sequence that gets a token, with its place in the logits."""
        turns: dict[str, Turn] = {}
        row = 0
        for item in batch:
            row += len(item.scored)
            if item.is_sampled:
                live = self._live[item.sequence.seq_id]
                turn = Turn(live.sequence, live.state, live.output, item.draft_ids, row)
                turns[item.sequence.seq_id] = turn
                turn.error = failures.get(live.state) if failures else None
                row += 1 + len(item.draft_ids)
        return turns

    def _close(
        self, item: Scheduled, turn: Turn | None, scores: tuple[TokenLogprobs | None, ...]
    ) -> TokenEvent:
        """Say what became of the sequence."""
        sequence = item.sequence
        if turn and turn.error:
            return self._fail(sequence, turn.error)
        reason: FinishReason | None = "length" if item.is_final else None
        if turn:
            reason = turn.reason
        embedding = None
        pooler = self._live[sequence.seq_id].pooler
        if reason and pooler:
            embedding = pooler.embedding()
            if embedding is None:
                return self._fail(sequence, GenerationFailed("the model computed no finite states"))
        if reason:
            self.abort(sequence.seq_id)
        return TokenEvent(
            seq_id=sequence.seq_id,
            text=turn.text if turn else "",
            token_ids=tuple(turn.token_ids) if turn else (),
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_generated_tokens=sequence.num_generated_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            finish_reason=reason,
            logprobs=tuple(turn.logprobs) if turn else (),
            prompt_logprobs=scores,
            embedding=embedding,
        )

    def _fail(self, sequence: Sequence, error: Exception) -> TokenEvent:
        del self._live[sequence.seq_id]
        # whatever spoiled its numbers may be in what it has stored
        self._scheduler.remove(sequence, forget=True)
        self._faults.note(error)
        return TokenEvent(
            seq_id=sequence.seq_id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_generated_tokens=sequence.num_generated_tokens,
            error=told(sequence.seq_id, error),
        )
