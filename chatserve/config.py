"""The settings of each command, as frozen dataclasses; `settings` derives their flags."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chatserve import environment
from chatserve.errors import UsageError
from chatserve.options import (
    INT64,
    ApiOptions,
    DrainOptions,
    EngineConfig,
    KeepingOptions,
    ListenOptions,
    LoadingOptions,
    ModelOptions,
    RankingOptions,
    TimeLimits,
)
from chatserve.settings import read_toml, resolve, setting

DEFAULT_PORT = 8000
DEFAULT_WEIGHTS = "smollm2-135m"
MAX_NAME_LEN = 200
MAX_ADAPTERS = 64  # beside one base: every heartbeat names them all
MAX_CARDS = 25 * (1 + MAX_ADAPTERS)  # a worker's names, alone and with each adapter: under 4 MiB
_PART_OF_GGUF = re.compile(r"-\d{5}-of-\d{5}$", re.ASCII)
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class WorkerConfig(
    ModelOptions, RankingOptions, EngineConfig, TimeLimits, DrainOptions, ApiOptions,
    KeepingOptions, ListenOptions,
):  # fmt: skip
    """One worker process: one model, one engine."""

    weights: str = setting(DEFAULT_WEIGHTS, "folder, .gguf file, alias or hub id", flag=False)
    host: str = setting("127.0.0.1", "address to listen on", group="network")
    port: int = setting(0, "port to listen on; 0 takes a free one", group="network", ge=0, le=65535)
    controller: str | None = setting(
        None, "URL of the controller to register with", group="network",
        flags=("--controller-address",), metavar="URL",
    )  # fmt: skip
    no_register: bool = setting(False, "do not register with a controller", group="network")
    ssl_ca_certs: str | None = setting(
        None, "believe a controller at https with a certificate of these authorities, in PEM form",
        group="security", metavar="FILE",
    )  # fmt: skip
    model_names: tuple[str, ...] = setting(
        (), "names in the API, comma-separated", group="network", metavar="A,B"
    )
    worker_id: str | None = setting(
        None, "by which name a supervisor knows this worker", flag=False
    )
    parent_pipe: int | None = setting(
        None, "file descriptor that closes when the supervisor dies", flag=False
    )
    socket_path: str | None = setting(
        None, "socket of the file system to listen on instead of a port", flag=False
    )
    debug: bool = setting(False, "show more logs, and tracebacks", group="logging")


@dataclass(frozen=True)
class ControllerConfig(KeepingOptions, DrainOptions, ListenOptions):
    """The controller: registry, relay, public API."""

    host: str = setting("127.0.0.1", "address to listen on", group="network")
    port: int = setting(
        DEFAULT_PORT, "port to listen on; 0 takes a free one", group="network", ge=0, le=65535
    )
    api_key_file: str | None = setting(
        None, "file with one API key a line", group="security", metavar="FILE"
    )
    insecure_no_auth: bool = setting(
        False, "allow a public address without an API key", group="security"
    )
    allow_host: tuple[str, ...] = setting(
        (), "further Host header values to accept, comma-separated", group="security",
        metavar="A,B",
    )  # fmt: skip
    allow_origin: tuple[str, ...] = setting(
        (), "web pages of these origins may use the API, as in https://chat.example, "
        "comma-separated; without it no page of another origin", group="security", metavar="A,B",
    )  # fmt: skip
    heartbeat_interval_s: float = setting(
        2.0, "seconds between heartbeats of a worker", group="network",
        env=("FASTCHAT_WORKER_HEART_BEAT_INTERVAL",), ge=0.05, le=3600,
    )  # fmt: skip
    heartbeat_expiry_s: float = setting(
        10.0, "seconds of silence after which a worker is gone", group="network",
        env=("FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION",), ge=0.1, le=86400,
    )  # fmt: skip
    stall_timeout_s: float | None = setting(
        None, "seconds without a step after which a worker that has work is stalled; 0: never; "
        "default: that of --token-gap-timeout-s, of a controller by itself 30",
        group="limits", metavar="S", ge=0, le=86400,
    )  # fmt: skip
    resume: bool = setting(
        True, "go on with an answer at another worker when its own is lost, or at the same one "
        "when it is back; an answer that has not begun is asked for again",
        group="limits",
    )  # fmt: skip
    resume_timeout_s: float = setting(
        60.0, "seconds that such an answer waits for a worker", group="limits",
        flags=("--resume-timeout",), metavar="S", ge=0, le=86400,
    )  # fmt: skip
    debug: bool = setting(False, "show more logs, and tracebacks", group="logging")


@dataclass(frozen=True)
class ServeConfig(
    ControllerConfig, ModelOptions, RankingOptions, EngineConfig, TimeLimits, ApiOptions,
    LoadingOptions,
):  # fmt: skip
    """`chatserve serve`: a controller and one supervised worker per loaded model."""

    model_names: tuple[str, ...] = setting(
        (), "names in the API, comma-separated, one per WEIGHTS", group="network", metavar="A,B"
    )
    parent_pipe: int | None = setting(
        None, "file descriptor that closes when the process that started this one dies", flag=False
    )


@dataclass(frozen=True)
class ChatConfig(ModelOptions):
    """`chatserve chat`: the terminal client and its private server."""

    base_url: str | None = setting(
        None, "join a running server instead of starting one", group="chat", metavar="URL"
    )
    ssl_ca_certs: str | None = setting(
        None, "with --base-url https://...: believe certificates of these authorities, in PEM form",
        group="chat", metavar="FILE",
    )  # fmt: skip
    model: str | None = setting(
        None, "the same as WEIGHTS; with --base-url: the name of a model there", group="chat",
        flags=("--model-path", "--model-name"), metavar="WEIGHTS",
    )  # fmt: skip
    private: bool = setting(
        False, "start a server even where one of yours serves these weights already",
        group="chat", flags=("--no-join",),
    )  # fmt: skip
    prompt: str | None = setting(
        None, "answer once on stdout and leave", group="chat", flags=("-p",), metavar="TEXT"
    )
    file: tuple[str, ...] = setting(
        (), "text file that goes before the question, several in their order", group="chat",
        flags=("-f",), metavar="FILE", repeated=True,
    )  # fmt: skip
    input_errors: str = setting(
        "strict", "what becomes of piped input and files that are no UTF-8 text: refused, or with "
        "U+FFFD for what cannot be read", choices=("strict", "replace"), group="chat",
    )  # fmt: skip
    schema: str | None = setting(
        None, "JSON Schema that answers must match", group="chat", metavar="FILE"
    )
    json: bool = setting(
        False, "with -p or a pipe: one JSON object with text, usage and timings", group="chat"
    )
    stream_json: bool = setting(
        False, "the same behind one JSON object a line for each piece of the answer", group="chat"
    )
    no_stream: bool = setting(
        False, "with -p or a pipe: ask for the whole answer at once", group="chat"
    )
    resume: str | None = setting(
        None, "go on with a kept chat: its name, its id, or `last`", group="chat", metavar="CHAT"
    )
    temperature: float | None = setting(
        None, "0 is greedy; default 0.7 in a chat, 0 with -p or a pipe", group="sampling",
        ge=0, le=2,
    )  # fmt: skip
    top_p: float | None = setting(None, "nucleus sampling; default 1", group="sampling", gt=0, le=1)
    repetition_penalty: float | None = setting(
        None, "over 1 discourages repeats; default 1", group="sampling",
        flags=("--repetition_penalty",), ge=0.01, le=2,
    )  # fmt: skip
    max_new_tokens: int | None = setting(
        None,
        "limit of one answer in tokens; default 512, less where the context ends",
        group="sampling",
        ge=1,
    )
    seed: int | None = setting(
        None, "seed of the sampled answers", group="sampling", metavar="N",
        ge=-INT64, le=INT64 - 1,
    )  # fmt: skip
    style: str = setting(
        "auto", "how answers are drawn", choices=("auto", "simple", "rich", "programmatic"),
        group="terminal",
    )  # fmt: skip
    multiline: bool = setting(False, "Enter makes a new line, Esc+Enter sends", group="terminal")
    mouse: bool = setting(False, "mouse support in the line editor", group="terminal")
    theme: str = setting(
        "auto", "colours for a dark screen, a light one, either (auto), or no colours",
        choices=("auto", "dark", "light", "none"), group="terminal",
    )  # fmt: skip
    no_history: bool = setting(False, "do not send earlier turns", group="terminal")
    no_save: bool = setting(False, "keep nothing on disk", group="terminal")
    raw: bool = setting(False, "do not strip terminal escapes from answers", group="terminal")
    debug: bool = setting(False, "show logs and tracebacks", group="terminal")


COMMAND_CONFIGS: dict[str, type[Any]] = {
    "chat": ChatConfig,
    "serve": ServeConfig,
    "controller": ControllerConfig,
    "worker": WorkerConfig,
}


Config = TypeVar("Config")


def build(
    config: type[Config],
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Build `config` from flags, environment and TOML file, in this precedence.

    Raises `UsageError` naming the source of a value that cannot be read.
    """
    return config(**{name: value for name, (value, _) in sources(
        config, flags, file=file, environ=environ).items()})  # fmt: skip


