"""What the recipe trains on: one layout of a question and its answer. Knows no tokenizer.

Source: the scripts of StackLLaMA, April 2023. Serving leaves away the space behind `Answer:`, as
the public demo did, because the vocabulary puts it before the answer's first word.
"""

from __future__ import annotations

QUESTION = "Question: {question}\n\nAnswer: "
TEMPLATE = QUESTION + "{answer}"


def query_text(question: str) -> str:
    """What reinforcement learning lets the policy go on from."""
    return QUESTION.format(question=question)


def training_text(question: str, answer: str) -> str:
    """What fine-tuning reads and a reward model scores."""
    return query_text(question) + answer
