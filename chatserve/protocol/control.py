"""The wire between controller and worker: registration, heartbeat, leave, proof of identity.

JSON only. Knows no registry, no clock and no socket.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from chatserve.config import MAX_CARDS
from chatserve.errors import InvalidRequest
from chatserve.protocol.measured import Measured

REGISTER_PATH = "/control/register"
HEARTBEAT_PATH = "/control/heartbeat"
LEAVE_PATH = "/control/leave"
SOCKET_SCHEME = "unix:"
"""Of a worker's address: a socket of the file system follows."""
RESUME_PATH = "/control/resume"
MAX_RESUME_BYTES = 24 * 1024 * 1024
"""A request of the largest size and a journal, both as text in JSON."""
JOURNAL_HEADER = "X-Chatserve-Journal"
"""Of a request: the controller keeps a journal of its stream. Of the answer: there is one."""
GIVEN_UP = "x"
"""Such a header of an answer that is no stream: another worker could give a better one."""
NONCE_HEADER = "X-Chatserve-Nonce"
MAX_NONCE_LEN = 64
ADAPTER_KEY = "adapter"
"""In a card's description: the fingerprint of the adapter's own numbers."""

WorkerState = Literal["loading", "ready", "stalled", "draining"]

# no control characters: names are drawn in terminals and logs
ModelName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,200}$")]
WorkerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=500)]


class ControlMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    def to_json(self) -> bytes:
        return orjson.dumps(self.model_dump(mode="json"))


class ModelCard(ControlMessage):
    """One entry of `/v1/models`. `description` says device, dtype, 8 bits and the reasons.

    `parent`: of a base with an adapter, the base.
    """

    name: ModelName
    created: Count
    parent: ModelName | None = None
    context_length: Count | None = None
    description: Annotated[dict[str, JsonValue], Field(max_length=50)] = Field(default_factory=dict)

    def to_openai(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "chatserve",
            "root": self.parent or self.name,
            "parent": self.parent,
            "chatserve": {"context_length": self.context_length, **self.description},
        }


class WorkerStatus(ControlMessage):
    """What a worker says of itself in every message: state, progress, room.

    `tick` counts engine steps, `last_token_age_s` is 0 while nothing runs: a worker that has work
    and does not move is alive and yet not decoding. `num_places`: how many requests it can have at
    once, those that wait among them; 0 where that is not known. `wait_s`: what who comes now has to
    expect before its turn. `metrics` is for the operator; what a model would give back is taken
    from it, too.
    """

    state: WorkerState
    models: Annotated[list[ModelCard], Field(min_length=1, max_length=MAX_CARDS)]
    fingerprint: Text = ""
    tick: Count = 0
    last_token_age_s: Seconds = 0.0
    num_running: Count = 0
    num_waiting: Count = 0
    free_kv_tokens: Count = 0
    num_places: Count = 0
    wait_s: Seconds = 0.0
    loaded_bytes: Count = 0
    total_bytes: Count = 0
    metrics: Measured | None = None


class Registration(ControlMessage):
    """A worker's first message. The controller takes its host from the socket, never from here.

    No `port`: it listens where its supervisor told it to, which the controller knows.
    """

    worker_id: WorkerId
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    status: WorkerStatus


class Registered(ControlMessage):
    """The controller's consent, and how often it wants to hear from the worker."""

    heartbeat_interval_s: Seconds


class Heartbeat(ControlMessage):
    worker_id: WorkerId
    status: WorkerStatus


class HeartbeatReply(ControlMessage):
    """`is_known` False makes the worker register again: the controller has forgotten it."""

    is_known: bool


class Leave(ControlMessage):
    worker_id: WorkerId


class JournalStart(ControlMessage):
    """How a stream began: all that its request does not say of what comes next.

    Lists have an entry for each prompt. `prompts` are digests of their token ids.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    created: Count
    fingerprint: Text
    prompts: list[str]
    seeds: list[Annotated[int, Field(ge=-(2**63), lt=2**64)]]
    max_tokens: list[Count]


class ResumeRequest(ControlMessage):
    """A stream to go on with: the request as the client sent it, and the blocks of the journal."""

    path: Annotated[str, Field(max_length=100)]
    body: str
    journal: str


Message = TypeVar("Message", bound=ControlMessage)


def parse(kind: type[Message], body: bytes) -> Message:
    """Read one message. Raises `InvalidRequest` naming the field at fault."""
    try:
        return kind.model_validate(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the control message is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"control message: {field}: {first['msg']}", param=field) from error


def bearer(token: str) -> Mapping[str, str]:
    """The header by which controller and worker show each other the control token."""
    return {"Authorization": f"Bearer {token}"}


def proof_of(token: str, nonce: str) -> str:
    """What a worker answers to the controller's call-back: it holds the token, and it is live."""
    return hmac.new(
        token.encode(), b"chatserve-worker:" + nonce.encode(), hashlib.sha256
    ).hexdigest()
