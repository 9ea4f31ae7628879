"""`chatserve apply-delta BASE DELTA TARGET`: original weights and a delta become a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve import config, hub
from chatserve.byte_bar import ByteBar
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

if TYPE_CHECKING:
    from chatserve.models.manifest import Manifest

_PLACES = ("base_model_path", "delta_path", "target_model_path")
_WORDS = ("BASE", "DELTA", "TARGET")


@dataclass(frozen=True)
class ApplyDeltaConfig:
    """Settings of `chatserve apply-delta`."""

    base_model_path: str | None = setting(None, "the same as BASE", metavar="BASE")
    delta_path: str | None = setting(None, "the same as DELTA", metavar="DELTA")
    target_model_path: str | None = setting(None, "the same as TARGET", metavar="TARGET")
    force: bool = setting(False, "replace the model at TARGET: it stays until the new one is whole")
    verify: bool = setting(
        False, "read TARGET again and compare every tensor with its recorded SHA-256"
    )
    recorded: str | None = setting(
        None,
        "a manifest that someone else's apply-delta wrote, or its folder: the result has to be it",
        metavar="FILE",
    )
    low_cpu_mem: bool = setting(False, "FastChat's; memory is always low here")
    revision: str = setting(hub.DEFAULT_REVISION, "revision of DELTA when that is a hub id")
    offline: bool = setting(False, "never touch the network")


def main(argv: list[str]) -> int:
    """Write the model, or only verify one; its path goes to stdout. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve apply-delta",
        "Add delta weights (Vicuna v0, v1.1) to their base and write the model as safetensors: "
        "chatserve apply-delta BASE DELTA TARGET. With TARGET alone and --verify: only compare it "
        "with its manifest.",
        ApplyDeltaConfig,
    )
    parser.add_argument(
        "places",
        nargs="*",
        metavar="FOLDER",
        help="BASE, DELTA and TARGET: the folder (or hub id) of the original weights, that of the "
        "delta, and the folder to write",
    )
    flags = parser.flags(argv, intermixed=True)
    places = flags.pop("places")
    options = config.build(ApplyDeltaConfig, flags)
    if options.verify and len(places) == 1 and not any(name in flags for name in _PLACES):
        target = Path(places[0]).expanduser()
    else:
        target = _apply(*_assigned(places, options), options)
    if options.verify:
        _verify(target, _recorded(options))
    print(target)
    return 0


def _assigned(places: Sequence[str], options: ApplyDeltaConfig) -> tuple[str, str, str]:
    """BASE, DELTA and TARGET: what FastChat's flags leave open is given in that order."""
    left = list(places)
    found: list[str] = []
    for name, word in zip(_PLACES, _WORDS, strict=True):
        value = getattr(options, name)
        if value is None and left:
            value = left.pop(0)
        if value is None:
            raise UsageError(f"{word} is missing: chatserve apply-delta {' '.join(_WORDS)}")
        found.append(value)
    if left:
        raise UsageError(
            f"unexpected argument {left[0]!r}; chatserve apply-delta takes {' '.join(_WORDS)}"
        )
    base, delta, target = found
    return base, delta, target


def _apply(base: str, delta: str, target: str, options: ApplyDeltaConfig) -> Path:
    base_path = hub.resolve_weights(base, offline=options.offline)
    delta_path = hub.resolve_weights(delta, revision=options.revision, offline=options.offline)
    import torch

    from chatserve.models.delta import apply_delta

    # a part is so small that a team of threads waits for itself longer than it computes
    torch.set_num_threads(1)
    target_path = Path(target).expanduser()
    with ByteBar(f"writing {target_path.name}", sys.stderr) as progress:
        apply_delta(
            base_path, delta_path, target_path,
            force=options.force, recorded=_recorded(options), progress=progress,
        )  # fmt: skip
    return target_path


def _recorded(options: ApplyDeltaConfig) -> Manifest | None:
    if options.recorded is None:
        return None
    from chatserve.models.manifest import read_manifest

    return read_manifest(Path(options.recorded).expanduser())


def _verify(target: Path, recorded: Manifest | None) -> None:
    from chatserve.models.checkpoint import open_checkpoint
    from chatserve.models.manifest import read_manifest, verify

    manifest = read_manifest(target) if recorded is None else recorded
    with (
        closing(open_checkpoint(target).weights) as weights,
        ByteBar(f"verifying {target.name}", sys.stderr) as progress,
    ):
        verify(target, weights, manifest, progress)
