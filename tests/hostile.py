"""Bodies that no honest client sends: a valid one, spoilt in one of many ways, seed for seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

HUGE = 10**400
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 2**31, 2**53 + 1, 2**63 - 1, 2**63,
    -(2**63) - 1, 2**64, HUGE, "", "x", "0", "null", "\x00", "\n", "é" * 300, "🙂", "x" * 5000, " ",
    [], [[]], [None], ["x"], [0], [[0]], [-1], [2**40], [1.5], [True], ["x", 0], [""] * 70, {},
    {"x": 1}, {"": ""}, {"type": "text"}, [{}], [{"role": "user"}], {"0": 1}, {"0": HUGE},
    [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image_url"}]}],
    "\ud800", {"\ud800": 1}, "Infinity", "NaN", "-1", "1e5", [1] * 2000,
    {str(i): 1 for i in range(1100)},
)  # fmt: skip
LITERALS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"01", b"1.", b".5", b"+1", b"0x10",
    b"undefined", b"None", b"True", b"'x'", b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"',
    b'"\xed\xa0\x80"', b'"\x01"', b"1e", b"--1", b"[1,]", b'{"a":1,}', b"{1:2}", b"/**/1", b"",
    b"9" * 5000, b"-" + b"9" * 5000, b"0." + b"3" * 5000, b"[" * 40 + b"]" * 40, b"[" * 3000,
    b"1" * 20, b"18446744073709551616", b"1E400",
)  # fmt: skip


def spoilt(seed: dict[str, Any], random: Random) -> bytes:
    """`seed` with one to three things wrong; now and then nothing is."""
    payload = json.loads(json.dumps(seed))
    for _ in range(random.choice((0, 1, 1, 2))):
        random.choice(CHANGES)(payload, random)
    body = json.dumps(payload, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(random.choice((0, 0, 1))):
        body = random.choice(BYTE_CHANGES)(body, random)
    return body


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            found += [(value, key), *_places(value[key])]
    return found


def _replace(payload: dict[str, Any], random: Random) -> None:
    if places := _places(payload):
        container, key = random.choice(places)
        container[key] = deepcopy(random.choice(VALUES))


def _remove(payload: dict[str, Any], random: Random) -> None:
    if places := _places(payload):
        container, key = random.choice(places)
        del container[key]


def _add(payload: dict[str, Any], random: Random) -> None:
    payload[random.choice(("x", "", "é", "a.b", "a\nb", "x" * 500, "__proto__", "\x00"))] = 1


def _set_known(payload: dict[str, Any], random: Random) -> None:
    payload[random.choice(FIELDS)] = deepcopy(random.choice(VALUES))


def _nest(payload: dict[str, Any], random: Random) -> None:
    if places := _places(payload):
        container, key = random.choice(places)
        for _ in range(random.choice((1, 60, 70, 300))):
            container[key] = [container[key]] if random.random() < 0.5 else {"a": container[key]}


FIELDS = (
    "stream", "stream_options", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "logit_bias", "logprobs", "top_logprobs", "echo", "best_of", "user", "metadata",
    "tools", "tool_choice", "response_format", "min_tokens", "prompt", "messages", "model", "input",
)  # fmt: skip
CHANGES: tuple[Callable[[dict[str, Any], Random], None], ...] = (
    _replace, _replace, _replace, _remove, _add, _set_known, _set_known, _nest,
)  # fmt: skip


def _cut(body: bytes, random: Random) -> bytes:
    return body[: random.randrange(len(body) + 1)]


def _flip(body: bytes, random: Random) -> bytes:
    place = random.randrange(len(body) + 1)
    return body[:place] + random.randbytes(random.choice((1, 1, 4))) + body[place + 1 :]


def _literal(body: bytes, random: Random) -> bytes:
    """Something that is no JSON, or hardly, in the place of a value."""
    colons = [i for i, byte in enumerate(body) if byte == ord(":")]
    if not colons:
        return random.choice(LITERALS)
    place = random.choice(colons) + 1
    end = min((i for i in (body.find(b",", place), body.find(b"}", place)) if i > 0), default=place)
    return body[:place] + random.choice(LITERALS) + body[end:]


def _double_key(body: bytes, random: Random) -> bytes:
    return b'{"model":1,' + body[1:] if random.random() < 0.5 else body[:-1] + b',"model":[]}'


BYTE_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _cut,
    _flip,
    _literal,
    _literal,
    _double_key,
    lambda body, _: b"\xef\xbb\xbf" + body,
    lambda body, _: body.decode("utf-8", "replace").encode("utf-16"),
    lambda body, _: body.decode("utf-8", "replace").encode("utf-32-le"),
    lambda body, _: body + body,
    lambda body, _: body + b"\x00",
    lambda body, _: b"[" + body + b"]",
    lambda body, random: b"[" * random.choice((100, 10_000)) + body,
    lambda body, _: b" \r\n\t" + body + b"\n",
)
