"""The public JSON-Schema-Test-Suite: what a schema forbids is never said, byte by byte.

What it allows may be said in one way only: properties come in the order of the schema, integers
have no point. The valid texts that are out of reach are listed, one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import InvalidRequest
from chatserve.grammar.matcher import Rejected
from chatserve.protocol.json_schema import KEYWORDS
from chatserve.protocol.response_format import read_schema
from tests.grammars import Language

SUITE = Path(__file__).parents[2] / "data" / "json_schema"
FILES = sorted(path.relative_to(SUITE).as_posix() for path in SUITE.rglob("*.json"))
REFUSED_FILES = [
    "contains.json", "dependentRequired.json", "dependentSchemas.json", "if-then-else.json",
    "not.json", "propertyNames.json", "uniqueItems.json",
]  # fmt: skip
OUT_OF_REACH = {
    "allOf.json": ['{"foo":"baz","bar":2}', '{"foo":"quux","bar":2,"baz":null}'],
    "const.json": ['{"baz":"bax","foo":"bar"}', "0.0", "1.0", "-2.0", "9007199254740992.0"],
    "enum.json": ["0.0", "[0.0]", "1.0", "[1.0]"],
    "format/date-time.json": ['"1998-12-31T23:59:60Z"', '"1998-12-31T15:59:60.123-08:00"'],
    "format/email.json": [
        r'"\"joe bloggs\"@example.com"', r'"\"joe..bloggs\"@example.com"',
        r'"\"joe@bloggs\"@example.com"', '"joe.bloggs@[IPv6:::1]"',
    ],
    "format/ipv6.json": [
        '"1::d6:192.168.0.1"', '"1:2::192.168.0.1"', '"::ffff:192.168.0.1"',
        '"1000:1000:1000:1000:1000:1000:255.255.255.255"',
    ],
    "format/time.json": [
        '"23:59:60Z"', '"23:59:60+00:00"', '"01:29:60+01:30"', '"23:29:60+23:30"',
        '"15:59:60-08:00"', '"00:29:60-23:30"',
    ],
    "type.json": ["1.0"],
}  # fmt: skip


def groups(file: str) -> Iterator[dict[str, Any]]:
    yield from json.loads((SUITE / file).read_text("utf-8"))


def language(schema: Any) -> Language:
    # no request can say true or false; a part of its schema can
    whole = schema if isinstance(schema, dict) else {"allOf": [schema]}
    return Language("json_schema", read_schema(whole, "schema").source)


@pytest.mark.parametrize("file", [file for file in FILES if file not in REFUSED_FILES])
def test_suite(file: str) -> None:
    out_of_reach: list[str] = []
    num_held = 0
    for group in groups(file):
        try:
            answers = language(group["schema"])
        except (InvalidRequest, Rejected):
            continue
        for case in group["tests"]:
            text = json.dumps(case["data"], ensure_ascii=False, separators=(",", ":"))
            num_held += 1
            if case["valid"] and text not in answers:
                out_of_reach.append(text)
            else:
                assert (text in answers) is case["valid"], (group["schema"], text)
    assert num_held
    assert out_of_reach == OUT_OF_REACH.get(file, [])


@pytest.mark.parametrize("file", REFUSED_FILES)
def test_keywords_that_cannot_be_kept_are_named(file: str) -> None:
    for group in groups(file):
        with pytest.raises(InvalidRequest) as caught:
            language(group["schema"])
        keyword = str(caught.value.param).rpartition(".")[2]
        assert f'"{keyword}"' in json.dumps(group["schema"]) and keyword not in KEYWORDS
        assert f".{keyword} " in caught.value.message


def test_how_much_of_the_suite_is_kept() -> None:
    """A new version of the library may keep more, and the guide says how much."""
    kept = refused = 0
    for file in FILES:
        for group in groups(file):
            try:
                language(group["schema"])
                kept += len(group["tests"])
            except (InvalidRequest, Rejected):
                refused += len(group["tests"])
    assert (kept, refused) == (762, 327)
