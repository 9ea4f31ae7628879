"""Back-off, giving up, and the real ends of real children."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import (
    CrashLoop,
    DoesNotFit,
    HubError,
    ModelLoadError,
    RegistrationFailed,
    StartupError,
    UsageError,
)
from chatserve.server import supervisor
from chatserve.server.supervisor import (
    RestartPolicy,
    Supervisor,
    count_oom_kills,
    describe_exit,
)


def test_pauses_double_and_then_it_gives_up() -> None:
    """However long each start takes, and however soon after it is ready it ends."""
    policy = RestartPolicy()
    readiness = [0.0, 1.0, 59.0, 0.0, 30.0, 0.0]
    assert [policy.pause_s(ready_s) for ready_s in readiness] == [0.5, 1, 2, 4, 8, None]


def test_who_was_ready_for_long_begins_anew() -> None:
    policy = RestartPolicy()
    for _ in range(4):
        assert [policy.pause_s(ready_s) for ready_s in (60.0, 0.0, 59.0)] == [0.5, 1, 2]
    assert [policy.pause_s(1e6) for _ in range(20)] == [0.5] * 20


def test_pause_is_capped() -> None:
    policy = RestartPolicy(max_restarts=7)
    assert [policy.pause_s(0.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 8, 8, None]


def test_describe_exit() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL"
    assert describe_exit(-200) == "killed by signal 200"


def test_who_was_killed_for_want_of_memory_is_said_to_have_been() -> None:
    assert "ran out of memory" in describe_exit(-signal.SIGKILL, num_oom_kills=1)
    assert "memory" not in describe_exit(-signal.SIGTERM, num_oom_kills=1)


def vmstat(folder: Path, num_oom_kills: int) -> Path:
    file = folder / "vmstat"
    file.write_text(f"nr 1\noom_kill {num_oom_kills}\n", "ascii")
    return file


def test_what_the_system_has_killed_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "VMSTAT", vmstat(tmp_path, 7))
    assert count_oom_kills() == 7
    monkeypatch.setattr(supervisor, "VMSTAT", tmp_path / "macos")
    assert count_oom_kills() == 0


@pytest.mark.parametrize("num_oom_kills", [1, 0])
def test_the_last_line_tells_of_the_systems_memory(
    num_oom_kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux counts, the child is killed: as when its memory ran out. And killed by somebody."""
    monkeypatch.setattr(supervisor, "VMSTAT", vmstat(tmp_path, 0))
    count = f"f = {str(tmp_path / 'vmstat')!r}; n = int(open(f).read().split()[3]); "
    add = f"open(f, 'w').write(f'nr 1\\noom_kill {{n + {num_oom_kills}}}\\n'); "
    with pytest.raises(CrashLoop) as caught:
        asyncio.run(child(count + add + "os.kill(os.getpid(), 9)").run())
    assert ("ran out of memory" in caught.value.message) == bool(num_oom_kills)


LIFELINE = "import os, sys; fd = int(os.environ['FD'])\n"


def environment(fd: int) -> Mapping[str, str]:
    return {"FD": str(fd), "PATH": os.environ.get("PATH", "")}


def quick() -> RestartPolicy:
    return RestartPolicy(first_pause_s=0.01, max_pause_s=0.01, max_restarts=2)


def child(
    code: str, *, ends: list[float] | None = None, ready_s: Callable[[int], float] = lambda _: 0.0
) -> Supervisor:
    """`ready_s`: for how long the nth one was ready."""
    num_ends = 0

    def on_exit() -> float:
        nonlocal num_ends
        num_ends += 1
        if ends is not None:
            ends.append(time.monotonic())
        return ready_s(num_ends)

    command = [sys.executable, "-S", "-c", LIFELINE + code]
    return Supervisor("w", command, environment, quick(), on_exit=on_exit)


def say(message: str, *, is_final: bool = True) -> str:
    words = json.dumps({"message": message, "is_final": is_final})
    return f"os.write(fd, {words.encode()!r}); "


def test_a_download_that_failed_is_not_tried_again() -> None:
    ends: list[float] = []
    code = say("cannot reach the hub") + "sys.exit(1)"
    with pytest.raises(HubError, match="cannot reach the hub"):
        asyncio.run(child(code, ends=ends).run())
    assert len(ends) == 1


@pytest.mark.parametrize("kind", [UsageError, ModelLoadError, DoesNotFit, RegistrationFailed])
def test_final_exit_codes_are_raised_with_the_childs_own_line(kind: type[StartupError]) -> None:
    ends: list[float] = []
    code = say("no such folder") + f"sys.exit({kind.exit_code})"
    with pytest.raises(kind, match=r"^no such folder$") as caught:
        asyncio.run(child(code, ends=ends).run())
    assert type(caught.value) is kind and len(ends) == 1


def test_crash_loop_shows_the_last_line() -> None:
    ends: list[float] = []
    code = say("the cause", is_final=False) + "sys.exit(1)"
    with pytest.raises(CrashLoop, match="worker w keeps crashing; its last error: the cause"):
        asyncio.run(child(code, ends=ends).run())
    assert len(ends) == 3  # the first start and two restarts


