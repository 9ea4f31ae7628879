"""What an answer must match, as requests say it: OpenAI's response_format and vLLM's fields.

Takes JSON, gives a `GrammarSpec`; compiles nothing. A spec is bounded in size here, its cost is
bounded by whoever compiles it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, WithJsonSchema

from chatserve.errors import InvalidRequest, UnsupportedParameter
from chatserve.protocol.fields import refuse_unknown
from chatserve.protocol.json_schema import check_schema

MAX_GRAMMAR_BYTES = 128 * 1024
MAX_GROUPS_DEPTH = 100
MAX_GRAMMAR_CHOICES = 1000

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark", "gbnf", "tools"]
"""`tools` is a Lark grammar of the server's own making around the schemas of a request."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GBNF_RULE = re.compile(r"(?m)^\s*[\w-]+\s*::=")
_LARK_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/')
_LARK_TOKEN = re.compile(r"<[^\s<>]*>")
_LARK_TEMPERATURE = re.compile(r"\[[^\]\n]*\btemperature\b")

# what the functions below accept, for the OpenAPI document; a test holds the two together
RESPONSE_FORMAT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": f"^{_NAME.pattern}$"},
                        "description": {"type": ["string", "null"]},
                        "schema": {"type": "object"},
                        "strict": {"type": ["boolean", "null"]},
                    },
                    "required": ["name", "schema"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "json_schema"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}
_TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1}
JSON_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "object"}, _TEXT_SCHEMA, {"type": "null"}]}
CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
            "maxItems": MAX_GRAMMAR_CHOICES,
        },
        {"type": "null"},
    ]
}
GRAMMAR_SCHEMA: dict[str, Any] = {"anyOf": [_TEXT_SCHEMA, {"type": "null"}]}
STRUCTURED_OUTPUTS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "json": JSON_SCHEMA,
                "json_object": {"enum": [True, False, None]},
                "regex": GRAMMAR_SCHEMA,
                "choice": CHOICE_SCHEMA,
                "grammar": GRAMMAR_SCHEMA,
            },
            "minProperties": 1,
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}


@dataclass(frozen=True)
class GrammarSpec:
    """What an answer must match.

    source: the JSON Schema or the list of choices as JSON, the regular expression, the grammar;
    nothing for any JSON object. param: where the request says it.
    """

    kind: Kind
    source: str
    param: str = field(default="response_format", compare=False)


def read_response_format(value: Any) -> GrammarSpec | None:
    """OpenAI's `response_format`. Raises `InvalidRequest` naming the part at fault."""
    param = "response_format"
    if value is None or isinstance(value, GrammarSpec):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise InvalidRequest(f"{param} must be an object with a type", param=param)
    kind = value["type"]
    if kind not in ("text", "json_object", "json_schema"):
        raise UnsupportedParameter(
            f"{param}.type {kind[:40]!r} is not supported; use text, json_object or json_schema",
            param=f"{param}.type",
        )
    if kind == "json_schema":
        refuse_unknown(value, frozenset({"type", "json_schema"}), prefix=f"{param}.")
        return _named_schema(value.get("json_schema"), f"{param}.json_schema")
    refuse_unknown(value, frozenset({"type"}), prefix=f"{param}.")
    return GrammarSpec("json_object", "", param) if kind == "json_object" else None


