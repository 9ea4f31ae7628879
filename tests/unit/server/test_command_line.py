"""Flags to settings, names to models, settings to the flags of a child."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli import commands
from chatserve.config import (
    DEFAULT_WEIGHTS,
    MAX_CARDS,
    ServeConfig,
    WorkerConfig,
    build,
    served_names,
)
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.options import EngineConfig, ModelOptions
from chatserve.server import command_line, launch, worker_process
from chatserve.server.repertoire.settings import all_models
from chatserve.settings import fields_of, flags_of
from tests.fakes import FakeEngine, FakeModel


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("CHATSERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    # the log of this process is other tests', too
    monkeypatch.setattr(worker_process, "configure_logging", lambda *_, **__: None)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServeConfig, list[str]]]:
    calls: list[tuple[ServeConfig, list[str]]] = []

    def run_server(config: ServeConfig, weights: Sequence[str], **_: Any) -> int:
        calls.append((config, list(weights)))
        return 0

    monkeypatch.setattr(launch, "run_server", run_server)
    return calls


def test_an_unknown_name_is_refused_before_anything_starts(
    served: list[tuple[ServeConfig, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.serve(["smollm2-135m", "smollm2"]) == UsageError.exit_code
    told = capsys.readouterr().err
    assert told.startswith("chatserve: unknown model 'smollm2'; did you mean") and not served
    for known in ("smollm2-135m", "smollm2-360m", "some/model"):
        assert command_line.serve([known]) == 0
    assert [weights for _, weights in served] == [
        ["smollm2-135m"],
        ["smollm2-360m"],
        ["some/model"],
    ]


def test_serve(served: list[tuple[ServeConfig, list[str]]], tmp_path: Path) -> None:
    a, b = (str(tmp_path / name) for name in "ab")
    for folder in (a, b):
        Path(folder).mkdir()
    assert command_line.serve([a, "--port", "0", "--model-path", b, "--load-8bit"]) == 0
    [(config, weights)] = served
    assert weights == [a, b] and (config.port, config.load_8bit) == (0, True)


def test_a_path_that_is_not_there_is_told_before_anything_starts(
    served: list[tuple[ServeConfig, list[str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = tmp_path / "no.gguf"
    assert command_line.serve([str(tmp_path), str(missing)]) == 3
    assert not served
    told = capsys.readouterr().err
    assert told == f"chatserve: {missing}: no such folder or file; check the spelling\n"


def test_adapters_are_for_one_model_and_must_be_there(
    served: list[tuple[ServeConfig, list[str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = str(tmp_path), str(tmp_path / "a")
    assert command_line.serve([base, "--adapter", f"{adapter}/"]) == 3
    assert f"{adapter}: no such folder" in capsys.readouterr().err
    Path(adapter).mkdir()
    assert command_line.serve([base, base, "--adapter", adapter]) == 2
    assert "--adapter is for one WEIGHTS, not for 2" in capsys.readouterr().err
    assert not served
    assert command_line.serve([base, "--adapter", adapter]) == 0
    assert served[0][0].adapter == (adapter,)
    assert command_line.serve([base, "--adapter", f"sql={adapter}/x"]) == 3
    assert f"{adapter}/x: no such folder" in capsys.readouterr().err
    assert command_line.serve([base, "--adapter", f"sql={adapter}"]) == 0
    assert served[-1][0].adapter == (f"sql={adapter}",)
    assert command_line.serve([base, "--adapter", f"a b={adapter}"]) == 2
    assert "NAME=PATH wants a name" in capsys.readouterr().err


def test_nothing_named_is_the_embedded_model(served: list[tuple[ServeConfig, list[str]]]) -> None:
    from chatserve.cli.commands import serve

    assert serve.main([]) == 0
    assert served[0][1] == [DEFAULT_WEIGHTS]


@pytest.mark.parametrize("name", ["serve", "controller", "worker"])
def test_wrong_flag_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    command = importlib.import_module(f"{commands.__name__}.{name}")
    assert command.main(["--no-such-flag"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--no-such-flag" in err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["a", "b"], "one model"),
        (["a", "--model-names", "x\x1by"], "--model-names"),
        (["a", "--host", "0.0.0.0"], "CHATSERVE_API_KEYS"),
        (["a", "--controller", "http://127.0.0.1:1"], "CHATSERVE_CONTROL_TOKEN"),
    ],
)
def test_worker_that_must_not_start(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any) -> tuple[FakeEngine, FakeModel]:
        raise AssertionError("loaded")

    assert command_line.worker(arguments, load=load) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("is_its_own", [False, True])
def test_only_threads_of_its_own_make_a_worker_leave_at_once(
    is_its_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever calls it in the middle of something else goes on after it."""
    left: list[int] = []
    monkeypatch.setattr("os._exit", left.append)
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, daemon=True)

    async def serve(*_: Any) -> int:
        if is_its_own:
            thread.start()
        return 5

    monkeypatch.setattr(worker_process, "_serve", serve)
    if not is_its_own:
        thread.start()
    try:
        assert command_line.worker(["a"]) == 5
    finally:
        ended.set()
        thread.join()
    assert left == ([5] if is_its_own else [])


