"""WaitingLine: who waits for a place in the batch, and whose turn it is. No clock, no tensors.

First those that had a place and lost it. Then interactive ones before those of the batch priority;
within a priority the keys by turns, and each key's own in the order in which they came. Batch waits
while others come, but not for ever: it is passed a few times only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Literal, Protocol, TypeVar

Priority = Literal["interactive", "batch"]
"""Whether somebody sits there and waits."""

MAX_PASSED = 8
"""So many interactive ones may go before a batch one that waits, then it is its turn."""


class Waiting(Protocol):
    """`share`: whose it is; all without a key are one."""

    @property
    def seq_id(self) -> str: ...
    @property
    def share(self) -> bytes: ...
    @property
    def priority(self) -> Priority: ...


Item = TypeVar("Item", bound=Waiting)


class _Turns(Generic[Item]):
    """The lines of one priority, that whose turn it is first."""

    def __init__(self) -> None:
        self._lines: OrderedDict[bytes, OrderedDict[str, Item]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, item: Item) -> None:
        line = self._lines.get(item.share)
        if line is None:
            line = self._lines[item.share] = OrderedDict()
        line[item.seq_id] = item

    def first(self) -> Item:
        return next(iter(next(iter(self._lines.values())).values()))

    def take(self, item: Item) -> None:
        """Its `first`: the next turn is another key's."""
        self._lines.move_to_end(item.share)
        self.remove(item)

    def remove(self, item: Item) -> bool:
        line = self._lines.get(item.share)
        if line is None or line.pop(item.seq_id, None) is None:
            return False
        if not line:
            del self._lines[item.share]
        return True

    def in_order(self) -> Iterator[Item]:
        lines = [iter(line.values()) for line in self._lines.values()]
        while lines:
            lasting = []
            for line in lines:
                item = next(line, None)
                if item is not None:
                    yield item
                    lasting.append(line)
            lines = lasting


class WaitingLine(Generic[Item]):
    """`first` says who is next, `take` takes that one out."""

    def __init__(self) -> None:
        self._returning: OrderedDict[str, Item] = OrderedDict()
        self._interactive: _Turns[Item] = _Turns()
        self._batch: _Turns[Item] = _Turns()
        self._num_passed = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item) -> None:
        """To the end of its key's line."""
        self._turns_of(item).add(item)
        self._count += 1

    def give_back(self, item: Item) -> None:
        """Before all others: it has been taken before."""
        self._returning[item.seq_id] = item
        self._returning.move_to_end(item.seq_id, last=False)
        self._count += 1

    def first(self) -> Item:
        """Only where there is one."""
        if self._returning:
            return next(iter(self._returning.values()))
        if self._is_turn_of_batch(self._num_passed, bool(self._interactive), bool(self._batch)):
            return self._batch.first()
        return self._interactive.first()

    def take(self) -> Item:
        """Take `first` out."""
        item = self.first()
        self._count -= 1
        if self._returning.pop(item.seq_id, None) is not None:
            return item
        self._turns_of(item).take(item)
        self._num_passed = self._passed_after(item.priority, self._num_passed, bool(self._batch))
        return item

    def remove(self, item: Item) -> None:
        """Take `item` out, wherever it stands, if it is there at all."""
        is_there = self._returning.pop(item.seq_id, None) is not None
        if is_there or self._turns_of(item).remove(item):
            self._count -= 1

    def places(self) -> dict[str, int]:
        """The place of each that has never been taken, as it is if nobody else comes; 1 is next."""
        interactive, batch = self._interactive.in_order(), self._batch.in_order()
        person, thing = next(interactive, None), next(batch, None)
        places: dict[str, int] = {}
        place, num_passed = len(self._returning), self._num_passed
        while person is not None or thing is not None:
            is_batch = self._is_turn_of_batch(num_passed, person is not None, thing is not None)
            item = thing if is_batch else person
            assert item is not None
            place += 1
            places[item.seq_id] = place
            if is_batch:
                thing = next(batch, None)
            else:
                person = next(interactive, None)
            num_passed = self._passed_after(item.priority, num_passed, thing is not None)
        return places

    def _turns_of(self, item: Item) -> _Turns[Item]:
        return self._batch if item.priority == "batch" else self._interactive

    @staticmethod
    def _is_turn_of_batch(num_passed: int, has_interactive: bool, has_batch: bool) -> bool:
        return has_batch and (not has_interactive or num_passed >= MAX_PASSED)

    @staticmethod
    def _passed_after(priority: Priority, num_passed: int, has_batch: bool) -> int:
        return num_passed + 1 if priority == "interactive" and has_batch else 0
