"""What every source becomes: questions, answers and who wrote them. Knows no file format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson

from chatserve.errors import StartupError

MAX_TEXT_LEN = 200_000
MAX_NUMBER = (1 << 63) - 1


class BadRow(Exception):
    """A row of a source that cannot be read; the reason in a few words."""


class BadSource(StartupError):
    """A source that cannot be read at all, or not without its bad rows."""

    exit_code = 1


@dataclass(frozen=True)
class Credit:
    """What a licence with attribution asks for; None is what a source does not say."""

    url: str | None
    author: str | None
    author_url: str | None
    license: str


@dataclass(frozen=True)
class Question:
    """`accepted_id`: of the answer that the asker accepted."""

    question_id: str
    text: str
    accepted_id: str | None
    credit: Credit


@dataclass(frozen=True)
class Answer:
    """Either `votes`, as a dump counts them, or the `score` that somebody made of them."""

    question_id: str
    answer_id: str
    text: str
    votes: int | None
    score: int | None
    is_accepted: bool
    credit: Credit


Record = Question | Answer


def encode(record: Record) -> bytes:
    """One line, without its end."""
    return orjson.dumps([isinstance(record, Answer), *_values(record)])


def decode(lines: Iterable[bytes]) -> Iterator[Record]:
    """What `encode` has made."""
    for line in lines:
        is_answer, *values, credit = orjson.loads(line)
        values.append(Credit(*credit))
        yield Answer(*values) if is_answer else Question(*values)


def _values(record: Record) -> list[object]:
    values = [getattr(record, item.name) for item in dataclasses.fields(record)]
    return [*values[:-1], list(dataclasses.astuple(record.credit))]


def checked_text(value: object, what: str) -> str:
    """A text of a row, "" where there is none. Raises `BadRow`."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{what} is no text")
    if len(value) > MAX_TEXT_LEN:
        raise BadRow(f"{what} has {len(value):,} characters, over {MAX_TEXT_LEN:,}")
    return value


def checked_number(value: object, what: str) -> int:
    """A whole number of a row, also where it is written as text. Raises `BadRow`."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            number = int(value)
        except ValueError:
            pass
        else:
            if abs(number) <= MAX_NUMBER:
                return number
    elif isinstance(value, float) and value.is_integer() and abs(value) <= MAX_NUMBER:
        return int(value)
    raise BadRow(f"{what} is no whole number: {_shown(value)}" if value is not None
                 else f"{what} is missing")  # fmt: skip


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
