"""Models, their adapters, and health, in the document."""

from __future__ import annotations

from typing import Any

from chatserve.protocol.adapters import LOAD_PATH, UNLOAD_PATH, LoadAdapter, UnloadAdapter
from chatserve.protocol.replies import (
    Decoding,
    DeletedModel,
    Live,
    Model,
    ModelList,
    Ready,
)
from chatserve.server.openapi.operation import (
    ANY_REQUEST,
    WITH_BODY,
    Body,
    Operation,
)

NO_LABELS: frozenset[str] = frozenset()
ADAPTER_ERRORS = (*ANY_REQUEST, *WITH_BODY, 404, 409, 502, 503)

OPERATIONS = (
    Operation("get", "/v1/models", "listModels", "Models", "The models that are served", ModelList),
    Operation(
        "get", "/v1/models/{name}", "getModel", "Models", "One model", Model,
        parameters={"name": "its name, in which there may be slashes"},
        errors=(*ANY_REQUEST, 404),
    ),
    Operation(
        "post", LOAD_PATH, "loadAdapter", "Models", "Serve a LoRA adapter beside its base", Model,
        about="The server must have been started with `--adapter-root`.",
        body=Body(
            LoadAdapter, {"lora_name": "poet", "lora_path": "poet-adapter"}, labels=NO_LABELS
        ),
        errors=ADAPTER_ERRORS, access="keyed",
    ),
    Operation(
        "post", UNLOAD_PATH, "unloadAdapter", "Models", "Serve an adapter no longer", DeletedModel,
        about="Requests under way go on with it.",
        body=Body(UnloadAdapter, {"lora_name": "poet"}, labels=NO_LABELS),
        errors=ADAPTER_ERRORS, access="keyed",
    ),
    Operation(
        "get", "/health/live", "live", "Health", "Whether the process answers", Live,
        errors=(403,), access="open",
    ),
    Operation(
        "get", "/health/ready", "ready", "Health", "Whether every model is ready", Ready,
        about="503 while one is still loading, or the server shuts down.",
        errors=(403,), also={503: Ready}, access="open",
    ),
    Operation(
        "get", "/health/decode", "decode", "Health", "Whether tokens come", Decoding,
        about="503 while there is work and no token comes.",
        errors=(403,), also={503: Decoding}, access="open",
    ),
    Operation(
        "get", "/openapi.json", "openapi", "Health", "This document", dict[str, Any],
    ),
)  # fmt: skip
