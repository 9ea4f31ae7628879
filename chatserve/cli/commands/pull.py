"""`chatserve pull [NAME]`: fetch a model into the cache and print where it is."""

from __future__ import annotations

from dataclasses import dataclass

from chatserve import config, hub
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting


@dataclass(frozen=True)
class PullConfig:
    """Settings of `chatserve pull`."""

    revision: str = setting(hub.DEFAULT_REVISION, "revision of a hub id")
    offline: bool = setting(False, "never touch the network: only check what is there")


def main(argv: list[str]) -> int:
    """Fetch the model; its path goes to stdout. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve pull",
        "Fetch a model into the cache, or check that it is there.",
        PullConfig,
    )
    parser.add_argument(
        "name", nargs="?", help=f"an alias or a hub id (default: {hub.DEFAULT_NAME})"
    )
    flags = parser.flags(argv)
    name = flags.pop("name")
    if name is not None and hub.is_path(name):
        raise UsageError(f"{name} is a path, there is nothing to pull; `chatserve chat {name}`")
    options = config.build(PullConfig, flags)
    path = hub.resolve_weights(
        name, revision=options.revision, offline=options.offline, is_pull=True
    )
    print(path)
    return 0
