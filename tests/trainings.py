"""What trainings in tests train on: a tiny base, and prepared rows as `train data` writes them."""

from __future__ import annotations

from pathlib import Path

import pyarrow
from pyarrow import parquet

from tests import tiny

GOOD, BAD = "yes yes yes", "no"


def save_base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    tiny.save_model(folder)
    return folder


def save_data(folder: Path, num_rows: int = 24) -> Path:
    """Questions with one answer, and pairs whose chosen side says yes."""
    numbers = [str(index) for index in range(num_rows)]
    questions = [f"Is it {number}?" for number in numbers]
    pairs = {
        "question": questions,
        "chosen": [f"{GOOD} {number}" for number in numbers],
        "rejected": [f"{BAD} {number}" for number in numbers],
        "score_chosen": [2] * num_rows,
        "score_rejected": [0] * num_rows,
    }
    tables = {
        "finetune": {"question": questions, "answer": [f"It is {each}" for each in numbers]},
        "reward": pairs,
        "evaluation": pairs,
    }
    for split, columns in tables.items():
        (folder / split).mkdir(parents=True)
        table = pyarrow.table({"question_id": numbers, **columns})
        parquet.write_table(table, folder / split / "00000.parquet")
    return folder
