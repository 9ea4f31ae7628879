"""The line that says who answers, how fast, and how full the context is.

Knows answers and models as plain data; draws nothing.
"""

from __future__ import annotations

from chatserve.cli.answer import Answer, ModelInfo
from chatserve.cli.escapes import one_line
from chatserve.cli.word_wrap import width_of

_BETWEEN = " · "
_WITHOUT_DECIMALS = 1000  # tokens/s


def status_text(model: ModelInfo, answer: Answer) -> str:
    """`smollm2-135m · cpu · float32 · 8-bit · 41.3 tokens/s`, leaving out what is not known."""
    return _joined(model.name, model.device, model.dtype, _bits(model), _speed(answer))


def bar_text(model: ModelInfo, answer: Answer, columns: int, news: str = "") -> str:
    """The same with the context that is used, as much of it as `columns` have room for; `news`
    come first.
    """
    name, device, dtype, bits = model.name, model.device, model.dtype, _bits(model)
    speed, context = _speed(answer), _context(model, answer)
    named = f"context {context}" if context else None
    for parts in (
        (name, device, dtype, bits, named, speed),
        (name, device, dtype, bits, context, speed),
        (name, device, bits, context, speed),
        (name, context, speed),
        (name, context),
        *([()] if news else []),
    ):
        text = _joined(news, *parts)
        if sum(map(width_of, text)) <= columns:
            return text
    return text


def live_text(model: ModelInfo, answer: Answer, now: float) -> str:
    """While an answer comes: `smollm2-135m · about 41 tokens/s · Ctrl-C stops`.

    Its tokens are not told before its end; most servers send one in each event.
    """
    speed = None
    if answer.first_token_at is not None and now - answer.first_token_at > 1:
        speed = f"about {answer.num_events / (now - answer.first_token_at):.0f} tokens/s"
    return _joined(model.name, speed, "Ctrl-C stops")


def _joined(*parts: str | None) -> str:
    return _BETWEEN.join(one_line(part) for part in parts if part)


def _bits(model: ModelInfo) -> str | None:
    return f"{model.weight_bits}-bit" if model.weight_bits else None


def _speed(answer: Answer) -> str | None:
    speed = answer.tokens_per_s
    if not speed:
        return None
    return f"{speed:.{0 if speed >= _WITHOUT_DECIMALS else 1}f} tokens/s"


def _context(model: ModelInfo, answer: Answer) -> str | None:
    used = answer.num_context_tokens
    return f"{used:,}/{model.context_length:,}" if used and model.context_length else None
