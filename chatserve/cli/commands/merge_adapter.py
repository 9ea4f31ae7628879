"""`chatserve merge-adapter BASE ADAPTER TARGET`: a base and its adapters as one model folder."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve import config, hub
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.options import DTYPES
from chatserve.settings import setting

USAGE = "chatserve merge-adapter [flags] BASE ADAPTER [ADAPTER ...] TARGET"


@dataclass(frozen=True)
class MergeConfig:
    """Settings of `chatserve merge-adapter`."""

    # not `dtype`: the variable CHATSERVE_DTYPE is about what runs
    save_dtype: str = setting(
        "auto", "of the weights; auto keeps the base's", choices=DTYPES, flags=("--dtype",)
    )
    force: bool = setting(False, "replace TARGET if it is a model folder")
    revision: str = setting("main", "revision of a hub id")
    offline: bool = setting(False, "never touch the network")


def main(argv: list[str]) -> int:
    """Write the folder and print its path. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve merge-adapter",
        "Merge LoRA adapters into their base, one after the other, and write the result as a model "
        "folder. To serve the merge without writing it: chatserve serve BASE --adapter ADAPTER.",
        MergeConfig,
    )
    parser.usage = USAGE
    parser.add_argument("paths", nargs="*", metavar="PATH", help="BASE, ADAPTERs and TARGET")
    # FastChat's spellings
    parser.add_argument("--base-model-path", help=argparse.SUPPRESS)
    parser.add_argument("--lora-path", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--target-model-path", help=argparse.SUPPRESS)
    flags = parser.flags(argv, intermixed=True)
    base, adapters, target = _paths(flags)
    options = config.build(MergeConfig, flags)
    path = hub.resolve_weights(base, revision=options.revision, offline=options.offline)
    _merge(path, [Path(each).expanduser() for each in adapters], target, options)
    print(target)
    print(f"chat with it: chatserve chat {target}", file=sys.stderr)
    return 0


def _paths(flags: dict[str, Any]) -> tuple[str, list[str], Path]:
    """BASE, ADAPTERs and TARGET: what FastChat's flags leave open is given in that order."""
    places: list[str] = flags.pop("paths")
    base = flags.pop("base_model_path") or (places.pop(0) if places else None)
    target = flags.pop("target_model_path") or (places.pop() if places else None)
    adapters: list[str] = [*flags.pop("lora_path"), *places]
    if base is None or target is None or not adapters:
        raise UsageError(f"what is merged into what? usage: {USAGE}")
    return base, adapters, Path(target).expanduser()


def _merge(path: Path, adapters: list[Path], target: Path, options: MergeConfig) -> None:
    import torch

    from chatserve.byte_bar import ByteBar
    from chatserve.models.checkpoint import open_checkpoint
    from chatserve.models.merge import merge
    from chatserve.models.merged_folder import save_merged

    if path.suffix.lower() == ".gguf":
        flags = " ".join(f"--adapter {each}" for each in adapters)
        raise UsageError(
            f"{path} is a .gguf file, whose tokenizer has no place in a model folder; serve the "
            f"merge without writing it: chatserve serve {path} {flags}"
        )
    base = open_checkpoint(path)
    with closing(base.weights), ByteBar(f"merging into {target.name}", sys.stderr) as bar:
        save_merged(
            merge(base, adapters),
            base,
            target,
            dtype=None if options.save_dtype == "auto" else getattr(torch, options.save_dtype),
            force=options.force,
            sources=(path, *adapters),
            progress=bar,
        )
