"""`chatserve pull [NAME]`: fetch a model into the cache, or make it; its path goes to stdout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from chatserve import config, hub
from chatserve.catalogue import ALIASES, CHAINS, NOTES
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting


@dataclass(frozen=True)
class PullConfig:
    """Settings of `chatserve pull`."""

    base: str | None = setting(
        None,
        "folder or hub id of the original LLaMA, for models that are made of it (Vicuna v0 and "
        "v1.1, StackLLaMA)",
        metavar="PATH_OR_ID",
    )
    keep: bool = setting(False, "keep the delta or adapters that were fetched to make a model")
    include: tuple[str, ...] = setting(
        (), "fetch only weights that match, and other files that do, as '*Q4_K_M*' or '*.json'",
        metavar="GLOB", repeated=True,
    )  # fmt: skip
    exclude: tuple[str, ...] = setting(
        (), "fetch nothing that matches, as '*.safetensors' where .bin is wanted",
        metavar="GLOB", repeated=True,
    )  # fmt: skip
    revision: str = setting(hub.DEFAULT_REVISION, "revision of a hub id; ORG/NAME@REVISION, too")
    offline: bool = setting(False, "never touch the network: only check what is there")


def main(argv: list[str]) -> int:
    """Fetch or make the model; its path goes to stdout. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve pull",
        "Fetch a model into the cache, or check that it is there. Vicuna from deltas and "
        "StackLLaMA are made of --base and what was published for it.",
        PullConfig,
    )
    parser.add_argument(
        "name",
        nargs="?",
        help=f"an alias, a hub id (ORG/NAME), or one GGUF file of it (ORG/NAME:Q4_K_M); default: "
        f"{hub.DEFAULT_NAME}",
    )
    flags = parser.flags(argv)
    name = flags.pop("name")
    if name is not None and hub.is_path(name):
        raise UsageError(f"{name} is a path, there is nothing to pull; `chatserve chat {name}`")
    is_base_given = "base" in flags
    options = config.build(PullConfig, flags)
    if name in CHAINS and (options.base is not None or name not in ALIASES):
        path = _make(name, options)
    elif is_base_given:
        if name not in (None, hub.DEFAULT_NAME):
            hub.find_reference(name)  # a name that is wrong is told first
        raise UsageError(
            f"--base is for models that are made of one ({', '.join(CHAINS)}); "
            f"{name or hub.DEFAULT_NAME} is whole as it is"
        )
    else:
        path = hub.resolve_weights(
            name, revision=options.revision, offline=options.offline, is_pull=True,
            selection=hub.Selection(options.include, options.exclude),
        )  # fmt: skip
        if note := NOTES.get(ALIASES.get(name, name)):
            print(f"{name}: {note}", file=sys.stderr)
    print(path)
    return 0


def _make(name: str, options: PullConfig) -> Path:
    from chatserve import chains

    if selection := hub.Selection(options.include, options.exclude):
        raise UsageError(f"{selection}: patterns are for hub ids; {name} is made of parts")
    if options.revision != hub.DEFAULT_REVISION:
        raise UsageError(
            f"--revision {options.revision} is for hub ids; {name} is made of {CHAINS[name].recipe}"
        )
    path = chains.make(CHAINS[name], options.base, keep=options.keep, offline=options.offline)
    print(f"chat with it: chatserve chat {name}", file=sys.stderr)
    return path
