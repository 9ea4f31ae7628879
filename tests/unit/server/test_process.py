"""What ends a process, and with which code and line."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from chatserve.config import ServeConfig, WorkerConfig, build
from chatserve.errors import DoesNotFit, UsageError
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server import launch, process, worker_process
from chatserve.server.log_lines import TextLines
from chatserve.server.process import (
    EXIT_INTERRUPTED,
    StopSignals,
    configure_logging,
    run_process,
    run_until,
)
from chatserve.server.registry import WorkerRegistry
from chatserve.server.repertoire import workers
from chatserve.server.supervisor import RestartPolicy
from tests.fakes import FakeClock


def outcome(error: BaseException | None = None) -> tuple[int, list[tuple[str, bool]]]:
    """The exit code, and what was reported: the line, and whether it is final."""
    reports: list[tuple[str, bool]] = []

    async def main() -> int:
        if error is not None:
            raise error
        return 0

    return run_process(main, report=lambda *report: reports.append(report)), reports


def test_success() -> None:
    assert outcome() == (0, [])


def test_startup_errors_have_their_code_and_line() -> None:
    assert outcome(UsageError("wrong flag")) == (2, [("wrong flag", True)])
    assert outcome(DoesNotFit("too big")) == (4, [("too big", True)])


def test_too_few_addresses_are_refused_before_anything_is_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker_process, "address_space_left", lambda: 100 << 20)
    monkeypatch.setattr(worker_process, "run_process", lambda *_a, **_b: pytest.fail("begun"))
    config = build(WorkerConfig, {"weights": "llama"})
    assert worker_process.run_worker(config, lambda *_: pytest.fail("loaded")) == 4
    assert "PyTorch takes 0.7 GB of addresses" in capsys.readouterr().err


def test_interrupt() -> None:
    assert outcome(KeyboardInterrupt()) == (EXIT_INTERRUPTED, [])


def test_a_bug_is_one_line() -> None:
    code, [(line, is_final)] = outcome(ValueError("x\ny"))
    assert code == 1 and line.startswith("internal error: ValueError: x")
    assert not is_final


def test_error_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> int:
        raise UsageError("wrong\nflag")

    assert run_process(main) == 2
    assert capsys.readouterr() == ("", "chatserve: wrong flag\n")


@pytest.mark.parametrize("make_loop", [None, asyncio.new_event_loop])
def test_what_nobody_catches_is_logged_without_what_it_quotes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, make_loop: Any
) -> None:
    secret = "SEC" + "RET"  # lines of the source are told

    async def break_down() -> None:
        raise ValueError(secret)

    def call(_argument: str) -> None:
        raise ValueError(secret)

    async def main() -> int:
        asyncio.get_running_loop().call_soon(call, secret)
        task = asyncio.create_task(break_down())
        await asyncio.wait({task})
        del task
        gc.collect()
        return 0

    if make_loop:
        monkeypatch.setattr(process, "_loop_factory", lambda: make_loop)
    assert run_process(main) == 0
    callback, task = caplog.records
    assert callback.getMessage() == "Exception in callback"
    assert task.getMessage().startswith("Task exception was never retrieved")
    assert task.getMessage().endswith("break_down")
    for record in caplog.records:
        record.exc_text = None  # written by pytest's handler
    lines = "\n".join(map(TextLines("x").format, caplog.records)) + "\n"
    assert secret not in lines and lines.count("  ValueError\n") == 2


def test_other_libraries_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    configure_logging("me", debug=True)
    try:
        logging.getLogger("sse_starlette.sse").debug("chunk: secret")
        logging.getLogger("uvicorn.error").info("started")
        logging.getLogger("chatserve.x").debug("ours")
    finally:
        logging.basicConfig(force=True, handlers=[])
        logging.getLogger("chatserve").setLevel(logging.NOTSET)
    output = capsys.readouterr().err
    assert "secret" not in output and "started" not in output
    assert "me: ours" in output


def test_run_until_stop_cancels_the_jobs() -> None:
    log: list[str] = []

    async def main() -> None:
        stop = asyncio.Event()

        async def ends() -> None:
            log.append("ended")

        async def goes_on() -> None:
            try:
                stop.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                log.append("cancelled")

        await run_until(stop, ends(), goes_on())

    asyncio.run(main())
    assert log == ["ended", "cancelled"]


def test_run_until_raises_the_first_failure_and_cancels_the_rest() -> None:
    log: list[str] = []

    async def main() -> None:
        async def fails() -> None:
            raise DoesNotFit("no")

        async def goes_on() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                log.append("cancelled")

        await run_until(asyncio.Event(), goes_on(), fails())

    with pytest.raises(DoesNotFit):
        asyncio.run(main())
    assert log == ["cancelled"]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_and_second_insists(kind: signal.Signals) -> None:
    async def main() -> None:
        stop = StopSignals()
        with stop.installed():
            os.kill(os.getpid(), kind)
            await asyncio.wait_for(stop.asked.wait(), 5)
            assert not stop.insisted.is_set()
            assert stop.is_interrupted == (kind == signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stop.insisted.wait(), 5)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("flags", "stall_s"),
    [
        ({}, 30.0),
        ({"token_gap_timeout_s": 200.0}, 200.0),
        ({"token_gap_timeout_s": 0.0}, 0.0),
        ({"token_gap_timeout_s": 200.0, "stall_timeout_s": 3.0}, 3.0),
        ({"stall_timeout_s": 0.0}, 0.0),
    ],
)
def test_a_server_is_as_patient_as_its_workers(
    flags: dict[str, float], stall_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def refuse(*_: Any, **options: Any) -> None:
        given.append(options["stall_s"])
        raise UsageError("that is all")

    monkeypatch.setattr(launch, "WorkerRegistry", refuse)
    with pytest.raises(UsageError, match="all"):
        launch._Server(
            ServeConfig(**flags),  # type: ignore[arg-type]  # mixed
            ["m"],
            (),
            RestartPolicy,
            None,
        )
    assert given == [stall_s]


def started(registry: WorkerRegistry) -> workers.Workers:
    """The workers of a server, one of them made."""
    found = workers.Workers(
        ServeConfig(), (), RestartPolicy, registry, control_token="x",
        control_url="http://127.0.0.1:1", folder=None, sockets={},
    )  # fmt: skip
    found.start("m", "m")
    return found


def test_workers_of_a_server_register_whatever_the_settings_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else it would wait for them for ever."""
    monkeypatch.setenv("CHATSERVE_NO_REGISTER", "true")
    (tmp_path / "config.toml").write_text("no_register = true\n")
    environments: list[Mapping[str, str]] = []

    def keep(_name: str, _command: Any, environment: Any, *_: Any, **__: Any) -> None:
        environments.append(environment(3))

    monkeypatch.setattr(workers, "Supervisor", keep)
    started(WorkerRegistry(FakeClock()))
    [environ] = environments
    worker = build(WorkerConfig, {}, file=tmp_path / "config.toml", environ=environ)
    assert not worker.no_register and worker.parent_pipe == 3