def sources(
    config: type[Any],
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, tuple[Any, str]]:
    """Every setting's value together with where it came from."""
    table = read_toml(file, COMMAND_CONFIGS.values()) if file else {}
    environ = environment.variables() if environ is None else environ
    return resolve(config, flags, file=file, table=table, environ=environ)


def split_adapters(values: Sequence[str]) -> tuple[list[Path], dict[str, Path]]:
    """`--adapter`: folders to merge, in their order; and folders by name, to serve beside the base.

    A path with `=` in its first part is written with `./` before it. Raises `UsageError`.
    """
    merged = [Path(value).expanduser() for value in values if not _is_named(value)]
    named: dict[str, Path] = {}
    for value in filter(_is_named, values):
        _add_named("--adapter", value, named)
    return merged, named


def reward_adapters(values: Sequence[str], named: Mapping[str, Path]) -> dict[str, Path]:
    """`--reward-adapter`: folders by name, beside those `named` by `--adapter`.

    Raises `UsageError`.
    """
    together = dict(named)
    for value in values:
        _add_named("--reward-adapter", value, together)
    return {name: path for name, path in together.items() if name not in named}


def _is_named(value: str) -> bool:
    name, equals, _ = value.partition("=")
    return bool(equals) and "/" not in name and os.sep not in name


