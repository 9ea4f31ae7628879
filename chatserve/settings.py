"""How a setting is declared, and how its flag, variable and TOML key derive from one field.

The name, type, default and one-line description of a setting are written once, in its field.
Precedence: flag > environment (`CHATSERVE_<FIELD>`) > TOML > default. Which settings there are is
`config`'s business.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from chatserve.errors import UsageError


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
    repeated: bool = False,
    refused: Mapping[str, str] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
) -> Any:
    """One field of a settings class: its default, its sentence, and further spellings of its flag.

    `flags` are aliases beside `--field-name`; `env` further environment variables (FastChat's);
    `flag=False` keeps it out of the command line; `repeated`: each flag adds one path to a tuple,
    and a variable separates them as PATH does; `refused` maps values that FastChat knows and
    chatserve lacks to the reason. `ge`, `gt` and `le` bound a number, however it is given.
    """
    metadata = {
        "doc": doc, "flags": tuple(flags), "choices": choices, "group": group,
        "metavar": metavar, "env": tuple(env), "flag": flag, "repeated": repeated,
        "refused": refused or {},
        "ge": ge, "gt": gt, "le": le,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
            action = argparse.BooleanOptionalAction if item.default else "store_true"
            group.add_argument(*names, action=action, **options)
        else:
            options["choices"] = meta["choices"]
            if not meta["choices"]:
                options["metavar"] = meta["metavar"] or item.name.upper()
            if meta["repeated"]:
                kind, options["action"] = str, "append"
            group.add_argument(*names, type=_parser_of(kind, meta), **options)


def resolve(
    config: type[Any],
    flags: Mapping[str, Any],
    *,
    file: Path | None,
    table: Mapping[str, Any],
    environ: Mapping[str, str],
) -> dict[str, tuple[Any, str]]:
    """Every setting's value with where it came from; `table` is what `file` holds.

    Raises `UsageError` naming the source of a value that cannot be read.
    """
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
            given = flags[name]
            values[name] = (tuple(given) if meta["repeated"] else given, "flag")
    return values


def read_value(config: type[Any], name: str, text: str, source: str) -> Any:
    """The setting `name` of `config` from text. Raises `UsageError`, which begins with `source`."""
    (item,) = (item for item in fields_of(config) if item.name == name)
    kind = _base_type(typing.get_type_hints(config)[name])
    return _convert(text, kind, source, item.metadata)


def read_toml(file: Path, configs: Iterable[type[Any]]) -> dict[str, Any]:
    """The flat table that all commands share; a key that none of `configs` knows is an error."""
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the settings file {file}: {error}") from error
    known = {item.name for config in configs for item in fields_of(config)}
    if unknown := sorted(table.keys() - known):
        # flags are written otherwise
        nearest = difflib.get_close_matches(unknown[0].lstrip("-").replace("-", "_"), known, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UsageError(
            f"{file}: unknown setting {unknown[0]}; {hint}`chatserve config` lists them"
        )
    return table


def flags_of(config: Any, *kinds: type[Any]) -> list[str]:
    """The command line that repeats the settings of `kinds` in `config` for a child process."""
    flags = []
    for name, item in {item.name: item for kind in kinds for item in fields_of(kind)}.items():
        value = getattr(config, name)
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags += ["--no-" + flag.removeprefix("--")] if item.default else []
        elif item.metadata["repeated"]:
            flags += [f"{flag}={each}" for each in value]
        elif isinstance(value, tuple):
            flags += [f"{flag}={','.join(value)}"] if value else []
        elif value is not None:
            flags.append(f"{flag}={value}")
    return flags


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


def _split_paths(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(os.pathsep) if part)


def _convert(value: Any, kind: Any, source: str, meta: Mapping[str, Any]) -> Any:
    """A value of the environment (text) or TOML (typed) as the field's type."""
    _refuse(value, meta["refused"])
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"1": True, "true": True, "yes": True, "0": False, "false": False,
                    "no": False}[str(value).lower()]  # fmt: skip
        if kind is tuple and isinstance(value, str):
            return _split_paths(value) if meta["repeated"] else _split(value)
        if kind is tuple:
            return tuple(map(str, value))
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
