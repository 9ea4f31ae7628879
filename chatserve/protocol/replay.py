"""`replay` of a text completion: repeat an answer of the replay log, as `chatserve replay` does.

What the answer had to match comes as the log has it: compiled once already, and perhaps made by a
server out of tools, which no other field can say. Takes JSON; knows no log and compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, get_args

import orjson

from chatserve.errors import InvalidRequest
from chatserve.protocol.fields import refuse_unknown
from chatserve.protocol.response_format import GrammarSpec, Kind, read_choice

ID_PREFIX = "replay-"
"""An answer that is asked for again is known by its id, in the replay log as well."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
MAX_SOURCE_BYTES = 1024 * 1024
"""More than any grammar that a server makes of the tools of a request."""

# what `read_replay` accepts, for the OpenAPI document; a test holds the two together
REPLAY_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "grammar": {
                    "anyOf": [
                        {
                            "type": "object",
                            "properties": {
                                "kind": {"enum": list(KINDS)},
                                "source": {"type": "string", "maxLength": MAX_SOURCE_BYTES},
                                "after_space": {"type": "boolean"},
                            },
                            "required": ["kind", "source", "after_space"],
                            "additionalProperties": False,
                        },
                        {"type": "null"},
                    ]
                }
            },
            "additionalProperties": False,
        },
        {"type": "null"},
    ]
}


@dataclass(frozen=True)
class Replay:
    """What the answer had to match, if anything; `after_space`: behind a space that nobody saw."""

    grammar: GrammarSpec | None = None
    after_space: bool = False


def read_replay(value: Any) -> Replay | None:
    """Raises `InvalidRequest` naming the part at fault."""
    param = "replay"
    if value is None or isinstance(value, Replay):
        return value
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    refuse_unknown(value, frozenset({"grammar"}), prefix=f"{param}.")
    grammar = value.get("grammar")
    if grammar is None:
        return Replay()
    param = "replay.grammar"
    if not isinstance(grammar, dict):
        raise InvalidRequest(f"{param} must be an object", param=param)
    refuse_unknown(grammar, frozenset({"kind", "source", "after_space"}), prefix=f"{param}.")
    after_space = grammar.get("after_space")
    if not isinstance(after_space, bool):
        raise InvalidRequest(
            f"{param}.after_space must be true or false", param=f"{param}.after_space"
        )
    return Replay(_spec(grammar.get("kind"), grammar.get("source"), param), after_space)


def _spec(kind: Any, source: Any, param: str) -> GrammarSpec:
    known = next((each for each in KINDS if each == kind), None)
    if known is None:
        raise InvalidRequest(
            f"{param}.kind must be one of {', '.join(KINDS)}", param=f"{param}.kind"
        )
    param_of_source = f"{param}.source"
    if not isinstance(source, str):
        raise InvalidRequest(f"{param_of_source} must be a text", param=param_of_source)
    if (num_bytes := len(source.encode())) > MAX_SOURCE_BYTES:
        raise InvalidRequest(
            f"{param_of_source} has {num_bytes:,} bytes, the limit is {MAX_SOURCE_BYTES:,}; a log "
            "never has more",
            param=param_of_source,
        )
    if known == "choice":
        read_choice(_json(source, list, param_of_source), param_of_source)
    elif known == "json_schema":
        # its keywords were checked, and some of them written out, before they were logged
        _json(source, dict, param_of_source)
    return GrammarSpec(known, source, param)


def _json(source: str, form: type, param: str) -> Any:
    try:
        value = orjson.loads(source)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{param} is not valid JSON: {error}", param=param) from error
    if not isinstance(value, form):
        raise InvalidRequest(f"{param} must be JSON as a log has it for its kind", param=param)
    return value
