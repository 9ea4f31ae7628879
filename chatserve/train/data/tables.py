"""The Parquet files of the four splits, each written aside and put in place whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from chatserve.train.data.splits import SPLITS

COLUMNS = {
    "finetune": ("question_id", "question", "answer"),
    "reward": (
        "question_id", "question", "chosen", "rejected", "score_chosen", "score_rejected",
    ),
    "rl": ("question_id", "question"),
    "evaluation": (
        "question_id", "question", "chosen", "rejected", "score_chosen", "score_rejected",
    ),
}  # fmt: skip
_ROWS = 512  # of one group: so many are in memory


def table_name(split: str, shard: int) -> str:
    return f"{split}/{shard:05}.parquet"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is written; a failure leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            yield file
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class Tables:
    """One shard of all four splits. `add` rows, then `close`; a table without rows is not made,
    but for the first shard's, which say what the columns are."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._folder = folder
        self._shard = shard
        self._rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._writers: dict[str, Any] = {}
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Tables:
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is None:
            for split in SPLITS:
                if self._rows[split] or self._shard == 0:
                    self._write(split)
            for writer in self._writers.values():
                writer.close()
        # after an error, the writers' own ends are for files that go away
        self._files.__exit__(*raised)

    def add(self, split: str, row: dict[str, Any]) -> None:
        self._rows[split].append(row)
        if len(self._rows[split]) >= _ROWS:
            self._write(split)

    def _write(self, split: str) -> None:
        import pyarrow
        import pyarrow.parquet

        rows, self._rows[split] = self._rows[split], []
        kinds = {True: pyarrow.int64(), False: pyarrow.string()}
        schema = pyarrow.schema(
            [(name, kinds[name.startswith("score_")]) for name in COLUMNS[split]]
        )
        if split not in self._writers:
            path = self._folder / table_name(split, self._shard)
            # a file of Python's: its errors are those of the system
            file = self._files.enter_context(written_aside(path))
            self._writers[split] = pyarrow.parquet.ParquetWriter(file, schema, compression="zstd")
        self._writers[split].write_table(pyarrow.Table.from_pylist(rows, schema=schema))
