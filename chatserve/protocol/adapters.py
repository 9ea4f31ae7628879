"""The bodies of /v1/load_lora_adapter and /v1/unload_lora_adapter, which vLLM has too.

A controller loads in two steps, so that nothing has changed where one of its workers refuses: each
stages the adapter, and once all of them have, each serves it.

JSON only. Knows no folder and no engine.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field

from chatserve.protocol.fields import read_object, validate

LOAD_PATH = "/v1/load_lora_adapter"
UNLOAD_PATH = "/v1/unload_lora_adapter"
STAGE_PATH = "/v1/stage_lora_adapter"
SETTLE_PATH = "/v1/settle_lora_adapter"
MAX_LORA_NAME_LEN = 300

LoraName = Annotated[str, Field(min_length=1, max_length=MAX_LORA_NAME_LEN)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    def to_json(self) -> bytes:
        return orjson.dumps(self.model_dump(mode="json"))


class LoadAdapter(_Body):
    """`lora_name`: NAME, or BASE:NAME where several models are served. `lora_path`: a folder on the
    worker's machine. `load_inplace`: put it in the place of one that has the name already."""

    lora_name: LoraName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapter(_Body):
    lora_name: LoraName


class SettleAdapter(_Body):
    """What becomes of a staged adapter: it is served, or let go."""

    lora_name: LoraName
    is_wanted: bool


Body = TypeVar("Body", bound=_Body)


def parse(kind: type[Body], body: bytes) -> Body:
    """Raises `InvalidRequest` naming the field at fault."""
    return validate(kind, read_object(body), {}, labels=frozenset())
