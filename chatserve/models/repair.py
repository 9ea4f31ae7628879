"""What is wrong with a model folder and can be put right, and the folder that is right.

Weights are moved or renamed, never changed in value; small JSON files get what the vocabulary says.
Knows no server and no device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve.errors import UsageError
from chatserve.models import reading
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import is_native
from chatserve.models.merged_folder import save_merged
from chatserve.models.self_check import diagnose, explain
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from chatserve.models.tokenizer_settings import TokenizerSettings
from chatserve.models.vocabulary_check import (
    PAD,
    PAD_ID,
    lacks_pad,
    num_rows,
    refuse_two_vocabularies,
)
from chatserve.progress import Progress

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Repair:
    """A folder as it should be. findings: what was wrong, a clause each.

    changed: contents of JSON files beside config.json. loss: of the mended weights, by
    `reading.COUNTING`.
    """

    checkpoint: Checkpoint
    findings: tuple[str, ...]
    changed: Mapping[str, Mapping[str, Any]]
    loss: float
    is_readable: bool


def find_repairs(path: Path) -> Repair:
    """Look at a model folder; the caller closes the weights.

    Reads all the weights, block by block. Raises `ModelLoadError` for what only other files can put
    right, and `UsageError` for a `.gguf` file.
    """
    if not path.is_dir():
        raise UsageError(
            f"{path}: only model folders are put right; make the .gguf file again from a folder "
            "that is, or take another one"
        )
    checkpoint = open_checkpoint(path)
    tokenizer, settings = load_tokenizer(path), TokenizerSettings.read(path)
    config, findings = _config(checkpoint, tokenizer)
    checkpoint = dataclasses.replace(checkpoint, config=config)
    refuse_two_vocabularies(checkpoint)
    changed, more = _files(checkpoint, tokenizer, settings)
    findings += more
    loss = _loss(checkpoint, tokenizer)
    limit = reading.readable_loss(tokenizer.vocab_size)
    diagnosis = diagnose(checkpoint, tokenizer, is_readable=loss < limit)
    if diagnosis is not None:
        findings.append(explain(diagnosis))
        checkpoint = diagnosis.fault.mended(checkpoint)
        loss = _loss(checkpoint, tokenizer)
    return Repair(checkpoint, tuple(findings), changed, loss, loss < limit)


def write_repaired(repair: Repair, target: Path, *, force: bool, progress: Progress) -> None:
    """Write the folder. Raises `UsageError` and `CannotWrite` for the target."""
    checkpoint = repair.checkpoint
    save_merged(
        checkpoint, checkpoint, target, dtype=None, force=force, sources=(checkpoint.path,),
        progress=progress, changed=repair.changed,
    )  # fmt: skip


def _loss(checkpoint: Checkpoint, tokenizer: Tokenizer) -> float:
    """Infinite where another network than ours would have to read."""
    if not is_native(checkpoint.config):
        return math.inf
    ids = reading.token_ids(tokenizer, reading.COUNTING, reading.MAX_TOKENS)
    return reading.loss_from_disk(checkpoint, ids)


def _config(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[str]]:
    config, findings = dict(checkpoint.config), []
    rows, said = num_rows(checkpoint), config.get("vocab_size")
    if rows is not None and said == rows - 1:
        config["vocab_size"] = rows
        findings.append(f"config.json said {said:,} rows of vocabulary, there are {rows:,}")
    if findings_of_ids := _put_ids_right(config, tokenizer):
        findings.append(f"config.json said {findings_of_ids}")
    return config, findings


def _put_ids_right(table: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Ids that cannot be, replaced by the vocabulary's own; what they were."""
    if not tokenizer.eos_ids:
        return ""
    ends = sorted(tokenizer.eos_ids)
    own = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    wrong = []
    for key in _IDS:
        value = table.get(key)
        if type(value) is not int or not _is_wrong(key, value, tokenizer):
            continue
        wrong.append(f"{key} {value}")
        table[key] = own.get(key)
    return ", ".join(wrong)


def _is_wrong(key: str, value: int, tokenizer: Tokenizer) -> bool:
    if key == "pad_token_id":
        return not 0 <= value < tokenizer.vocab_size
    return value not in (tokenizer.eos_ids if key == "eos_token_id" else {tokenizer.bos_id})


def _files(
    checkpoint: Checkpoint, tokenizer: Tokenizer, settings: TokenizerSettings
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    changed: dict[str, Mapping[str, Any]] = {}
    findings: list[str] = []
    names = {
        name: text
        for name, text in tokenizer.names.items()
        if settings.named_token(name) != text and not _is_none(settings, name)
    }
    if names:
        findings += [
            f"{name} was {_said(settings, name)}, the vocabulary says {text!r}"
            for name, text in names.items()
            if _is_named(settings, name)
        ]
    if lacks_pad(checkpoint, tokenizer):
        findings.append(f"the tokenizer lacked {PAD}, the weights have row {PAD_ID} for it")
        names["pad_token"] = PAD
        changed["added_tokens.json"] = {**settings.added_tokens, PAD: PAD_ID}
    if findings:
        changed["tokenizer_config.json"] = {**settings.tokenizer_config, **names}
        changed["special_tokens_map.json"] = {**settings.special_tokens_map, **names}
    generation = dict(checkpoint.generation_config)
    if ids := _put_ids_right(generation, tokenizer):
        findings.append(f"generation_config.json said {ids}")
        changed["generation_config.json"] = generation
    return changed, findings


def _said(settings: TokenizerSettings, name: str) -> str:
    text = settings.named_token(name)
    return repr(text) if text else "blank"


def _is_named(settings: TokenizerSettings, name: str) -> bool:
    """Whether the files say anything, be it a blank."""
    return any(name in table for table in (settings.tokenizer_config, settings.special_tokens_map))


def _is_none(settings: TokenizerSettings, name: str) -> bool:
    """Whether the files say that there is none, as Qwen's do of BOS."""
    table = settings.tokenizer_config
    return name in table and table[name] is None and settings.named_token(name) is None
