"""One bucket's questions as one shard of the tables: Markdown, scores, pairs, attribution.

A pure function of the bucket and the settings, for any process.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from chatserve.train.data.buckets import read_bucket
from chatserve.train.data.markdown import Unreadable, markdown_of, tidy
from chatserve.train.data.pairs import ScoredAnswer, best_answer, pairs_of
from chatserve.train.data.records import Answer, Credit, Question
from chatserve.train.data.scores import score_of
from chatserve.train.data.splits import place_of, split_of
from chatserve.train.data.tables import Tables, written_aside


@dataclass(frozen=True)
class ShardJob:
    """All that a process needs to know. `text`: the form of a source's texts."""

    shard: int
    bucket: Path
    out: Path
    attribution: Path
    done: Path
    shares: tuple[int, ...]
    pairs: int
    seed: int
    text: str


def make_shard(job: ShardJob) -> dict[str, int]:
    """Write the shard's tables and attribution, then its counts as `job.done`; returns these.

    Raises `OSError`.
    """
    counts: Counter[str] = Counter()
    with Tables(job.out, job.shard) as tables, written_aside(job.attribution) as credits:
        for question, answers in _questions(job, counts):
            used = _add(job, question, answers, tables, counts)
            if used is not None:
                for credit in (question.credit, *(each.credit for each in used)):
                    counts[f"license {credit.license}"] += 1
                credits.write(orjson.dumps(_attribution(question, used)) + b"\n")
    table = dict(sorted(counts.items()))
    with written_aside(job.done) as file:
        file.write(orjson.dumps(table))
    return table


def _questions(job: ShardJob, counts: Counter[str]) -> Iterator[tuple[Question, list[Answer]]]:
    """Each question once, with its answers by age, in the order of the questions' hashes."""
    questions: dict[str, Question] = {}
    answers: dict[str, dict[str, Answer]] = {}
    for record in read_bucket(job.bucket):
        if isinstance(record, Question):
            is_new = questions.setdefault(record.question_id, record) is record
            counts["questions" if is_new else "repeated"] += 1
        else:
            siblings = answers.setdefault(record.question_id, {})
            is_new = siblings.setdefault(record.answer_id, record) is record
            counts["answers" if is_new else "repeated"] += 1
    for question_id in sorted(questions, key=lambda each: (place_of(each, job.seed), each)):
        found = answers.pop(question_id, {})
        yield questions[question_id], sorted(found.values(), key=lambda each: int(each.answer_id))
    counts["answers without their question"] += sum(map(len, answers.values()))


def _add(
    job: ShardJob, question: Question, answers: list[Answer], tables: Tables, counts: Counter[str]
) -> list[Answer] | None:
    """Add a question's rows to the table of its split: the answers in them; None without rows."""
    text = _text(question.text, job, counts)
    if not text:
        return None
    split = split_of(place_of(question.question_id, job.seed)[1], job.shares)
    head = {"question_id": question.question_id, "question": text}
    if split == "rl":
        tables.add(split, head)
        counts[f"{split} rows"] += 1
        return []
    scored = [
        ScoredAnswer(answer.answer_id, markdown, _score(answer, question))
        for answer in answers
        if (markdown := _text(answer.text, job, counts))
    ]
    if split == "finetune":
        best = best_answer(scored)
        used = [best] if best else []
        for each in used:
            tables.add(split, {**head, "answer": each.text})
        counts["questions without a good answer"] += not used
        counts[f"{split} rows"] += len(used)
    else:
        pairs = pairs_of(scored, job.pairs, f"{job.seed}:{question.question_id}")
        used = []
        for pair in pairs:
            used += [pair.chosen, pair.rejected]
            tables.add(
                split,
                {
                    **head, "chosen": pair.chosen.text, "rejected": pair.rejected.text,
                    "score_chosen": pair.chosen.score, "score_rejected": pair.rejected.score,
                },
            )  # fmt: skip
        if not pairs:
            why = "only tied answers" if len(scored) > 1 else "fewer than two answers"
            counts[f"questions to compare with {why}"] += 1
        counts[f"{split} rows"] += len(pairs)
    ids = {each.answer_id for each in used}
    return [answer for answer in answers if answer.answer_id in ids] or None


def _text(text: str, job: ShardJob, counts: Counter[str]) -> str:
    """A post as Markdown, "" for what is none."""
    try:
        found = markdown_of(text) if job.text == "html" else tidy(text)
    except Unreadable:
        counts["unreadable posts"] += 1
        return ""
    counts["empty posts"] += not found.strip()
    return found if found.strip() else ""


def _score(answer: Answer, question: Question) -> int:
    if answer.score is not None:
        return answer.score
    assert answer.votes is not None
    is_accepted = answer.is_accepted or answer.answer_id == question.accepted_id
    return score_of(answer.votes, is_accepted=is_accepted)


def _attribution(question: Question, answers: list[Answer]) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        **_credit(question.credit),
        "answers": [
            {"answer_id": answer.answer_id, **_credit(answer.credit)} for answer in answers
        ],
    }


def _credit(credit: Credit) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(credit).items() if value is not None}