def test_worker_gets_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[WorkerConfig] = []

    def run_worker(config: WorkerConfig, _load: Any) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(worker_process, "run_worker", run_worker)
    for arguments in (["/w"], ["--model-path", "/w"], []):
        assert command_line.worker(arguments) == 0
    assert [config.weights for config in configs] == ["/w", "/w", DEFAULT_WEIGHTS]


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("/models/vicuna-7b/", "vicuna-7b"),
        ("a/b/model.Q8_0.gguf", "model.Q8_0"),
        ("smollm2-135m", "smollm2-135m"),
        ("lmsys/vicuna-7b-v1.5", "vicuna-7b-v1.5"),
        ("~/x", "x"),
    ],
)
def test_name_of_weights(weights: str, name: str) -> None:
    assert served_names(weights) == (name,)
    assert served_names(weights, ["a", "b"]) == ("a", "b")


def test_name_of_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert served_names(".") == ("here",)
    assert served_names("/") == ("model",)


def test_more_names_than_a_heartbeat_holds() -> None:
    names = [f"n{index}" for index in range(MAX_CARDS + 1)]
    assert served_names("/w", names[:-1]) == tuple(names[:-1])
    with pytest.raises(UsageError, match="has 1626 names, the limit is 1,625"):
        served_names("/w", names)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "x" * 201])
def test_name_that_cannot_be_shown(name: str) -> None:
    with pytest.raises(UsageError, match="--model-names"):
        served_names("/w", [name])


def test_names_and_weights_pair_up() -> None:
    def named(weights: list[str], names: list[str], *models: str) -> Any:
        return all_models(ServeConfig(model_names=tuple(names), models=models), weights)

    assert named(["/a", "/b"], []) == ([("a", "/a"), ("b", "/b")], [])
    assert named(["/a", "/b"], ["x", "y"]) == ([("x", "/a"), ("y", "/b")], [])
    assert named([], [], "x=/a", "/b=1/c") == ([], [("x", "/a"), ("c", "/b=1/c")])
    for weights, names in ((["/a"], ["x", "y"]), (["/x/a", "/y/a"], []), ([], [])):
        with pytest.raises(UsageError):
            named(weights, names)
    for models in (["a=/x"], ["=/x"], ["y="]):
        with pytest.raises(UsageError):
            named(["/a"], [], *models)


def test_settings_survive_the_way_to_the_child() -> None:
    config = ServeConfig(
        device="cpu",
        load_8bit=True,
        conv_system_msg="--be nice\n=",
        context_length=100,
        max_num_seqs=3,
        seed=-5,
        speculation=False,
    )
    flags = flags_of(config, ModelOptions, EngineConfig)
    parsed = build(WorkerConfig, CommandParser("x", "", WorkerConfig).flags(flags))
    for kind in (ModelOptions, EngineConfig):
        for item in fields_of(kind):
            assert getattr(parsed, item.name) == getattr(config, item.name), item.name
    assert not any(flag.startswith(("--port", "--host", "--api")) for flag in flags)
