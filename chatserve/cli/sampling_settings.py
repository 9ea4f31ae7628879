"""What `/set` changes in a running chat: names, ranges, and what goes into a request for each.

Ranges are those of the API; a test holds the two together. Knows no terminal.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatserve.errors import UsageError
from chatserve.settings import fields_of, read_value, setting

INT64 = 1 << 63
MAX_STOPS = 16
MAX_STOP_BYTES = 256
DEFAULT = "default"


@dataclass(frozen=True)
class SamplingSettings:
    """One field for each name; `context` and `stop` are read and sent in a way of their own."""

    temperature: float | None = setting(None, "0 is greedy", ge=0, le=2)
    top_p: float | None = setting(None, "nucleus sampling", gt=0, le=1)
    top_k: int | None = setting(
        None, "only the likeliest K tokens; 0 or -1: all", ge=-1, le=INT64 - 1
    )
    min_p: float | None = setting(None, "only tokens this likely beside the likeliest", ge=0, le=1)
    max_tokens: int | None = setting(None, "limit of one answer in tokens", ge=1, le=INT64 - 1)
    seed: int | None = setting(None, "the same seed, the same answer", ge=-INT64, le=INT64 - 1)
    stop: tuple[str, ...] = setting((), "texts that end an answer: WORD or 'A TEXT' or '\\n\\n'")
    repetition_penalty: float | None = setting(None, "over 1 discourages repeats", ge=0.01, le=2)
    presence_penalty: float | None = setting(None, "discourages what was said", ge=-2, le=2)
    frequency_penalty: float | None = setting(None, "discourages what was said often", ge=-2, le=2)
    context: str | None = setting(
        None, "when a chat is longer than the context: refuse, or rolling (the oldest turns go)",
        choices=("refuse", "rolling"),
    )  # fmt: skip


NAMES = tuple(item.name for item in fields_of(SamplingSettings))
DOCS: Mapping[str, str] = {
    item.name: str(item.metadata["doc"]) for item in fields_of(SamplingSettings)
}


def changed(
    sampling: Mapping[str, Any], first: Mapping[str, Any], name: str, text: str
) -> dict[str, Any]:
    """`sampling` with `name` as `text` says; `default`: as it is in `first`.

    Raises `UsageError`.
    """
    field = _FIELDS.get(name, name)
    rest = {key: value for key, value in sampling.items() if key != field}
    if text == DEFAULT:
        return {**rest, field: first[field]} if field in first else rest
    if name == "stop":
        return {**rest, field: _stops(text)}
    value = read_value(SamplingSettings, name, text, f"/set {name}")
    if name == "context":
        return {**rest, field: value} if value == "rolling" else rest
    return {**rest, field: value}


def value_text(sampling: Mapping[str, Any], name: str) -> str:
    """As `/set` shows it."""
    value = sampling.get(_FIELDS.get(name, name))
    if name == "context":
        return value or "refuse"
    if name == "stop" and value:
        return " ".join(
            shlex.quote(each.replace("\n", "\\n").replace("\t", "\\t")) for each in value
        )
    return DEFAULT if value is None else str(value)


# what the API calls it
_FIELDS = {"context": "truncation"}


def _stops(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"/set stop: {text!r} cannot be read: {error}") from error
    stops = [word.replace("\\n", "\n").replace("\\t", "\t") for word in words]
    if len(stops) > MAX_STOPS:
        raise UsageError(f"/set stop: these are {len(stops)} texts, the limit is {MAX_STOPS}")
    for stop in stops:
        if not 1 <= len(stop.encode("utf-8", "replace")) <= MAX_STOP_BYTES:
            raise UsageError(f"/set stop: a text must have 1 to {MAX_STOP_BYTES} bytes")
    return stops