def _named_schema(value: Any, param: str) -> GrammarSpec:
    """A schema under a name; `strict` or not, it is kept to the letter."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object with name and schema", param=param)
    refuse_unknown(
        value, frozenset({"name", "description", "schema", "strict"}), prefix=f"{param}."
    )
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{param}.name must be 1 to 64 letters, digits, underscores and dashes",
            param=f"{param}.name",
        )
    if not isinstance(value.get("description"), str | None):
        raise InvalidRequest(f"{param}.description must be a text", param=f"{param}.description")
    if not isinstance(value.get("strict"), bool | None):
        raise InvalidRequest(f"{param}.strict must be true or false", param=f"{param}.strict")
    if value.get("schema") is None:
        raise InvalidRequest(f"{param}.schema is missing", param=f"{param}.schema")
    return read_schema(value["schema"], f"{param}.schema")


def read_schema(value: Any, param: str) -> GrammarSpec:
    """A JSON Schema. Raises `InvalidRequest` naming the keyword at fault."""
    schema = check_schema(value, param)
    try:
        # the order of its properties is the order of the answer's
        source = orjson.dumps(schema).decode()
    except orjson.JSONEncodeError as error:  # a text's nesting is not that of its body
        raise InvalidRequest(
            f"{param} is nested too deeply; make it flatter", param=param
        ) from error
    return GrammarSpec("json_schema", _bounded(source, param), param)


def read_guided_json(value: Any, param: str) -> GrammarSpec | None:
    """A JSON Schema, or its text."""
    if isinstance(value, str):
        if len(value.encode()) > MAX_GRAMMAR_BYTES:
            raise _too_long(len(value.encode()), param)
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(
                f"{param} is a text that is not valid JSON: {error}", param=param
            ) from error
        if not isinstance(value, dict):
            raise InvalidRequest(
                f"{param} is a text that holds no JSON Schema, an object", param=param
            )
    return None if value is None else read_schema(value, param)


def read_regex(value: Any, param: str) -> GrammarSpec | None:
    text = _text(value, param)
    return None if text is None else GrammarSpec("regex", text, param)


def read_choice(value: Any, param: str) -> GrammarSpec | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise InvalidRequest(f"{param} must be a list of texts", param=param)
    if not 1 <= len(value) <= MAX_GRAMMAR_CHOICES:
        raise InvalidRequest(
            f"{param} must have 1 to {MAX_GRAMMAR_CHOICES:,} entries, it has {len(value):,}",
            param=param,
        )
    return GrammarSpec("choice", _bounded(orjson.dumps(value).decode(), param), param)


def read_grammar(value: Any, param: str) -> GrammarSpec | None:
    """A grammar in Lark's notation, or in GBNF, llama.cpp's form of EBNF (`root ::= ...`)."""
    text = _text(value, param)
    if text is None:
        return None
    if _GBNF_RULE.search(text):
        return GrammarSpec("gbnf", text, param)
    rest = _LARK_TEXT.sub('""', text)
    if token := _LARK_TOKEN.search(rest):
        raise UnsupportedParameter(
            f"{param}: {token[0][:40]} names a token, which is not supported; write its text in "
            "quotes",
            param=param,
        )
    if _LARK_TEMPERATURE.search(rest):
        raise UnsupportedParameter(
            f"{param}: a rule's own temperature is not supported; set the request's", param=param
        )
    return GrammarSpec("lark", text, param)


def read_structured_outputs(value: Any) -> GrammarSpec | None:
    """vLLM's `structured_outputs`: an object with one way of saying it."""
    param = "structured_outputs"
    if value is None or isinstance(value, GrammarSpec):
        return value
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    if not value:
        raise InvalidRequest(
            f"{param} is empty; give one of json, json_object, regex, choice, grammar, or leave "
            "it out",
            param=param,
        )
    known = frozenset({"json", "json_object", "regex", "choice", "grammar"})
    refuse_unknown(value, known, prefix=f"{param}.")
    any_object = value.get("json_object")
    if not isinstance(any_object, bool | None):
        raise InvalidRequest(
            f"{param}.json_object must be true or false", param=f"{param}.json_object"
        )
    return only_one(
        (
            read_guided_json(value.get("json"), f"{param}.json"),
            GrammarSpec("json_object", "", f"{param}.json_object") if any_object else None,
            read_regex(value.get("regex"), f"{param}.regex"),
            read_choice(value.get("choice"), f"{param}.choice"),
            read_grammar(value.get("grammar"), f"{param}.grammar"),
        )
    )


def only_one(specs: Iterable[GrammarSpec | None]) -> GrammarSpec | None:
    """The one that is given. Raises `InvalidRequest` where there are several."""
    given = [spec for spec in specs if spec is not None]
    if len(given) > 1:
        raise InvalidRequest(
            f"{given[0].param} and {given[1].param} both say what the answer must match; give one",
            param=given[1].param,
        )
    return given[0] if given else None


def _read_by(
    read: Callable[[Any, str], GrammarSpec | None], param: str
) -> Callable[[Any], GrammarSpec | None]:
    return lambda value: value if isinstance(value, GrammarSpec) else read(value, param)


ResponseFormat = Annotated[
    GrammarSpec | None,
    BeforeValidator(read_response_format), WithJsonSchema(RESPONSE_FORMAT_SCHEMA),
]  # fmt: skip
StructuredOutputs = Annotated[
    GrammarSpec | None,
    BeforeValidator(read_structured_outputs), WithJsonSchema(STRUCTURED_OUTPUTS_SCHEMA),
]  # fmt: skip
GuidedJSON = Annotated[
    GrammarSpec | None,
    BeforeValidator(_read_by(read_guided_json, "guided_json")), WithJsonSchema(JSON_SCHEMA),
]  # fmt: skip
GuidedRegex = Annotated[
    GrammarSpec | None,
    BeforeValidator(_read_by(read_regex, "guided_regex")), WithJsonSchema(GRAMMAR_SCHEMA),
]  # fmt: skip
GuidedChoice = Annotated[
    GrammarSpec | None,
    BeforeValidator(_read_by(read_choice, "guided_choice")), WithJsonSchema(CHOICE_SCHEMA),
]  # fmt: skip
GuidedGrammar = Annotated[
    GrammarSpec | None,
    BeforeValidator(_read_by(read_grammar, "guided_grammar")), WithJsonSchema(GRAMMAR_SCHEMA),
]  # fmt: skip


def _text(value: Any, param: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{param} must be a text that is not empty", param=param)
    _bounded(value, param)
    depth = 0
    for bracket in re.findall("[()]", value):
        depth += 1 if bracket == "(" else -1
        if depth > MAX_GROUPS_DEPTH:
            raise InvalidRequest(
                f"{param} has groups nested deeper than {MAX_GROUPS_DEPTH}; make it flatter",
                param=param,
            )
    return value


def _bounded(source: str, param: str) -> str:
    num_bytes = len(source.encode())
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise _too_long(num_bytes, param)
    return source


def _too_long(num_bytes: int, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} has {num_bytes:,} bytes, the limit is {MAX_GRAMMAR_BYTES:,}; shorten it",
        param=param,
    )
