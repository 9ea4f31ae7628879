"""Logprobs as the APIs write them: OpenAI's shape for chats, and its older one for completions.

Plain dictionaries; knows no frame and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from chatserve.server.contract import Tokenizer
from chatserve.server.shown_tokens import Shown


def chat_logprobs(tokenizer: Tokenizer, shown: Iterable[Shown]) -> dict[str, Any]:
    """A special token is shown by its name and has no bytes, as it is no text."""
    content = []
    for _, token_id, known in shown:
        logprob, top = (known.logprob, known.top) if known else (None, ())
        alternatives = [_chat_token(tokenizer, id_, value) for id_, value in top]
        content.append({**_chat_token(tokenizer, token_id, logprob), "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    name = tokenizer.name_of(token_id)
    if name is not None:
        return {"token": name, "logprob": logprob, "bytes": None}
    raw = tokenizer.token_bytes(token_id)
    return {"token": _text_of(raw, ""), "logprob": logprob, "bytes": list(raw)}


def completion_logprobs(tokenizer: Tokenizer, shown: Sequence[Shown]) -> dict[str, Any]:
    """`top_logprobs` always has the token itself, too: of k + 1 tokens where it is none of the k.

    Of tokens that look alike the likeliest is told. The first token of all has no logprob.
    """
    return {
        "tokens": [completion_token(tokenizer, each.token_id) for each in shown],
        "token_logprobs": [each.logprobs.logprob if each.logprobs else None for each in shown],
        "top_logprobs": [_alternatives(tokenizer, each) for each in shown],
        "text_offset": [each.offset for each in shown],
    }


def _alternatives(tokenizer: Tokenizer, shown: Shown) -> dict[str, float] | None:
    if shown.logprobs is None:
        return None
    told: dict[str, float] = {}
    for token_id, logprob in (*shown.logprobs.top, (shown.token_id, shown.logprobs.logprob)):
        told.setdefault(completion_token(tokenizer, token_id), logprob)
    return told


def completion_token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text, its name if it is none, its bytes if they are only part of a character."""
    name = tokenizer.name_of(token_id)
    return _text_of(tokenizer.token_bytes(token_id), "bytes:") if name is None else name


def _text_of(raw: bytes, mark: str) -> str:
    """The text of a token; of one that holds part of a character, its bytes in hexadecimal."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in raw)
