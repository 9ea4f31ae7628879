"""Dying of SIGKILL at a chosen moment of a run, for the processes that tests start to be killed.

A moment is a number of Python and C calls, not a time: the same on a busy machine.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple


class Moment(NamedTuple):
    """The `call`-th call of a run, or of its end."""

    is_end: bool
    call: int


class Killer:
    """Counts calls of this thread; at its moment the process kills itself as `kill -9` would."""

    def __init__(self, end: tuple[str, str], moment: Moment | None = None) -> None:
        """`end`: a function, and a part of its file's name, with whose call a run's end begins."""
        self._function, self._file = end
        self._moment = moment
        self.num_calls = 0
        self._end_call: int | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        if event not in ("call", "c_call"):
            return
        self.num_calls += 1
        code = frame.f_code
        if event == "call" and code.co_name == self._function and self._file in code.co_filename:
            self._end_call = self.num_calls
        if self._moment in (Moment(False, self.num_calls), Moment(True, self.num_end_calls)):
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def num_end_calls(self) -> int:
        return -1 if self._end_call is None else self.num_calls - self._end_call

    def watch(self, run: Callable[[], object]) -> None:
        sys.setprofile(self)
        run()
        sys.setprofile(None)

    def watch_in_child(self, run: Callable[[], object]) -> bool:
        """True when it was killed."""
        pid = os.fork()
        if pid == 0:
            self.watch(run)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def moments(self, kills: int, *, share: float) -> list[Moment]:
        """Of a run watched whole: half anywhere in its first `share`, half over its end."""
        choose = random.Random(0)
        most = int(self.num_calls * share)
        anywhere = [Moment(False, choose.randint(1, most)) for _ in range(kills // 2)]
        left = kills - len(anywhere)
        return anywhere + [Moment(True, self.num_end_calls * i // left) for i in range(left)]
