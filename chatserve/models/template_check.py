"""A chat as one template writes it, and what is wrong with it: doubled ends, endless answers.

Knows no weights and no roles beyond the messages it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import Rendered, Special
from chatserve.models.templates import ChatMessage, ChatTemplate
from chatserve.models.tokenizer import Tokenizer

Status = Literal["ok", "warn", "fail"]
_ANSWER = "Forty-two."


@dataclass(frozen=True)
class Remark:
    """One thing that was checked."""

    status: Status
    text: str


@dataclass(frozen=True)
class PromptReport:
    """rendered: the prompt with the BOS that the tokenizer adds. ids: what the model gets."""

    rendered: Rendered
    ids: list[int]
    stop_ids: list[int]
    stop_texts: list[str]
    remarks: list[Remark]


@dataclass(frozen=True)
class _Turn:
    role: str
    content: str


def report(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[ChatMessage]
) -> PromptReport:
    """Render and check `messages`. Raises `InvalidRequest` for a chat that it has no form for."""
    parts = template.render(messages)
    adds_bos = template.adds_bos and tokenizer.adds_bos
    ids = tokenizer.encode(parts, add_bos=adds_bos)
    bos = tokenizer.names.get("bos_token")
    writes_bos = bool(parts) and isinstance(parts[0], Special) and str(parts[0]) == bos
    rendered = [Special(bos), *parts] if adds_bos and bos and not writes_bos else parts
    known = tokenizer.special_ids
    stop_ids = {*tokenizer.eos_ids, *(known[t] for t in template.stop_tokens if t in known)}
    remarks = [
        _bos_remark(tokenizer, ids, writes_bos=writes_bos),
        _eos_remark(tokenizer, ids),
        *_spelled(tokenizer, rendered, messages),
        *_stop_remarks(template, tokenizer, stop_ids),
        *_answer_end(template, tokenizer, stop_ids),
    ]
    return PromptReport(rendered, ids, sorted(stop_ids), list(template.stop), remarks)


def _bos_remark(tokenizer: Tokenizer, ids: Sequence[int], *, writes_bos: bool) -> Remark:
    bos = tokenizer.bos_id
    if bos is None:
        return Remark("ok", "BOS: the vocabulary has none")
    count = next((n for n, token_id in enumerate(ids) if token_id != bos), len(ids))
    if count > 1:
        return Remark("fail", f"BOS {bos} is doubled: {count} at the start")
    if count == 0 and tokenizer.adds_bos:
        return Remark(
            "warn", f"BOS {bos} is missing: the tokenizer puts it before a text, the template does "
            "not want it"
        )  # fmt: skip
    if count == 0:
        return Remark("ok", "BOS: none, by this model's custom")
    if writes_bos and tokenizer.adds_bos:
        return Remark(
            "ok", f"BOS {bos} once; template and tokenizer both write it: programs that encode the "
            "rendered text with BOS double it"
        )  # fmt: skip
    return Remark("ok", f"BOS {bos} once, at the start")


def _eos_remark(tokenizer: Tokenizer, ids: Sequence[int]) -> Remark:
    for first, second in pairwise(ids):
        if first == second and first in tokenizer.eos_ids and first != tokenizer.bos_id:
            return Remark("fail", f"EOS {first} is doubled after a turn")
    return Remark("ok", "EOS: nowhere doubled")


def _spelled(
    tokenizer: Tokenizer, rendered: Rendered, messages: Sequence[ChatMessage]
) -> Iterator[Remark]:
    """BOS or EOS as letters, which the model reads as ordinary text."""
    for role in ("bos_token", "eos_token"):
        token = tokenizer.names.get(role)
        if not token or any(token in message.content for message in messages):
            continue
        if any(token in part for part in rendered if not isinstance(part, Special)):
            yield Remark("fail", f"{token} is written as ordinary text, not as a special token")


def _stop_remarks(
    template: ChatTemplate, tokenizer: Tokenizer, stop_ids: set[int]
) -> Iterator[Remark]:
    for token in template.stop_tokens:
        if token not in tokenizer.special_ids:
            yield Remark("warn", f"stop token {token} is not in the vocabulary")
    if not stop_ids and not template.stop:
        yield Remark("fail", "no stop id and no stop text: answers end at the limit only")


def _answer_end(
    template: ChatTemplate, tokenizer: Tokenizer, stop_ids: set[int]
) -> Iterator[Remark]:
    """Whether what the template writes after an answer would stop the next one."""
    try:
        parts = template.render(
            [_Turn("user", "a"), _Turn("assistant", _ANSWER), _Turn("user", "b")]
        )
    except InvalidRequest:  # a template for one question only
        return
    marked = next((n for n, part in enumerate(parts) if _ANSWER in part), None)
    if marked is None:
        yield Remark("warn", "an earlier answer is left out of the prompt")
        return
    behind, special = parts[marked].partition(_ANSWER)[2], None
    for part in parts[marked + 1 :]:
        if isinstance(part, Special):
            special = part
            break
        behind += part
    if stop := next((stop for stop in template.stop if stop in behind), None):
        yield Remark("ok", f"an answer ends with {stop!r}, which stops it")
    elif special is None or behind.strip():
        status: Status = "warn" if template.stop else "ok"
        yield Remark(status, f"only EOS stops an answer: what follows one is {behind[:20]!r}")
    elif tokenizer.special_ids.get(special) in stop_ids:
        yield Remark("ok", f"an answer ends with {special}, which stops it")
    else:
        yield Remark("fail", f"an answer ends with {special}, which stops nothing")
