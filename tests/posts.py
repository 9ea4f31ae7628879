"""Dumps and tables of questions, made up, for tests of `chatserve train data`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr


def post(post_id: int, parent: int | None = None, **attributes: object) -> str:
    """A `<row …/>`: a question, or an answer to `parent`."""
    values = {"Id": post_id, "PostTypeId": 1 if parent is None else 2}
    if parent is not None:
        values |= {"ParentId": parent, "Score": 0}
    found = {**values, "Body": f"<p>text {post_id}</p>", **attributes}
    shown = (f"{name}={quoteattr(str(value), {chr(10): '&#xA;'})}" for name, value in found.items()
             if value is not None)  # fmt: skip
    return f"  <row {' '.join(shown)} />"


def dump(path: Path, rows: Sequence[str]) -> Path:
    lines = ['\ufeff<?xml version="1.0" encoding="utf-8"?>', "<posts>", *rows, "</posts>"]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def many_posts(num_questions: int) -> list[str]:
    """Questions with 0 to 4 answers, which come after all questions, and last ones first."""
    questions = [post(n, AcceptedAnswerId=1000 * n + 1) for n in range(1, num_questions + 1)]
    answers = [
        post(1000 * n + k, parent=n, Score=(7 * n + 13 * k) % 40 - 4, OwnerUserId=n + k)
        for n in range(1, num_questions + 1)
        for k in range(1, n % 5 + 1)
    ]
    return [*questions, *reversed(answers)]


def row(qid: int, *votes: int, **others: Any) -> dict[str, Any]:
    """A question whose answers have so many votes."""
    answers = [
        {"answer_id": 10 * qid + k, "text": f"<p>answer {qid}-{k}</p>", "votes": each}
        for k, each in enumerate(votes)
    ]
    return {"qid": qid, "question": f"<p>question {qid}</p>", "answers": answers, **others}


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    """Rows that are text are lines as they are."""
    lines = (each if isinstance(each, str) else json.dumps(each) for each in rows)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path