def test_who_was_ready_for_long_between_its_crashes_is_started_again() -> None:
    ends: list[float] = []
    code = say("the cause", is_final=False) + "sys.exit(1)"
    # two restarts before its health and two after
    supervisor = child(code, ends=ends, ready_s=lambda number: 60.0 if number == 3 else 59.0)
    with pytest.raises(CrashLoop):
        asyncio.run(supervisor.run())
    assert len(ends) == 5


def test_crash_loop_without_a_word_says_how_it_ended() -> None:
    with pytest.raises(CrashLoop, match="killed by SIGKILL"):
        asyncio.run(child("os.kill(os.getpid(), 9)").run())


def test_crash_loop_without_a_word_names_the_way_out() -> None:
    with pytest.raises(CrashLoop) as caught:
        asyncio.run(child("sys.exit(1)").run())
    assert caught.value.message == (
        "worker w keeps crashing; its last error: exit code 1, without a reason; what it wrote is "
        "in the log of the server (of a chat: --debug), `chatserve doctor` checks the machine"
    )


def read(fifo: str) -> str:
    with open(fifo) as file:
        return file.read()


async def running(supervisor: Supervisor, fifo: str) -> tuple[asyncio.Task[None], int]:
    """Start it and wait until the child has written its pid."""
    task = asyncio.create_task(supervisor.run())
    return task, int(await asyncio.to_thread(read, fifo))


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


WRITE_PID = "open({!r}, 'w').write(str(os.getpid()))\n"
POLITE = "import signal, time\nsignal.signal(15, lambda *a: sys.exit(0))\n"
STUBBORN = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\n"
SLEEP = "while True: time.sleep(100)"


@pytest.mark.parametrize("manners", [POLITE, STUBBORN])
def test_stop_ends_the_child(manners: str, fifo: str) -> None:
    async def main() -> int:
        supervisor = child(manners + WRITE_PID.format(fifo) + SLEEP)
        task, pid = await running(supervisor, fifo)
        await supervisor.stop(kill_after_s=30 if manners is POLITE else 0.1)
        await task
        return pid

    assert not is_alive(asyncio.run(main()))


@pytest.mark.parametrize("is_early", [True, False])
def test_a_stop_that_is_hurried_does_not_wait_for_a_child_that_hangs(
    is_early: bool, fifo: str
) -> None:
    async def main() -> int:
        hurry = asyncio.Event()
        supervisor = child(STUBBORN + WRITE_PID.format(fifo) + SLEEP)
        task, pid = await running(supervisor, fifo)
        if is_early:
            hurry.set()
        stop = asyncio.create_task(supervisor.stop(kill_after_s=1000, hurry=hurry))
        await asyncio.sleep(0)  # it waits for the child
        hurry.set()
        await asyncio.wait_for(asyncio.gather(stop, task), 30)
        return pid

    assert not is_alive(asyncio.run(main()))


def test_stop_while_the_child_is_being_started_ends_it(
    fifo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child may run for a while before its start is known here."""
    start = asyncio.create_subprocess_exec

    async def main() -> int:
        is_known = asyncio.Event()

        async def start_slowly(*command: Any, **options: Any) -> asyncio.subprocess.Process:
            process = await start(*command, **options)
            await is_known.wait()
            return process

        monkeypatch.setattr(asyncio, "create_subprocess_exec", start_slowly)
        supervisor = child(POLITE + WRITE_PID.format(fifo) + SLEEP)
        task, pid = await running(supervisor, fifo)
        stop = asyncio.create_task(supervisor.stop(kill_after_s=30))
        await asyncio.sleep(0)  # it has looked for the child
        is_known.set()
        await asyncio.wait_for(asyncio.gather(stop, task), 30)
        return pid

    assert not is_alive(asyncio.run(main()))


def test_a_supervisor_that_was_stopped_before_starts_nothing() -> None:
    ends: list[float] = []

    async def main() -> None:
        supervisor = child("sys.exit(1)", ends=ends)
        await supervisor.stop(kill_after_s=1)
        await asyncio.wait_for(supervisor.run(), 30)

    asyncio.run(main())
    assert not ends


def test_stop_while_waiting_for_a_restart() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        def on_exit() -> float:
            ended.set()
            return 0.0

        supervisor = Supervisor(
            "w",
            [sys.executable, "-S", "-c", "raise SystemExit(1)"],
            environment,
            RestartPolicy(first_pause_s=1000, max_pause_s=1000),
            on_exit=on_exit,
        )
        task = asyncio.create_task(supervisor.run())
        await ended.wait()
        await supervisor.stop(kill_after_s=1)
        await asyncio.wait_for(task, 5)

    asyncio.run(main())


def test_retired_child_goes_on_but_is_not_started_again(fifo: str) -> None:
    ends: list[float] = []

    async def main() -> None:
        supervisor = child(WRITE_PID.format(fifo) + "import time\n" + SLEEP, ends=ends)
        task, pid = await running(supervisor, fifo)
        supervisor.retire()
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
        await asyncio.wait_for(task, 5)

    asyncio.run(main())
    assert len(ends) == 1


def test_cancelled_supervisor_leaves_no_child(fifo: str) -> None:
    async def main() -> int:
        task, pid = await running(child(STUBBORN + WRITE_PID.format(fifo) + SLEEP), fifo)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pid

    assert not is_alive(asyncio.run(main()))
