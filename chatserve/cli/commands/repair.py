"""`chatserve repair WEIGHTS [TARGET]`: what a conversion spoilt, and the model put right."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from chatserve import config, hub
from chatserve.byte_bar import ByteBar
from chatserve.cli.escapes import one_line
from chatserve.errors import ModelLoadError, UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

USAGE = "chatserve repair [flags] WEIGHTS [TARGET]"


@dataclass(frozen=True)
class RepairConfig:
    """Settings of `chatserve repair`."""

    force: bool = setting(False, "replace TARGET if it is a model folder")
    revision: str = setting("main", "revision of a hub id")
    offline: bool = setting(False, "never touch the network")


def main(argv: list[str]) -> int:
    """Name what is wrong; with TARGET write the model without it. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve repair",
        "Find what a conversion spoilt (rotary rows in a wrong order, exchanged matrices, a wrong "
        "vocabulary, blank special tokens) and write the model put right to TARGET. Without TARGET "
        "only say what is wrong.",
        RepairConfig,
    )
    parser.usage = USAGE
    parser.add_argument("paths", nargs="*", metavar="PATH", help="WEIGHTS and TARGET")
    flags = parser.flags(argv, intermixed=True)
    paths: list[str] = flags.pop("paths")
    options = config.build(RepairConfig, flags)
    if not 1 <= len(paths) <= 2:
        raise UsageError(f"which model is put right, and where to? usage: {USAGE}")
    weights = hub.resolve_weights(paths[0], revision=options.revision, offline=options.offline)
    return _repair(weights, Path(paths[1]).expanduser() if paths[1:] else None, options)


def _repair(path: Path, target: Path | None, options: RepairConfig) -> int:
    from chatserve.models.repair import find_repairs, write_repaired

    repair = find_repairs(path)
    with closing(repair.checkpoint.weights):
        for finding in repair.findings:
            print(f"found: {one_line(finding)}", file=sys.stderr)
        if not repair.is_readable and not repair.findings:
            raise ModelLoadError(
                f"{path}: reads plain English hardly better than chance ({repair.loss:.1f} nats a "
                "token), and nothing that can be put right explains it; download it again"
            )
        state = f"plain English costs {repair.loss:.1f} nats a token"
        if not repair.is_readable:
            state += ", hardly less than chance: something else is wrong, too"
        if not repair.findings:
            print(f"{path}: nothing to put right; {state}", file=sys.stderr)
            return 0
        if target is None:
            print(f"put it right: chatserve repair {path} TARGET", file=sys.stderr)
            return 0
        with ByteBar(f"writing {target.name}", sys.stderr) as bar:
            write_repaired(repair, target, force=options.force, progress=bar)
    print(target)
    print(f"put right, {state}; chat with it: chatserve chat {target}", file=sys.stderr)
    return 0
