"""From what a request says to the grammar that llguidance reads. Text to text, nothing compiled."""

from __future__ import annotations

import json
from typing import Any

# One space, or a new line with its indentation: a model that likes blanks gets no further with them
JSON_BLANKS = r"\x20|\n(\x20{0,24}|\t{0,8})"
# no \u: a property's name could be spelled with it, and would not be known again
JSON_ESCAPES = '"\\bfnrt'
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_pattern": JSON_BLANKS,
    "json_allowed_escapes": JSON_ESCAPES,
    "lenient": False,
}
_INNER = "answer"
# their rows are as long as their objects have properties
KINDS_OF_JSON = frozenset({"json_object", "json_schema", "tools"})


class BadGrammar(Exception):
    """What a person wrote is no grammar; the message says where."""


def to_llguidance(kind: str, source: str, *, after_space: bool) -> str:
    """The grammar of an answer.

    after_space: the answer begins with a space that is taken away before anybody sees it. Raises
    `BadGrammar` for GBNF that cannot be read.
    """
    head = 'start: " " @' if after_space else "start: @"
    # text that can only go on one way is not encoded ahead: masks then need no tokenizer
    outer = f'%llguidance {{"no_forcing": true}}\n{head}{_INNER}\n'
    grammars = [{"lark_grammar": outer}, {"name": _INNER, **_inner(kind, source)}]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _inner(kind: str, source: str) -> dict[str, Any]:
    if kind == "json_object":
        return _json({"type": "object"})
    if kind == "json_schema":
        return _json(json.loads(source))
    if kind == "regex":
        return {"lark_grammar": f"start: /{_between_slashes(source)}/"}
    if kind == "choice":
        texts = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
        return {"lark_grammar": f"start: {' | '.join(texts)}"}
    if kind == "gbnf":
        return {"lark_grammar": _from_gbnf(source)}
    return {"lark_grammar": source}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}


def _between_slashes(regex: str) -> str:
    from llguidance import regex_to_lark

    # \d is one of ten digits, as in JSON Schema, and not of all the digits of Unicode
    return regex_to_lark(regex, "d")


def _from_gbnf(source: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(source)
    except RecursionError as error:
        raise BadGrammar("is nested too deeply") from error
    # the converter's own errors are bare Exceptions
    except Exception as error:
        raise BadGrammar(f"is no GBNF: {error}") from error
