"""A reward adapter: LoRA pairs and the score head that `chatserve train reward` saves with them.

The head turns the hidden state of a text's last token into one number: `weight @ state`, without a
bias, as `LlamaForSequenceClassification` with one label computes it. It lies in the adapter's own
file, as PEFT saves modules that are trained whole: `base_model.model.score.weight`, (1, hidden).
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve.errors import ModelLoadError
from chatserve.models.adapter import Adapter, adapter_folder, load_adapter, open_adapter_weights
from chatserve.models.adapter_config import is_score_head
from chatserve.models.config import ModelConfig
from chatserve.models.weight_files import read_json

if TYPE_CHECKING:
    import torch

SCORE_KEY = "base_model.model.score.weight"
TRAINING_RECORD = "chatserve_training.json"
"""Beside an adapter that chatserve trained: how, on which base, with which text."""
_MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class ScoreHead:
    """What makes a score of a hidden state (after the final norm) of a text's last token.

    weight: (hidden,), float32. template: "…{question}…{answer}", the text that was trained on,
    where the adapter's record tells; base_fingerprint: `weights_fingerprint` of the base, likewise.
    Texts are scored as they were trained: with BOS if the model has that custom, and without EOS.
    """

    weight: torch.Tensor
    fingerprint: str
    template: str | None = None
    base_fingerprint: str | None = None

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: (…, hidden) in any real dtype. Returns (…), float32."""
        return hidden.float() @ self.weight.to(hidden.device)


def has_score_head(path: Path) -> bool:
    """Whether the adapter in the folder `path` brings one. Raises `ModelLoadError`."""
    with closing(open_adapter_weights(adapter_folder(path))) as weights:
        return any(map(is_score_head, weights.tensors()))


def load_score_head(path: Path, config: ModelConfig) -> ScoreHead:
    """The score head in the adapter folder `path`, for a base of `config`.

    Raises `ModelLoadError` when there is none, or it has another size or values that are no
    numbers.
    """
    with closing(open_adapter_weights(adapter_folder(path))) as weights:
        names = [name for name in weights.tensors() if is_score_head(name)]
        if not names:
            raise ModelLoadError(
                f"{path}: the adapter has no score head ({SCORE_KEY!r}), as the reward adapter "
                "published in 2023 has none: it cannot score; train one by `chatserve train reward`"
            )
        info = weights.tensors()[names[0]]
        if len(names) > 1 or not info.is_real or info.shape != (1, config.hidden_size):
            raise ModelLoadError(
                f"{path}: the score head {names[0]!r} is {info.dtype_name} of shape {info.shape}, "
                f"wanted one of shape {(1, config.hidden_size)}; it has several labels, or belongs "
                "to another base"
            )
        weight = weights.read(names[0]).float().reshape(-1)
    if not bool(weight.isfinite().all()):
        raise ModelLoadError(
            f"{path}: the score head holds values that are no numbers (inf or nan); the training "
            "diverged or the file is damaged"
        )
    record = training_record(path)
    template, base = record.get("template"), record.get("base_fingerprint")
    return ScoreHead(
        weight,
        f"sh_{hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]}",
        template=template if isinstance(template, str) else None,
        base_fingerprint=base if isinstance(base, str) else None,
    )


def load_reward_adapter(
    path: Path, config: ModelConfig, *, name: str | None = None
) -> tuple[Adapter, ScoreHead]:
    """LoRA pairs and score head of a reward model on a base of `config`.

    Raises `ModelLoadError` when either is missing, damaged or of another base.
    """
    adapter = load_adapter(path, config, name=name, is_reward=True)
    return adapter, load_score_head(path, config)


def training_record(path: Path) -> dict[str, object]:
    """What `chatserve train` wrote beside the adapter; empty beside those that others trained.

    Raises `ModelLoadError` when the file is no JSON object.
    """
    if not (path / TRAINING_RECORD).exists():
        return {}
    return read_json(path, TRAINING_RECORD, max_bytes=_MAX_RECORD_BYTES)
