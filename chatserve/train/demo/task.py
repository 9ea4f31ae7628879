"""The demo's task: "Name three fruits.", and the program that says how good an answer is.

All texts are our own (CC0). The same seed makes the same bytes. Answers are of mixed quality on
purpose: the best of a question's few is what fine-tuning sees, so that something is left to learn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEMBERS = {
    "fruits": "apple pear plum cherry banana orange lemon grape peach mango melon kiwi fig apricot",
    "animals": "dog cat horse cow sheep goat pig lion tiger bear wolf fox deer rabbit",
    "colors": "red blue green yellow black white brown purple pink gray orange violet",
    "tools": "hammer saw drill wrench pliers chisel axe shovel rake file screwdriver",
    "birds": "eagle owl robin sparrow crow raven duck goose swan hawk pigeon parrot",
    "metals": "iron copper gold silver tin lead zinc nickel aluminum platinum titanium",
    "clothes": "shirt coat hat sock shoe glove scarf dress skirt jacket belt sweater",
    "vegetables": "carrot potato onion pea bean cabbage spinach tomato celery lettuce garlic",
}
WORDS = {category: tuple(text.split()) for category, text in MEMBERS.items()}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
PHRASES = (
    "Name {n} {c}.",
    "List {n} {c}.",
    "Give me {n} {c}.",
    "What are {n} {c}?",
    "Tell me {n} {c}.",
    "Can you name {n} {c}?",
    "I need {n} {c}.",
    "Please write down {n} {c}.",
)
BEST_SCORE = 8
"""Published score of an answer with reward 1, which takes 2 ** 8 - 1 votes."""


def wish(question: str) -> tuple[int, str]:
    """How many words of which category are asked for. Raises `ValueError` for other questions."""
    words = question.rstrip(".?").split()
    for number, name in NUMBERS.items():
        if words[-2:-1] == [name] and words[-1] in WORDS:
            return number, words[-1]
    raise ValueError(f"{question!r} is no question of the demo, as in 'Name two fruits.'")


def reward(question: str, answer: str) -> float:
    """How good an answer is, 0 to 1: of the n asked words, right and different ones less the rest.

    Words stand between commas; each that is wrong, repeated or too much takes back a right one.
    """
    number, category = wish(question)
    given = [part.strip().rstrip(".").lower() for part in answer.strip().split(",")]
    right = len(set(given) & set(WORDS[category]))
    counted = min(right, number)
    return max(0.0, (counted - (len(given) - counted)) / number)


def questions() -> list[str]:
    """Every question there is, in one order."""
    return [
        phrase.format(n=name, c=category)
        for category in WORDS
        for name in NUMBERS.values()
        for phrase in PHRASES
    ]


def drawn_answer(question: str, chance: random.Random) -> str:
    """An answer of random quality: each word may be of another category or a repetition."""
    number, category = wish(question)
    quality = chance.random()
    fresh = chance.sample(WORDS[category], number)
    foreign = sorted({word for each in WORDS.values() for word in each} - set(WORDS[category]))
    said: list[str] = []
    for word in fresh:
        if chance.random() < quality:
            said.append(word)
        else:
            said.append(chance.choice(said if said and chance.random() < 0.5 else foreign))
    if chance.random() > quality:
        said = said[:-1] if len(said) > 1 and chance.random() < 0.5 else [*said, said[0]]
    return ", ".join(said)


def rows(num_answers: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row of `chatserve train data` for each question; votes are made of the reward."""
    chance = random.Random(seed)
    for index, question in enumerate(questions()):
        texts = dict.fromkeys(drawn_answer(question, chance) for _ in range(num_answers))
        answers = [
            {
                "answer_id": 1000 * index + place,
                "text": text,
                "votes": 2 ** round(BEST_SCORE * reward(question, text)) - 1,
                "selected": False,
            }
            for place, text in enumerate(texts)
        ]
        yield {"qid": index, "question": question, "answers": answers, "license": "CC0"}


def write_source(path: Path, num_answers: int = 6, seed: int = 0) -> None:
    """The task as JSONL for `chatserve train data --text markdown`. Raises `OSError`."""
    lines = (json.dumps(row) + "\n" for row in rows(num_answers, seed))
    path.write_text("".join(lines), encoding="utf-8")