def _add_named(flag: str, value: str, named: dict[str, Path]) -> None:
    name, equals, path = value.partition("=")
    if not equals or not ADAPTER_NAME.fullmatch(name) or not path:
        way_out = "; write ./ before a path that has = in it" if flag == "--adapter" else ""
        raise UsageError(
            f"{flag} {value[:100]}: NAME=PATH wants a name of up to 64 letters, digits, '.', '_' "
            f"and '-', and a folder{way_out}"
        )
    if name in named:
        raise UsageError(f"{flag}: two adapters would be called {name}; name one otherwise")
    if len(named) >= MAX_ADAPTERS:
        raise UsageError(
            f"{flag}: {len(named) + 1} adapters have a name, the limit is {MAX_ADAPTERS}; merge "
            "some, or serve them by another worker"
        )
    named[name] = Path(path).expanduser()


def adapted_name(base: str, adapter: str) -> str:
    """The name in the API of a base with an adapter."""
    return f"{base}:{adapter}"


def served_names(weights: str, model_names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names in the API: those given, else that of the folder, file, alias or hub id.

    Raises `UsageError` for a name that no terminal or log should have to show.
    """
    path = Path(weights).expanduser()
    # `.` and `..` have no name of their own
    path = path if path.name not in ("", "..") else path.resolve()
    stem = _PART_OF_GGUF.sub("", path.name.removesuffix(".gguf"))
    # names go to workers as a list with commas
    stem = stem.replace(",", "-").strip()
    names = tuple(model_names) or (stem or "model",)
    if len(names) > MAX_CARDS:
        raise UsageError(f"--model-names has {len(names)} names, the limit is {MAX_CARDS:,}")
    for name in names:
        is_one = "," not in name and name == name.strip() != ""
        if not is_one or not name.isprintable() or len(name) > MAX_NAME_LEN:
            raise UsageError(f"{name[:40]!r} cannot be a model's name; choose --model-names")
    return names
