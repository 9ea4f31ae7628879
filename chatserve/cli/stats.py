"""What the answers of a chat took: tokens, time, and how full the context is.

Knows answers as plain data; draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chatserve.cli.answer import Answer, ModelInfo
from chatserve.cli.escapes import one_line


@dataclass
class Stats:
    """Sums over all answers, and the last one itself."""

    num_answers: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    num_counted: int = 0  # events of answers whose tokens the server has not told
    duration_s: float = 0.0
    last: Answer = field(default_factory=Answer)
    last_model: str = ""

    def add(self, model: str, answer: Answer) -> None:
        """One that has ended, however it did; without a word and a number it is none."""
        if not answer.text and answer.num_tokens is None:
            return
        self.num_answers += 1
        self.num_prompt_tokens += answer.num_prompt_tokens or 0
        self.num_cached_tokens += answer.num_cached_tokens or 0
        self.num_tokens += answer.num_tokens or 0
        if answer.num_tokens is None:
            self.num_counted += answer.num_events
        self.duration_s += answer.duration_s or 0.0
        self.last, self.last_model = answer, model


def answer_text(answer: Answer) -> str:
    """`812 tokens in (800 cached) · 40 out · first after 0.31 s · 25.1 tokens/s`; only what is
    known.

    A server tells its tokens with the end of an answer, so of a stopped one the client has only
    its own count of events: `about 12 out (counted here) · first after 0.31 s · about 25.1
    tokens/s · 0.8 s`.
    """
    parts = [
        _tokens_in(answer.num_prompt_tokens, answer.num_cached_tokens),
        f"{answer.num_tokens:,} out" if answer.num_tokens is not None else None,
        _counted(answer.num_events) if answer.num_tokens is None else None,
        None if answer.ttft_s is None else f"first after {answer.ttft_s:.2f} s",
        f"{answer.tokens_per_s:.1f} tokens/s" if answer.tokens_per_s else None,
    ]
    if answer.num_tokens is None:
        speed, duration_s = answer.events_per_s, answer.duration_s
        parts.append(f"about {speed:.1f} tokens/s" if speed else None)
        parts.append(None if duration_s is None else f"{duration_s:.1f} s")
    return " · ".join(part for part in parts if part) or "the server told no numbers"


def stats_text(stats: Stats, model: ModelInfo | None) -> str:
    """The last answer, all together, and the context; a row each."""
    if not stats.num_answers:
        return "no answer yet"
    answers = f"{stats.num_answers:,} answer{'s' if stats.num_answers > 1 else ''}"
    sums = [
        answers,
        _tokens_in(stats.num_prompt_tokens or None, stats.num_cached_tokens or None),
        f"{stats.num_tokens:,} out" if stats.num_tokens else None,
        _counted(stats.num_counted),
        f"{stats.duration_s:.1f} s",
    ]
    return "\n".join(
        [
            f"last answer  {one_line(stats.last_model)} · {answer_text(stats.last)}",
            "in all       " + " · ".join(part for part in sums if part),
            f"context      {context_text(stats.last, model)}",
        ]
    )


def context_text(answer: Answer, model: ModelInfo | None) -> str:
    """`160 of 2,048 tokens (8 %)`."""
    used = answer.num_context_tokens
    size = model.context_length if model is not None else None
    if used is None:
        return "the server does not say how much is used"
    if not size:
        return f"{used:,} tokens of a size that the server does not say"
    return f"{used:,} of {size:,} tokens ({used / size:.0%})"


def _counted(num_events: int) -> str | None:
    return f"about {num_events:,} out (counted here)" if num_events else None


def _tokens_in(num_tokens: int | None, num_cached: int | None) -> str | None:
    if num_tokens is None:
        return None
    return f"{num_tokens:,} tokens in" + (f" ({num_cached:,} cached)" if num_cached else "")
