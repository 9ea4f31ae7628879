"""What a room says of its routes: the words of the OpenAPI document, not its grammar."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from chatserve.protocol.fields import LABELS
from chatserve.protocol.replies import ErrorReply
from chatserve.server.json_response import JSON_TYPE

ANY_REQUEST = (401, 403, 408, 431, 500)
WITH_BODY = (400, 413, 415)
WITH_MODEL = (404, 429, 502, 503, 504)


@dataclass(frozen=True, eq=False)
class Body:
    """A JSON body: the model that validates it, and what is checked before the model sees it."""

    kind: type[BaseModel]
    example: Mapping[str, Any]
    no_ops: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    labels: Set[str] = LABELS


@dataclass(frozen=True, eq=False)
class Operation:
    """One method of one path. `name` is what generated clients call it.

    `reply` and `event` (of a stream) are types that pydantic can describe; `errors` the statuses in
    the one error shape, or that of `error`; `also` are further replies, by status. `parameters`:
    of the path, what each means; `query`: their schemas, with that in them. `access`: `open`
    to everyone, `keyed` to nobody without a key, else as the server is set up.
    """

    method: Literal["get", "post", "delete"]
    path: str
    name: str
    tag: str
    summary: str
    reply: Any
    about: str = ""
    body: Body | None = None
    event: Any = None
    errors: tuple[int, ...] = ANY_REQUEST
    error: Any = ErrorReply
    also: Mapping[int, Any] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    access: Literal["usual", "open", "keyed"] = "usual"
    media: str = JSON_TYPE
