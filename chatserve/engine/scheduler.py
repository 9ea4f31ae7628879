"""Who runs in the next step: waiting and running sequences under a token budget. No tensors.

Decode first, then prefill in chunks with what is left of the budget, in the order of the waiting
line. A sequence is admitted when its prompt fits the free blocks with some to spare. Where a
running one finds no block, the youngest is preempted: it gives its blocks back, goes to the front
of the line and computes its tokens again. One whose reader is slow is held: it keeps its blocks as
long as nobody else needs them, and no place in the batch. What is left of a small batch's budget
goes to drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import NamedTuple

from chatserve.engine.block_manager import BlockManager, Copy
from chatserve.engine.sequence import NO_POSITIONS, Phase, SamplingParams, Sequence, Status
from chatserve.engine.waiting_line import WaitingLine
from chatserve.errors import ContextLengthExceeded

logger = logging.getLogger(__name__)

# logits of so many tokens of a prompt at once: 12 MB where the vocabulary has 49,152
_MAX_SCORED = 64
_WATERMARK = 100  # one block in so many stays free at admission, for those that run


class Scheduled(NamedTuple):
    """The next `num_tokens` uncomputed tokens of a sequence take part in the step.

    `is_sampled`: they reach the sequence's end, so that a token is sampled. `draft_ids` are guesses
    of what it will be and what follows, computed in the same step to be kept or thrown away.
    `scored`: positions among them that tell how likely the prompt's next tokens are. `is_final`:
    they reach the end of a sequence that no token is wanted of. `pooled`: positions among them
    whose hidden states are wanted.
    """

    sequence: Sequence
    num_tokens: int
    is_sampled: bool
    draft_ids: Rows[int] = ()
    scored: range = NO_POSITIONS
    is_final: bool = False
    pooled: range = NO_POSITIONS


@dataclass
class Plan:
    """A step's batch, and the blocks to copy before it runs."""

    items: list[Scheduled] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        is_whole = num_tokens == sequence.num_uncomputed
        is_final = is_whole and sequence.params.max_tokens == 0
        scored = sequence.scored_within(sequence.num_computed + num_tokens)
        is_sampled = is_whole and not is_final
        pooled = sequence.pooled_within(sequence.num_computed + num_tokens)
        item = Scheduled(sequence, num_tokens, is_sampled, (), scored, is_final, pooled)
        self.items.append(item)
        self.num_tokens += num_tokens

    def add_draft(self, index: int, draft_ids: Rows[int]) -> None:
        self.items[index] = self.items[index]._replace(draft_ids=draft_ids)
        self.num_tokens += len(draft_ids)


