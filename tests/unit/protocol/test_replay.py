"""What a completion may say of the answer that it repeats."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from chatserve.errors import InvalidRequest
from chatserve.protocol.completions import parse_completion
from chatserve.protocol.replay import KINDS, MAX_SOURCE_BYTES, REPLAY_SCHEMA, Replay

SOURCES = {"json_object": "", "json_schema": '{"type":"null"}', "choice": '["a"]'}


def replay(value: Any, **fields: Any) -> Replay | None:
    body = {"model": "m", "prompt": [1], "replay": value, **fields}
    return parse_completion(json.dumps(body).encode()).replay


def grammar(**changes: Any) -> dict[str, Any]:
    return {"grammar": {"kind": "regex", "source": "a", "after_space": False, **changes}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after_space", [False, True])
def test_every_kind(kind: str, after_space: bool) -> None:
    source = SOURCES.get(kind, "start: x")
    value = grammar(kind=kind, source=source, after_space=after_space)
    Draft202012Validator(REPLAY_SCHEMA).validate(value)
    found = replay(value)
    assert found is not None and found.grammar is not None
    assert (found.grammar.kind, found.grammar.source) == (kind, source)
    assert found.after_space == after_space


@pytest.mark.parametrize("value", [{}, {"grammar": None}])
def test_an_answer_that_was_free(value: Any) -> None:
    Draft202012Validator(REPLAY_SCHEMA).validate(value)
    assert replay(value) == Replay()
    assert replay(None) is None


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (1, "replay"),
        ([], "replay"),
        ({"of": "x"}, "replay.of"),
        ({"grammar": "a"}, "replay.grammar"),
        (grammar(more=1), "replay.grammar.more"),
        (grammar(kind="bnf"), "replay.grammar.kind"),
        (grammar(kind=None), "replay.grammar.kind"),
        (grammar(kind=[]), "replay.grammar.kind"),
        (grammar(source=None), "replay.grammar.source"),
        (grammar(source=1), "replay.grammar.source"),
        (grammar(source="x" * (MAX_SOURCE_BYTES + 1)), "replay.grammar.source"),
        (grammar(kind="json_schema", source="[]"), "replay.grammar.source"),
        (grammar(kind="json_schema", source="{"), "replay.grammar.source"),
        (grammar(kind="choice", source="{}"), "replay.grammar.source"),
        (grammar(kind="choice", source="[1]"), "replay.grammar.source"),
        (grammar(kind="choice", source="[]"), "replay.grammar.source"),
        (grammar(after_space=0), "replay.grammar.after_space"),
        (grammar(after_space=None), "replay.grammar.after_space"),
    ],
)
def test_what_is_refused(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        replay(value)
    assert caught.value.param == param and param in caught.value.message


def test_two_grammars_are_one_too_many() -> None:
    body = {"model": "m", "prompt": [1], "replay": grammar(), "guided_regex": "a"}
    request = parse_completion(json.dumps(body).encode())
    with pytest.raises(InvalidRequest, match=r"guided_regex and replay\.grammar both say"):
        request.grammar  # noqa: B018
