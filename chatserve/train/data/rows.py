"""One question with its answers a row: JSONL, and Parquet as stack-exchange-preferences has it.

Columns: `qid`, `question`, `answers` (a list of `answer_id`, `text`, `pm_score` or `votes`,
`selected`, `author`, `author_profile`), `metadata` (addresses, the question's first); JSONL may
have `license`, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from chatserve.train.data.lines import MAX_LINE_BYTES, lines_from
from chatserve.train.data.records import (
    Answer,
    BadRow,
    BadSource,
    Credit,
    Question,
    Record,
    checked_number,
    checked_text,
)

_BATCH_ROWS = 64
_COLUMNS = ("qid", "question", "answers", "metadata", "license")
_NEEDED = {"qid", "question", "answers"}


@dataclass(frozen=True)
class Row:
    """What one row of a source holds, or its `fault`.

    `end` and `number`: where reading goes on after it (bytes, in Parquet rows) and how many rows
    or lines there were up to here.
    """

    end: int
    number: int
    where: str
    records: tuple[Record, ...] = ()
    fault: str | None = None


def read_jsonl(path: Path, license: str, offset: int = 0, number: int = 0) -> Iterator[Row]:
    """The rows from a line on; empty lines are nothing."""
    with path.open("rb") as file:
        for line in lines_from(file, offset, number):
            where, fault = f"line {line.number}", None
            records: tuple[Record, ...] = ()
            try:
                if line.text is None:
                    raise BadRow(f"is longer than {MAX_LINE_BYTES >> 20} MiB")
                if line.text.strip():
                    records = _records(orjson.loads(line.text), license)
            except orjson.JSONDecodeError as error:
                fault = f"malformed JSON: {str(error).partition(':')[0]}"
            except BadRow as error:
                fault = str(error)
            yield Row(line.end, line.number, where, records, fault)


def read_parquet(path: Path, license: str, offset: int = 0, number: int = 0) -> Iterator[Row]:
    """The rows from row `offset` on. Raises `BadSource` for another table, or a broken one."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names = set(file.schema_arrow.names)
            if missing := _NEEDED - names:
                raise BadSource(
                    f"{path.name} lacks the columns {', '.join(sorted(missing))}; it has "
                    f"{', '.join(sorted(names)) or 'none'}"
                )
            columns = [name for name in _COLUMNS if name in names]
            first = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if first + num_rows > offset:
                    yield from _group(file, group, first, offset, columns, license)
                first += num_rows
    except (pyarrow.ArrowException, OSError) as error:
        # not "[Errno 22] …": one line, the first of Arrow's
        raise BadSource(f"{path.name} cannot be read as Parquet: {str(error).splitlines()[0]}; "
                        "fetch it anew") from error  # fmt: skip


def num_rows_of(path: Path) -> int:
    """Of a Parquet file. Raises `BadSource`."""
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadSource(f"{path.name} cannot be read as Parquet: {str(error).splitlines()[0]}; "
                        "fetch it anew") from error  # fmt: skip


def named_id(host: str | None, number: int) -> str:
    """A question's name among all sites: numbers are a site's own."""
    return f"{host}/{number}" if host else str(number)


def _group(
    file: Any, group: int, first: int, offset: int, columns: list[str], license: str
) -> Iterator[Row]:
    number = first
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
        if number + batch.num_rows <= offset:
            number += batch.num_rows
            continue
        for row in batch.to_pylist():
            number += 1
            if number <= offset:
                continue
            try:
                yield Row(number, number, f"row {number}", _records(row, license))
            except BadRow as error:
                yield Row(number, number, f"row {number}", (), str(error))


def _records(row: Any, license: str) -> tuple[Record, ...]:
    """A question and its answers. Raises `BadRow`."""
    if not isinstance(row, dict):
        raise BadRow("is no object")
    number = checked_number(row.get("qid"), "qid")
    text = checked_text(row.get("question"), "question")
    url = _address(row.get("metadata"))
    license = checked_text(row.get("license"), "license") or license
    question_id = named_id(urlsplit(url).hostname if url else None, number)
    answers = row.get("answers")
    if not isinstance(answers, list):
        raise BadRow("answers is no list")
    question = Question(question_id, text, None, Credit(url, None, None, license))
    return question, *(_answer(each, question, license) for each in answers)


def _answer(row: Any, question: Question, license: str) -> Answer:
    if not isinstance(row, dict):
        raise BadRow("an answer is no object")
    answer_id = str(checked_number(row.get("answer_id"), "answer_id"))
    text = checked_text(row.get("text"), "text")
    votes = score = None
    if row.get("pm_score") is not None:
        score = checked_number(row["pm_score"], "pm_score")
    else:
        votes = checked_number(row.get("votes"), "votes")
    url = question.credit.url
    credit = Credit(
        url=f"{url}#{answer_id}" if url else None,
        author=checked_text(row.get("author"), "author") or None,
        author_url=checked_text(row.get("author_profile"), "author_profile") or None,
        license=license,
    )
    is_accepted = row.get("selected") is True
    return Answer(question.question_id, answer_id, text, votes, score, is_accepted, credit)


def _address(metadata: Any) -> str | None:
    """The first of some addresses, without what could be anything but one."""
    if not isinstance(metadata, list) or not metadata or not isinstance(metadata[0], str):
        return None
    try:
        parts = urlsplit(metadata[0])
    except ValueError:
        return None
    return metadata[0] if parts.scheme in ("http", "https") and parts.hostname else None
