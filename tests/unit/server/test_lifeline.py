"""The child leaves when the supervisor is gone, and its last word arrives."""

from __future__ import annotations

import os
import subprocess
import sys

from chatserve.server.lifeline import MAX_LINE_BYTES, Lifeline, report_to_parent

TIED = """
import sys, time
from chatserve.server.lifeline import tie_to_parent
tie_to_parent(int(sys.argv[1]))
print("tied", flush=True)
time.sleep(1000)
"""


def test_child_ends_with_its_supervisors_end_of_the_line() -> None:
    lifeline = Lifeline()
    with subprocess.Popen(
        [sys.executable, "-c", TIED, str(lifeline.child_fd)],
        pass_fds=(lifeline.child_fd,),
        stdout=subprocess.PIPE,
    ) as child:
        lifeline.close_child_end()
        assert child.stdout is not None and child.stdout.readline() == b"tied\n"
        assert child.poll() is None
        lifeline.close()
        assert child.wait(20) == 1


def test_last_line() -> None:
    lifeline = Lifeline()
    assert lifeline.last_line() is None
    report_to_parent(lifeline.child_fd, "out of\nmemory: ü")
    lifeline.close_child_end()
    assert lifeline.last_line() == "out of memory: ü"
    assert lifeline.last_line() is None
    lifeline.close()


def test_long_last_line_is_cut() -> None:
    lifeline = Lifeline()
    report_to_parent(lifeline.child_fd, "x" * 100_000)
    assert len(lifeline.last_line() or "") == MAX_LINE_BYTES - 1
    lifeline.close()


def test_nobody_left_to_tell() -> None:
    lifeline = Lifeline()
    fd = os.dup(lifeline.child_fd)
    lifeline.close()
    report_to_parent(fd, "hello?")
    os.close(fd)
