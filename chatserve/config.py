"""Settings: frozen dataclasses from which flags, environment variables, TOML keys derive.

The only reader of `os.environ`. The name, type, default and one-line description of a setting are
written once, in its field. Precedence: flag > environment (`CHATSERVE_<FIELD>`) > TOML > default.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from chatserve.errors import UsageError

DEFAULT_PORT = 8000
DEFAULT_WEIGHTS = "smollm2-135m"
MAX_NAME_LEN = 200
INT64 = 2**63
DTYPES = ("auto", "float32", "float16", "bfloat16")


def setting(
    default: Any,
    doc: str,
    *,
    flags: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    group: str = "options",
    metavar: str | None = None,
    env: Sequence[str] = (),
    flag: bool = True,
    refused: Mapping[str, str] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """One field of a settings class: its default, its sentence, and further spellings of its flag.

    `flags` are aliases beside `--field-name`; `env` further environment variables (FastChat's);
    `flag=False` keeps it out of the command line; `refused` maps values that FastChat knows and
    chatserve lacks to the reason. `ge`, `gt` and `le` bound a number, however it is given.
    """
    metadata = {
        "doc": doc, "flags": tuple(flags), "choices": choices, "group": group,
        "metavar": metavar, "env": tuple(env), "flag": flag, "refused": refused or {},
        "ge": ge, "gt": gt, "le": le,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    """Which weights, where, and in which form. Shared by `chat`, `serve` and `worker`."""

    device: str = setting(
        "auto", "where the model runs", choices=("auto", "cpu", "cuda", "mps"), group="model",
        refused={
            "xpu": "there are no kernels for Intel GPUs; use --device cpu",
            "npu": "there are no kernels for Ascend NPUs; use --device cpu",
        },
    )  # fmt: skip
    dtype: str = setting(
        "auto", "half-precision or full-precision weights", choices=DTYPES, group="model"
    )
    load_8bit: bool = setting(
        False, "compress the weights to packed int8 while loading", group="model"
    )
    conv_template: str | None = setting(
        None, "chat template by name (`chatserve template` lists them)", group="model",
        metavar="NAME",
    )  # fmt: skip
    conv_system_msg: str | None = setting(
        None, "system message used when a chat brings none", group="model", metavar="TEXT"
    )
    context_length: int | None = setting(
        None, "cap the context below the model's own, in tokens", group="model", metavar="TOKENS",
        ge=1,
    )  # fmt: skip
    revision: str = setting("main", "revision of a hub id", group="model")
    offline: bool = setting(False, "never touch the network", group="model")
    use_generation_config: bool = setting(
        False, "take sampling defaults from the model's generation_config.json", group="model"
    )


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the scheduler."""

    max_num_seqs: int = setting(
        16, "sequences generated at once", group="engine", flags=("--limit-worker-concurrency",
        "--limit-model-concurrency"), metavar="N", ge=1, le=4096,
    )  # fmt: skip
    max_num_batched_tokens: int = setting(
        512, "tokens of one step: decode first, the rest for prefill", group="engine", metavar="N",
        ge=1, le=65536,
    )  # fmt: skip
    max_num_waiting: int = setting(
        64, "requests that may wait before new ones get 429", group="engine", metavar="N",
        ge=1, le=65536,
    )  # fmt: skip
    seed: int | None = setting(
        None, "base seed for requests that bring none", group="engine", metavar="N",
        ge=-INT64, le=INT64 - 1,
    )  # fmt: skip


@dataclass(frozen=True)
class WorkerConfig(ModelOptions, EngineConfig):
    """One worker process: one model, one engine."""

    weights: str = setting(DEFAULT_WEIGHTS, "folder, .gguf file, alias or hub id", flag=False)
    host: str = setting("127.0.0.1", "address to listen on", group="network")
    port: int = setting(0, "port to listen on; 0 takes a free one", group="network", ge=0, le=65535)
    controller: str | None = setting(
        None, "URL of the controller to register with", group="network",
        flags=("--controller-address",), metavar="URL",
    )  # fmt: skip
    no_register: bool = setting(False, "do not register with a controller", group="network")
    model_names: tuple[str, ...] = setting(
        (), "names in the API, comma-separated", group="network", metavar="A,B"
    )
    worker_id: str | None = setting(
        None, "by which name a supervisor knows this worker", flag=False
    )
    parent_pipe: int | None = setting(
        None, "file descriptor that closes when the supervisor dies", flag=False
    )
    debug: bool = setting(False, "show more logs, and tracebacks", group="logging")


@dataclass(frozen=True)
class ControllerConfig:
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
    heartbeat_interval_s: float = setting(
        2.0, "seconds between heartbeats of a worker", group="network",
        env=("FASTCHAT_WORKER_HEART_BEAT_INTERVAL",), ge=0.05, le=3600,
    )  # fmt: skip
    heartbeat_expiry_s: float = setting(
        10.0, "seconds of silence after which a worker is gone", group="network",
        env=("FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION",), ge=0.1, le=86400,
    )  # fmt: skip
    debug: bool = setting(False, "show more logs, and tracebacks", group="logging")


@dataclass(frozen=True)
class ServeConfig(ControllerConfig, ModelOptions, EngineConfig):
    """`chatserve serve`: a controller and one supervised worker per WEIGHTS."""

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
    model: str | None = setting(
        None, "the same as WEIGHTS; with --base-url: the name of a model there", group="chat",
        flags=("--model-path", "--model-name"), metavar="WEIGHTS",
    )  # fmt: skip
    prompt: str | None = setting(
        None, "answer once on stdout and leave", group="chat", flags=("-p",), metavar="TEXT"
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


def home() -> Path:
    """The cache folder: `CHATSERVE_HOME`, else the platform's user cache folder."""
    if value := os.environ.get("CHATSERVE_HOME"):
        return Path(value).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "chatserve"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "chatserve"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "chatserve"


def settings_file() -> Path | None:
    """The TOML file with settings, when there is one.

    `CHATSERVE_CONFIG` names it; else `config.toml` in `CHATSERVE_HOME` or in the user's folder for
    settings. Raises `UsageError` when the named file is missing.
    """
    if value := os.environ.get("CHATSERVE_CONFIG"):
        if not Path(value).expanduser().is_file():
            raise UsageError(f"CHATSERVE_CONFIG names {value}, which is not a file")
        return Path(value).expanduser()
    if os.environ.get("CHATSERVE_HOME") or sys.platform == "win32":
        folder = home()
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "chatserve"
    file = folder / "config.toml"
    return file if file.is_file() else None


def api_keys(api_key_file: str | None) -> tuple[str, ...]:
    """API keys from `--api-key-file` and `CHATSERVE_API_KEYS`; never from the command line.

    Raises `UsageError` when the file cannot be read.
    """
    lines = os.environ.get("CHATSERVE_API_KEYS", "").split(",")
    if api_key_file:
        try:
            lines += Path(api_key_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read --api-key-file {api_key_file}: {error}") from error
    return tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))


def control_token() -> str | None:
    """The shared secret between controller and workers, from `CHATSERVE_CONTROL_TOKEN`."""
    return os.environ.get("CHATSERVE_CONTROL_TOKEN") or None


def client_api_key() -> str | None:
    """The key that the terminal client sends to a server it joins."""
    return os.environ.get("CHATSERVE_API_KEY") or os.environ.get("OPENAI_API_KEY") or None


def hub_endpoint() -> str | None:
    """`HF_ENDPOINT`, when set: another hub than the public one."""
    return os.environ.get("HF_ENDPOINT") or None


def hub_offline() -> bool:
    """Whether the environment forbids the network (`HF_HUB_OFFLINE`)."""
    return os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")


def is_color_wanted() -> bool:
    """False when `NO_COLOR` is set or the terminal is dumb."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def limit_spinning() -> None:
    """Let PyTorch's threads spin only briefly when they wait for each other; before torch loads.

    With its default GNU OpenMP spins for milliseconds: as soon as another program uses a core, each
    of a step's hundred-odd parallel regions may cost a whole time slice (docs/design/005).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment for a child, with `overrides`."""
    return {**os.environ, **overrides}


def fields_of(config: type[Any]) -> list[dataclasses.Field[Any]]:
    """The settings of a class in the order of their groups."""
    return list(dataclasses.fields(config))


def add_flags(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Add one flag per field; absent flags leave no trace in the namespace."""
    hints = typing.get_type_hints(config)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in fields_of(config):
        meta = item.metadata
        if not meta["flag"]:
            continue
        group = groups.get(meta["group"]) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
        names = [
            *(name for name in meta["flags"] if not name.startswith("--")),
            "--" + item.name.replace("_", "-"),
            *(name for name in meta["flags"] if name.startswith("--")),
        ]
        kind = _base_type(hints[item.name])
        default = "" if item.default in (None, False, ()) else f" (default: {item.default})"
        options: dict[str, Any] = {
            "dest": item.name, "default": argparse.SUPPRESS, "help": meta["doc"] + default,
        }  # fmt: skip
        if kind is bool:
            group.add_argument(*names, action="store_true", **options)
        else:
            options["choices"] = meta["choices"]
            if not meta["choices"]:
                options["metavar"] = meta["metavar"] or item.name.upper()
            group.add_argument(*names, type=_parser_of(kind, meta), **options)


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
    environ = os.environ if environ is None else environ
    table = _read_toml(file) if file else {}
    hints = typing.get_type_hints(config)
    values: dict[str, tuple[Any, str]] = {}
    for item in fields_of(config):
        name, meta = item.name, item.metadata
        default = item.default
        values[name] = (default, "default")
        kind = _base_type(hints[name])
        if name in table:
            values[name] = (_convert(table[name], kind, f"{file}: {name}", meta), str(file))
        for variable in (*reversed(meta["env"]), f"CHATSERVE_{name.upper()}"):
            if environ.get(variable):
                values[name] = (_convert(environ[variable], kind, variable, meta), variable)
        if name in flags:
            values[name] = (flags[name], "flag")
    return values


def _read_toml(file: Path) -> dict[str, Any]:
    """One flat table for all commands; a key that none of them knows is an error."""
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the settings file {file}: {error}") from error
    known = {item.name for config in COMMAND_CONFIGS.values() for item in fields_of(config)}
    if unknown := sorted(table.keys() - known):
        raise UsageError(f"{file}: unknown setting {unknown[0]}; `chatserve config` lists them")
    return table


def _base_type(hint: Any) -> Any:
    """`int | None` -> int, `tuple[str, ...]` -> tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def _parser_of(kind: Any, meta: Mapping[str, Any]) -> Any:
    def parse(text: str) -> Any:
        _refuse(text, meta["refused"])
        value = _split(text) if kind is tuple else kind(text)
        if fault := _range_fault(value, meta):
            raise argparse.ArgumentTypeError(fault)  # argparse puts the flag's name before it
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse


def _refuse(value: Any, refused: Mapping[str, str]) -> None:
    if reason := refused.get(str(value)):
        raise UsageError(f"{value} is not supported: {reason}")


def _range_fault(value: Any, meta: Mapping[str, Any]) -> str | None:
    """What is wrong with a number outside its range; None where nothing is."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    ge, gt, le = meta["ge"], meta["gt"], meta["le"]
    if (
        (isinstance(value, int) or math.isfinite(value))
        and (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
    ):
        return None
    if gt is not None:
        limits = f"over {gt} and at most {le}"
    else:
        limits = f"at least {ge}" if le is None else f"from {ge} to {le}"
    return f"{value} is out of range: it must be {limits}"


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _convert(value: Any, kind: Any, source: str, meta: Mapping[str, Any]) -> Any:
    """A value of the environment (text) or TOML (typed) as the field's type."""
    _refuse(value, meta["refused"])
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"1": True, "true": True, "yes": True, "0": False, "false": False,
                    "no": False}[str(value).lower()]  # fmt: skip
        if kind is tuple:
            return _split(value) if isinstance(value, str) else tuple(map(str, value))
        # int() would take TOML's 1.5 and true
        if kind in (int, float) and type(value) not in (str, int, kind):
            raise TypeError
        converted = kind(value)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise UsageError(f"{source}: {value!r} is not a valid {kind.__name__}") from None
    if meta["choices"] and converted not in meta["choices"]:
        raise UsageError(f"{source}: {converted!r} is not one of {', '.join(meta['choices'])}")
    if fault := _range_fault(converted, meta):
        raise UsageError(f"{source}: {fault}")
    return converted


def served_names(weights: str, model_names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names in the API: those given, else that of the folder, file, alias or hub id.

    Raises `UsageError` for a name that no terminal or log should have to show.
    """
    path = Path(weights).expanduser()
    # `.` and `..` have no name of their own
    path = path if path.name not in ("", "..") else path.resolve()
    names = tuple(model_names) or (path.name.removesuffix(".gguf") or "model",)
    for name in names:
        if not name.isprintable() or len(name) > MAX_NAME_LEN:
            raise UsageError(f"{name[:40]!r} cannot be a model's name; choose --model-names")
    return names


def flags_of(config: Any, *kinds: type[Any]) -> list[str]:
    """The command line that repeats the settings of `kinds` in `config` for a child process."""
    flags = []
    for item in dict.fromkeys(item.name for kind in kinds for item in fields_of(kind)):
        value = getattr(config, item)
        flag = "--" + item.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif isinstance(value, tuple):
            flags += [f"{flag}={','.join(value)}"] if value else []
        elif value is not None and value is not False:
            flags.append(f"{flag}={value}")
    return flags


LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