class Scheduler:
    """Keeps the queues; `schedule` plans a step, `complete` moves a sequence along."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_drafting: int = 4,
        by_blocks: bool = False,
    ) -> None:
        """`max_num_drafting`: with more sequences in decode a row is no longer nearly free.

        `by_blocks`: which tokens of a sequence are computed together depends on nothing but itself:
        those of a block of its prompt, and each that was generated alone, also after a preemption.
        Then a step always has room for a block.
        """
        if by_blocks:
            max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs + blocks.block_size)
        self._blocks = blocks
        # a running sequence has a token to compute in every step
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_drafting = max_num_drafting
        self._by_blocks = by_blocks
        self._watermark = blocks.num_blocks // _WATERMARK
        self._line: WaitingLine[Sequence] = WaitingLine()
        # in the order of admission
        self._running: dict[str, Sequence] = {}
        self._held: dict[str, Sequence] = {}
        # per group, the sequence that computes the prompt for all
        self._leaders: dict[str, Sequence] = {}
        self.num_preempted = 0

    def limit_steps(self, num_tokens: int) -> None:
        """Plan no more tokens for a step than so many, but twice the sequences that may run."""
        if not self._by_blocks:
            least = min(self._max_num_batched_tokens, max(num_tokens, 2 * self._max_num_seqs))
            self._max_num_batched_tokens = least

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._line)

    def places(self) -> dict[str, int]:
        """Of those that have never run, by id: how far they are from the front; 1 is next."""
        return self._line.places()

    def check(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        """Raises `ContextLengthExceeded` when such a sequence could never fit, even alone."""
        worst_case = num_prompt_tokens + params.max_tokens
        num_tokens = self._blocks.num_blocks * self._blocks.block_size
        if worst_case > num_tokens:
            raise ContextLengthExceeded(
                f"prompt and max_tokens need {worst_case:,} tokens of KV cache, this machine's "
                f"memory holds {num_tokens:,}; ask for fewer max_tokens",
                param="max_tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that passed `check`; one that was preempted elsewhere comes first."""
        if self._by_blocks and sequence.table.num_shared is None:
            sequence.table.num_shared = sequence.num_prompt_tokens
        if sequence.status is Status.PREEMPTED:
            self._line.give_back(sequence)
        else:
            self._line.add(sequence)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take a finished or aborted sequence out and free its blocks; also while it waits.

        `forget`: keep nothing in the prefix cache of what it alone has computed.
        """
        seq_id = sequence.seq_id
        if self._running.pop(seq_id, None) is None and self._held.pop(seq_id, None) is None:
            self._line.remove(sequence)
        self._blocks.free(sequence.table, forget=forget)
        sequence.status = Status.FINISHED
        self._lead_no_more(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Compute no more of a sequence that has been admitted, until it is released."""
        if self._running.pop(sequence.seq_id, None) is None:
            self._line.remove(sequence)
        # those who wait for its prompt cannot wait for its reader
        self._lead_no_more(sequence)
        self._held[sequence.seq_id] = sequence

    def release(self, sequence: Sequence) -> None:
        """Let a held sequence go on, at once where the batch has a place and it has its blocks."""
        del self._held[sequence.seq_id]
        if sequence.status is Status.RUNNING and len(self._running) < self._max_num_seqs:
            self._running[sequence.seq_id] = sequence
            return
        self._give_up_blocks(sequence)
        self._line.give_back(sequence)

    def phase(self, sequence: Sequence) -> Phase:
        """What it is at. Who waits for the prompt that another computes for it is at its prompt."""
        if sequence.seq_id in self._running:
            return "prefill" if sequence.num_uncomputed > 1 else "decode"
        leader = self._leaders.get(sequence.group) if sequence.group is not None else None
        if leader is not None and sequence.status is Status.WAITING:
            return "prefill" if leader.seq_id in self._running else "waiting"
        return "waiting"

    def _lead_no_more(self, sequence: Sequence) -> None:
        if sequence.group is not None and self._leaders.get(sequence.group) is sequence:
            del self._leaders[sequence.group]

    def schedule(self) -> Plan:
        """Plan the next step; no items when there is nothing to do."""
        plan = Plan()
        running = list(self._running.values())
        prefilling: list[Sequence] = []
        num_preempted = self.num_preempted
        for sequence in running:
            if sequence.num_uncomputed > 1:
                prefilling.append(sequence)
            elif sequence.status is Status.RUNNING and self._make_room(sequence, plan):
                plan.add(sequence, 1)
        num_decoding = len(plan.items)
        for sequence in prefilling:
            if sequence.status is Status.RUNNING:
                self._prefill(sequence, plan)
        if self.num_preempted == num_preempted:
            self._admit(plan)
            if num_decoding <= self._max_num_drafting:
                for index in range(num_decoding):
                    self._draft(plan, index)
        return plan

    def complete(self, item: Scheduled, num_accepted: int = 0) -> None:
        """The tokens of `item` are computed: their blocks can serve others.

        `num_accepted` of its draft have become the sequence's own; the rest leaves no trace.
        """
        sequence = item.sequence
        sequence.num_scored = max(sequence.num_scored, item.scored.stop)
        sequence.num_computed += item.num_tokens + num_accepted
        self._blocks.publish(sequence.table, sequence.token_ids, sequence.num_computed)
        if item.draft_ids:
            self._blocks.trim(sequence.table, sequence.num_computed)
            if sequence.drafter is not None:
                sequence.drafter.learn(len(item.draft_ids), num_accepted)

    def _make_room(self, sequence: Sequence, plan: Plan) -> bool:
        """Find a slot for the next token, if need be by preempting; false if by its own."""
        first = sequence.num_computed
        while not self._blocks.can_append(sequence.table, first, first + 1):
            if self._take_from_held():
                continue
            youngest = next(reversed(self._running.values()))
            self._preempt(youngest)
            if youngest is sequence:
                return False
        plan.copies += self._blocks.append(sequence.table, first, first + 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.seq_id]
        self._give_up_blocks(sequence)
        self._line.give_back(sequence)
        self.num_preempted += 1
        logger.debug("preempted %s: no block is free", sequence.seq_id)

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.table)
        sequence.num_computed = 0
        sequence.status = Status.PREEMPTED

    def _take_from_held(self) -> bool:
        """Free the blocks of one that is held; false when none of them has any."""
        for sequence in reversed(self._held.values()):
            if sequence.status is Status.RUNNING:
                self._give_up_blocks(sequence)
                return True
        return False

    def _prefill(self, sequence: Sequence, plan: Plan) -> None:
        budget = self._max_num_batched_tokens - plan.num_tokens
        if sequence.params.prompt_logprobs is not None:
            budget = min(budget, _MAX_SCORED)
        if self._by_blocks:
            if (num_tokens := self._num_together(sequence)) <= budget:
                plan.add(sequence, num_tokens)
        elif num_tokens := min(sequence.num_uncomputed, budget):
            plan.add(sequence, num_tokens)

    def _num_together(self, sequence: Sequence) -> int:
        """Of a sequence that is computed by blocks."""
        num_left = sequence.num_prompt_tokens - sequence.num_computed
        return min(self._blocks.block_size, num_left) if num_left > 0 else 1

    def _draft(self, plan: Plan, index: int) -> None:
        sequence = plan.items[index].sequence
        if sequence.drafter is None:
            return
        # one token comes without any draft
        num_wanted = sequence.params.max_tokens - sequence.num_generated_tokens - 1
        budget = self._max_num_batched_tokens - plan.num_tokens
        draft_ids = sequence.drafter.draft(min(num_wanted, budget))
        first = len(sequence.token_ids)
        end = first + len(draft_ids)
        if draft_ids and self._blocks.can_append(sequence.table, first, end):
            plan.copies += self._blocks.append(sequence.table, first, end)
            plan.add_draft(index, draft_ids)

    def _admit(self, plan: Plan) -> None:
        while (
            self._line
            and len(self._running) < self._max_num_seqs
            and plan.num_tokens < self._max_num_batched_tokens
        ):
            sequence = self._line.first()
            leader = self._find_leader(sequence)
            is_new = sequence.status is Status.WAITING
            if leader is sequence or not is_new:
                if not self._allocate(sequence, plan):
                    return
            elif not self._fork(leader, sequence, plan):
                return
            if is_new:
                sequence.num_cached_tokens = sequence.num_computed
                plan.admitted.append(sequence.seq_id)
            self._line.take()
            sequence.status = Status.RUNNING
            self._running[sequence.seq_id] = sequence
            self._prefill(sequence, plan)

    def _find_leader(self, sequence: Sequence) -> Sequence:
        """Who computes the prompt: the first of its group that is still there, perhaps itself."""
        if sequence.group is None or not sequence.table.reads_cache or self._by_blocks:
            return sequence
        leader = self._leaders.setdefault(sequence.group, sequence)
        is_alike = leader is sequence or (
            leader.prompt_ids == sequence.prompt_ids and leader.table.salt == sequence.table.salt
        )
        return leader if is_alike else sequence

    def _allocate(self, sequence: Sequence, plan: Plan) -> bool:
        # who is alone is admitted in any case: `check` has seen that it fits
        num_spare = 1 + self._watermark if self._running else 0
        while not self._blocks.can_allocate(sequence.table, sequence.token_ids, num_spare):
            if not self._take_from_held():
                return False
        sequence.num_computed, copies = self._blocks.allocate(sequence.table, sequence.token_ids)
        plan.copies += copies
        return True

    def _fork(self, leader: Sequence, sequence: Sequence, plan: Plan) -> bool:
        """Share the leader's prompt once it is computed; the last token is computed again."""
        num_prompt = sequence.num_prompt_tokens
        if leader.num_computed < num_prompt:
            return False
        while self._blocks.num_free_blocks < 2 + self._watermark:
            if not self._take_from_held():
                return False
        self._blocks.fork(leader.table, sequence.table, num_prompt)
        sequence.num_computed = num_prompt - 1
        plan.copies += self._blocks.append(sequence.table, num_prompt - 1, num_prompt)
        return True