def test_a_worker_that_was_forgotten_leaves_its_socket_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each path costs whoever talks to workers a session."""
    paths: list[str] = []

    def keep(_name: str, _command: Any, environment: Any, *_: Any, **__: Any) -> None:
        paths.append(Path(environment(3)["CHATSERVE_SOCKET_PATH"]).name)

    monkeypatch.setattr(workers, "Supervisor", keep)
    found = workers.Workers(
        ServeConfig(), (), RestartPolicy, WorkerRegistry(FakeClock()), control_token="x",
        control_url="http://127.0.0.1:1", folder=tmp_path, sockets={},
    )  # fmt: skip
    found.start("a", "a")
    b = found.start("b", "b")
    for _ in range(3):
        b.forget()
        b = found.start("b", "b")
    found.start("c", "c")
    assert paths == ["0.sock", "1.sock", "1.sock", "1.sock", "1.sock", "2.sock"]


def told(state: Any) -> WorkerStatus:
    return WorkerStatus(state=state, models=[ModelCard(name="m", created=1)])


def test_how_long_a_worker_was_ready_is_known_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that has been silent for so long that the registry has dropped it."""
    clock = FakeClock()
    children: list[tuple[Callable[[int], Mapping[str, str]], Callable[[], float]]] = []

    def keep(_name: str, _command: Any, environment: Any, _policy: Any, *, on_exit: Any) -> None:
        children.append((environment, on_exit))

    monkeypatch.setattr(workers, "Supervisor", keep)
    registry = WorkerRegistry(clock)
    registry.on_change = started(registry).look
    [(start, end)] = children

    def run(*, load_s: int, ready_s: int, is_silent: bool = False) -> float:
        worker_id = start(3)["CHATSERVE_WORKER_ID"]
        registry.register(worker_id, "http://a", told("loading"))
        for second in range(load_s + ready_s):
            clock.advance(1)
            state = "loading" if second < load_s else "ready"
            assert registry.heartbeat(worker_id, told(state))
        if is_silent:
            clock.advance(100)
            assert registry.worker_ids() == []
        return end()

    assert run(load_s=100, ready_s=0) == 0
    assert run(load_s=0, ready_s=81) == 80
    # and not what its predecessor was
    assert run(load_s=30, ready_s=0, is_silent=True) == 0
    assert run(load_s=5, ready_s=71, is_silent=True) == 70
