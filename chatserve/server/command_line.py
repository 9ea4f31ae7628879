"""The command lines of serve, controller and worker: flags to settings, and on to the process.

Light: `--help` and a wrong flag import nothing of the web.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from chatserve import environment, hub
from chatserve.config import (
    DEFAULT_WEIGHTS,
    ControllerConfig,
    ServeConfig,
    WorkerConfig,
    build,
    reward_adapters,
    split_adapters,
)
from chatserve.errors import StartupError, UsageError
from chatserve.flags import CommandParser

if TYPE_CHECKING:
    from chatserve.server.launch import Policy
    from chatserve.server.repertoire.measure import Measure
    from chatserve.server.worker_process import Load

Config = TypeVar("Config")


def serve(
    argv: Sequence[str] | None = None,
    *,
    worker_command: Sequence[str] | None = None,
    policy: Policy | None = None,
    measure: Measure | None = None,
) -> int:
    """`chatserve serve [WEIGHTS ...]`. Returns the exit code."""
    parser = CommandParser(
        "chatserve serve",
        "Serve models behind the OpenAI API: a controller and one worker per WEIGHTS.",
        ServeConfig,
    )
    _add_weights(parser)

    def run(config: ServeConfig, weights: list[str]) -> int:
        from chatserve.server.launch import WORKER_COMMAND, run_server
        from chatserve.server.repertoire.settings import split_model
        from chatserve.server.supervisor import RestartPolicy

        num_models = len(weights) + len(config.models)
        if (config.adapter or config.reward_adapter) and num_models > 1:
            flag, or_else = (
                ("--adapter", ", or write the merge with `chatserve merge-adapter`")
                if config.adapter
                else ("--reward-adapter", "")
            )
            raise UsageError(
                f"{flag} is for one WEIGHTS, not for {num_models}; serve the others by "
                f"`chatserve worker`{or_else}"
            )
        merged, named = split_adapters(config.adapter)
        rewards = reward_adapters(config.reward_adapter, named)
        for folder in (*merged, *named.values(), *rewards.values()):
            hub.check_path(str(folder))
        if worker_command is None:
            # what another command calls WEIGHTS need not be a path
            for path in (*weights, *(split_model(each)[1] for each in config.models)):
                hub.check_name(path, config.revision)
        return run_server(
            config,
            weights or ([] if config.models else [DEFAULT_WEIGHTS]),
            worker_command=worker_command or WORKER_COMMAND,
            policy=policy or RestartPolicy,
            measure=measure,
        )

    return _parse_and_run(parser, ServeConfig, argv, run)


def controller(argv: Sequence[str] | None = None) -> int:
    """`chatserve controller`. Returns the exit code."""
    parser = CommandParser(
        "chatserve controller",
        "The OpenAI API over workers that register, on any machine.",
        ControllerConfig,
    )

    def run(config: ControllerConfig, _weights: list[str]) -> int:
        from chatserve.server.controller_process import run_controller

        return run_controller(config)

    return _parse_and_run(parser, ControllerConfig, argv, run)


def worker(argv: Sequence[str] | None = None, *, load: Load | None = None) -> int:
    """`chatserve worker WEIGHTS`. Returns the exit code."""
    parser = CommandParser("chatserve worker", "One model behind the OpenAI API.", WorkerConfig)
    _add_weights(parser)

    def run(config: WorkerConfig, weights: list[str]) -> int:
        from chatserve.server.worker_process import load_engine, run_worker

        if len(weights) > 1:
            raise UsageError(f"one worker serves one model, not {len(weights)}; start one for each")
        config = dataclasses.replace(config, weights=(weights or [config.weights])[0])
        return run_worker(config, load or load_engine)

    return _parse_and_run(parser, WorkerConfig, argv, run)


def _parse_and_run(
    parser: CommandParser,
    kind: type[Config],
    argv: Sequence[str] | None,
    run: Callable[[Config, list[str]], int],
) -> int:
    try:
        flags: dict[str, Any] = parser.flags(sys.argv[1:] if argv is None else argv)
        weights = flags.pop("weights", []) + flags.pop("model_path", [])
        return run(build(kind, flags, file=environment.settings_file()), weights)
    except StartupError as error:
        print(f"chatserve: {error.message}", file=sys.stderr)
        return error.exit_code


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", nargs="*", metavar="WEIGHTS", help="folder, .gguf file or name")
    # FastChat's spelling
    parser.add_argument("--model-path", action="append", default=[], help=argparse.SUPPRESS)
