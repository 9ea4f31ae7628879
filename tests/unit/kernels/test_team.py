"""The threads of a team: no deadlock on a busy machine, nothing spent while idle."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from chatserve import environment
from chatserve.kernels.library import Kernels, KernelsUnavailable, load_kernels
from chatserve.models.kernel_matrix import KernelMatrix, Team
from chatserve.models.packing import Packing
from tests.unit.kernels.networks import config, pool_of, prompt, random_network, whole

PACKING = Packing(8)
DEADLOCK_S = 120


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """Threads are the same for every level."""
    try:
        return load_kernels()
    except KernelsUnavailable as error:
        pytest.skip(f"no kernels: {error}")


@pytest.fixture
def hogs() -> Iterator[None]:
    """Processes that compute all the time, on every core of a small machine."""
    # they end by themselves where a killed test run cannot end them
    busy = "import time; end = time.monotonic() + 120\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(2)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def within_time(work: Callable[[], None]) -> None:
    """Run `work`, whose calls nothing can interrupt, in a thread that may be left behind."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLOCK_S)
    assert not thread.is_alive(), "the team's threads wait for each other"
    if errors:
        raise errors[0]


def matrix_of(kernels: Kernels, team: Team) -> KernelMatrix:
    matrix = KernelMatrix(kernels, team, 64, 32, PACKING)
    matrix.load_rows(0, torch.ones(64, 32))
    return matrix


@pytest.mark.usefixtures("hogs")
def test_thousands_of_jobs_end_while_other_processes_take_the_cores(kernels: Kernels) -> None:
    x = torch.ones(3, 32)

    def work() -> None:
        for num_threads in (1, 2, 3, 4):
            matrix = matrix_of(kernels, Team(kernels, num_threads))
            results = [matrix.multiply(x) for _ in range(500)]
            assert torch.stack(results).allclose(torch.tensor(32.0), rtol=1e-5)

    within_time(work)


@pytest.mark.usefixtures("hogs")
def test_steps_with_many_barriers_end_while_other_processes_take_the_cores(
    kernels: Kernels,
) -> None:
    network = random_network(kernels, PACKING, config())
    pool, ids = pool_of(network, 4), prompt(9, 1)
    expected = whole(network, pool, ids, (0,))

    def work() -> None:
        for num_threads in (4, 1, 3, 2):
            network.set_num_threads(num_threads)
            for _ in range(20):
                assert torch.equal(whole(network, pool, ids, (1,)), expected)

    within_time(work)


def test_teams_work_side_by_side(kernels: Kernels) -> None:
    failures: list[object] = []

    def use(num_threads: int) -> None:
        matrix = matrix_of(kernels, Team(kernels, num_threads))
        x = torch.ones(2, 32) * num_threads
        expected = matrix.multiply(x)
        failures.extend(n for n in range(300) if not torch.equal(matrix.multiply(x), expected))

    def work() -> None:
        callers = [threading.Thread(target=use, args=(n,)) for n in (1, 2, 3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    within_time(work)
    assert not failures


def test_idle_threads_use_no_processor_time(kernels: Kernels) -> None:
    matrix = matrix_of(kernels, Team(kernels, 4))
    matrix.multiply(torch.ones(3, 32))
    start = time.process_time()
    threading.Event().wait(0.5)
    # three threads that spin would take 0.5 s on one core, more on two
    assert time.process_time() - start < 0.2


def test_a_team_makes_do_with_the_threads_that_the_system_gives(kernels: Kernels) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux keeps to the limit of addresses")
    program = f"""
import os
import resource
import numpy as np
from chatserve.kernels import library
functions = library.open_library(library.LIBRARY)
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + (40 << 20)  # for the stacks of a few threads
resource.setrlimit(resource.RLIMIT_AS, (room, room))
team = functions.cs_team_create(64)
rows, out = np.ones((64, 32), np.float32), np.zeros((2, 64), np.float32)
matrix = functions.cs_matrix_create({kernels.level_name!r}, 64, 32, 8, 0, 1)
assert functions.cs_matrix_load(matrix, team, 0, 64, rows.ctypes.data, 0, 0) == 0
assert functions.cs_matrix_multiply(matrix, team, rows.ctypes.data, 2, out.ctypes.data) == 0
assert np.allclose(out, 32), out
print(len(os.listdir("/proc/self/task")))
functions.cs_team_destroy(team)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=environment.child_environment(OPENBLAS_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 64


@pytest.mark.usefixtures("kernels")
def test_the_interpreter_may_end_in_the_middle_of_a_job() -> None:
    # ctypes alone: PyTorch's own calls do not survive this in a thread that is left behind
    program = """
import threading
import torch
from chatserve.kernels.library import load_kernels
from chatserve.models.kernel_matrix import KernelMatrix, Team
from chatserve.models.packing import Packing
kernels = load_kernels()
team = Team(kernels, 2)
matrix = KernelMatrix(kernels, team, 4096, 1024, Packing(8))
x, y = torch.ones(64, 1024), torch.ones(64, 4096)
addresses = x.data_ptr(), 64, y.data_ptr()
is_running = threading.Event()
def work():
    while True:
        kernels.functions.cs_matrix_multiply(matrix.handle, team.handle, *addresses)
        is_running.set()
threading.Thread(target=work, daemon=True).start()
is_running.wait()
"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLOCK_S
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
