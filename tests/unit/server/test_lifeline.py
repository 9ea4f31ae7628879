"""The child leaves when the supervisor is gone, and its last word arrives."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from chatserve.server.lifeline import MAX_LINE_CHARS, LastWords, Lifeline, report_to_parent

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


BY_KERNEL = """
import os, subprocess, sys, time
fd = int(sys.argv[1])
code = (
    "import os, signal, sys, time; from chatserve.server.lifeline import tie_to_parent; "
    f"tie_to_parent({fd}, by_kernel=True); print(os.getpid(), flush=True); "
    "os.kill(os.getpid(), signal.SIGSTOP)"
)
subprocess.Popen([sys.executable, "-c", code], pass_fds=(fd,))
time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_child_that_hangs_is_ended_by_the_kernel() -> None:
    """A stopped process cannot see the end of its line; here that never even comes."""
    lifeline = Lifeline()
    fd = lifeline.child_fd
    with subprocess.Popen(
        [sys.executable, "-c", BY_KERNEL, str(fd)], pass_fds=(fd,), stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        _, alive = psutil.wait_procs([child], timeout=20)
    lifeline.close()
    assert not alive


def test_last_words() -> None:
    lifeline = Lifeline()
    assert lifeline.last_words() is None
    report_to_parent(lifeline.child_fd, "out of\nmemory: ü", True)
    lifeline.close_child_end()
    assert lifeline.last_words() == LastWords("out of memory: ü", is_final=True)
    assert lifeline.last_words() is None
    lifeline.close()


def test_long_last_words_are_cut() -> None:
    lifeline = Lifeline()
    report_to_parent(lifeline.child_fd, "🦙" * 100_000, False)
    assert lifeline.last_words() == LastWords("🦙" * MAX_LINE_CHARS, is_final=False)
    lifeline.close()


def test_words_that_make_no_sense_are_none() -> None:
    lifeline = Lifeline()
    os.write(lifeline.child_fd, b"{oops")
    assert lifeline.last_words() is None
    lifeline.close()


def test_nobody_left_to_tell() -> None:
    lifeline = Lifeline()
    fd = os.dup(lifeline.child_fd)
    lifeline.close()
    report_to_parent(fd, "hello?", True)
    os.close(fd)
