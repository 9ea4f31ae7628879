"""Whether weights, config.json and tokenizer are of one vocabulary: LLaMA's 32000, v0's 32001.

Reads headers only. Knows no network, and no row's content.
"""

from __future__ import annotations

import logging
from pathlib import Path

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PAD, PAD_ID = "[PAD]", 32000
"""What Vicuna v0 appended to LLaMA's pieces; the first row that LLaMA does not have."""
_AGAIN = "make the model again: chatserve apply-delta BASE DELTA TARGET"


def refuse_two_vocabularies(checkpoint: Checkpoint) -> None:
    """Raise `ModelLoadError` naming the rows of each, and the command that puts it right."""
    path, rows = checkpoint.path, num_rows(checkpoint)
    if rows is None:
        return
    head = checkpoint.weights.tensors().get("lm_head.weight")
    if head is not None and head.shape[:1] != (rows,):
        _refuse_head(path, rows, head.shape[0] if head.shape else 0)
    said = checkpoint.config.get("vocab_size")
    if said == rows + 1:
        raise ModelLoadError(
            f"{path}: config.json says {said:,} rows, embedding and head have {rows:,}: a delta "
            f"that appends a row (Vicuna v0's {PAD}) was added without it; {_AGAIN}"
        )
    if said == rows - 1:
        raise ModelLoadError(
            f"{path}: embedding and head have {rows:,} rows, config.json says {said:,}: it is the "
            f"base's, not the delta's; put it right: {repair_command(path)}"
        )


def warn_of_other_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Say when the tokenizer is another model's: texts come out, some tokens do not."""
    path, rows = checkpoint.path, num_rows(checkpoint)
    if rows is None:
        return
    if lacks_pad(checkpoint, tokenizer):
        logger.warning(
            "%s: the weights have %d rows, the tokenizer %d tokens: it is the base's, not the "
            "delta's, and lacks %s; put it right: %s",
            path, rows, tokenizer.vocab_size, PAD, repair_command(path),
        )  # fmt: skip
    unknown = {text: id_ for text, id_ in tokenizer.special_ids.items() if id_ >= rows}
    if unknown:
        text, token_id = min(unknown.items(), key=lambda item: item[1])
        hint = f"if these are Vicuna v0, {_AGAIN}" if (text, token_id) == (PAD, rows) else ""
        logger.warning(
            "%s: the tokenizer has %d tokens that the weights have no row for, first %r (%d; %d "
            "rows): it is another model's; %s",
            path, len(unknown), text, token_id, rows,
            hint or "take the files of the model's own repository",
        )  # fmt: skip


def num_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the embedding as stored, where it has its usual name."""
    info = checkpoint.weights.tensors().get("model.embed_tokens.weight")
    return info.shape[0] if info is not None and info.shape else None


def lacks_pad(checkpoint: Checkpoint, tokenizer: Tokenizer) -> bool:
    """Whether the weights have Vicuna v0's row and the tokenizer is LLaMA's own."""
    rows = (num_rows(checkpoint), tokenizer.vocab_size)
    return checkpoint.config.get("model_type") == "llama" and rows == (PAD_ID + 1, PAD_ID)


def repair_command(path: Path) -> str:
    return f"chatserve repair {path} TARGET"


def _refuse_head(path: Path, rows: int, head_rows: int) -> None:
    if abs(rows - head_rows) == 1:
        longer = "embedding" if rows > head_rows else "head"
        reason = f"a delta's row was appended to the {longer} alone; {_AGAIN}"
    else:
        reason = "the files belong to different models; download them again"
    raise ModelLoadError(
        f"{path}: the embedding has {rows:,} rows, the head {head_rows:,}: {reason}"
    )
