"""The rows that `chatserve train data` wrote: `DIR/{finetune,reward,rl,evaluation}/*.parquet`.

Reads them a batch at a time. Knows columns and no tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from chatserve.errors import UsageError

_BATCH_ROWS = 1024
_EDGE_BYTES = 64 << 10


def parquet_files(data: Path, split: str) -> list[Path]:
    """Those of one split, in the order of their names. Raises `UsageError` where there are none."""
    files = sorted((data / split).glob("*.parquet"))
    if not files:
        raise UsageError(
            f"{data}: no {split}/*.parquet there; make it by `chatserve train data SOURCE --out "
            f"{data}`"
        )
    return files


def read_rows(data: Path, split: str, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The texts in `columns` of every row. Raises `UsageError` for a file that lacks one."""
    import pyarrow
    from pyarrow import parquet

    for path in parquet_files(data, split):
        try:
            with parquet.ParquetFile(path) as file:
                missing = [name for name in columns if name not in file.schema_arrow.names]
                if missing:
                    raise UsageError(
                        f"{path} has no column {missing[0]!r}, only "
                        f"{', '.join(file.schema_arrow.names)}; make it by `chatserve train data`"
                    )
                for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                    texts = [batch.column(name).to_pylist() for name in columns]
                    for row in zip(*texts, strict=True):
                        if not all(isinstance(text, str) for text in row):
                            raise UsageError(f"{path} holds a row whose {columns[0]} is no text")
                        yield row
        except pyarrow.ArrowException as error:
            raise UsageError(f"{path} is damaged ({error}); make it again") from error


def count_rows(data: Path, split: str) -> int:
    """By the files' footers alone."""
    from pyarrow import ArrowException, parquet

    total = 0
    for path in parquet_files(data, split):
        try:
            total += parquet.read_metadata(path).num_rows
        except ArrowException as error:
            raise UsageError(f"{path} is damaged ({error}); make it again") from error
    return total


def data_fingerprint(data: Path, splits: Sequence[str]) -> str:
    """Of names, sizes, and both ends of every file: the footer holds figures of all its columns."""
    digest = hashlib.sha256()
    for split in splits:
        for path in parquet_files(data, split):
            size = path.stat().st_size
            digest.update(f"{split}/{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_EDGE_BYTES))
                file.seek(max(0, size - _EDGE_BYTES))
                digest.update(file.read())
    return f"d_{digest.hexdigest()[:16]}"
