"""What an operator asks of a running server: bodies and paths. Knows no process and no model."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from chatserve.protocol.fields import read_object, validate

ADMIN_PREFIX = "/admin/"
MODELS_PATH = "/admin/models"
LOAD_MODEL_PATH = "/admin/models/load"
UNLOAD_MODEL_PATH = "/admin/models/unload"
DRAIN_WORKER_PATH = "/admin/workers/drain"

Name = Annotated[str, Field(min_length=1, max_length=300)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class LoadModel(_Body):
    """`model`: a name that the server knows, or may look up; `weights` with the control token also
    a path. `name`: under which `weights` are served. `wait`: answer when it is loaded."""

    model: Name | None = None
    weights: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    name: Name | None = None
    wait: bool = True


class UnloadModel(_Body):
    """`wait`: answer when its memory is back."""

    model: Name
    wait: bool = True


class DrainWorker(_Body):
    id: Annotated[str, Field(min_length=1, max_length=100)]


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], body: bytes) -> Body:
    """Raises `InvalidRequest` naming the field at fault."""
    return validate(kind, read_object(body), {}, labels=frozenset())
