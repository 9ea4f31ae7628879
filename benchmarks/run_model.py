"""The model of a run: where its forms lie and what of it the benchmarks must know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunModel:
    """Made by `benchmarks.models`: a folder `hf` and GGUF files beside it."""

    name: str
    root: Path
    vocab_size: int
    eos_ids: tuple[int, ...]

    @staticmethod
    def open(root: Path) -> RunModel:
        try:
            config = json.loads((root / "hf" / "config.json").read_text("utf-8"))
        except FileNotFoundError:
            raise SystemExit(
                f"{root} is missing; make it: python -m benchmarks.models {root.name}"
            ) from None
        eos = config.get("eos_token_id") or ()
        return RunModel(
            root.name,
            root,
            config["vocab_size"],
            tuple(eos) if isinstance(eos, list) else (eos,) if eos != () else (),
        )

    @property
    def folder(self) -> Path:
        return self.root / "hf"

    def gguf(self, form: str) -> Path:
        return self.root / f"{form}.gguf"
