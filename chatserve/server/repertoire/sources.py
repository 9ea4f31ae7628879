"""Which weights a request may name: who may have what read, or fetched, by this machine.

A key holder chooses among what the server was started with and what is in its cache. A path, or a
download, takes the control token: who has that could do it by a worker of his own anyway.
"""

from __future__ import annotations

import os
from pathlib import Path

from chatserve import environment
from chatserve.config import MAX_NAME_LEN, served_names
from chatserve.errors import CannotLoad, InvalidRequest, OperatorOnly, StartupError, UsageError
from chatserve.protocol.operation import LoadModel


def check_source(weights: str, *, is_operator: bool, revision: str, offline: bool) -> str:
    """The WEIGHTS for a worker. Opens no socket; looks into the cache, and for an operator at the
    path that is named.

    Raises `OperatorOnly`, `InvalidRequest`, or `CannotLoad` for what is not here and may not come.
    """
    from chatserve import hub

    if not is_operator:
        if is_here(weights, revision):
            return weights
        raise OperatorOnly(
            f"{weights[:100]!r} is none of the models that this server was started with or has in "
            "its cache; paths and downloads take the control token (CHATSERVE_CONTROL_TOKEN)",
            param="weights",
        )
    if "\0" in weights:
        raise InvalidRequest("no name of a model has a null character", param="weights")
    if os.path.isabs(weights):
        path = Path(weights)
        if not path.exists():
            raise CannotLoad(
                f"{path}: no such folder or file; check the spelling", param="weights", exit_code=3
            )
        return str(path)
    if is_here(weights, revision):
        return weights
    if weights.startswith(("~", ".")) or hub.is_path(weights):
        raise InvalidRequest(
            f"{weights[:100]!r} is no absolute path: this server has a current folder of its own",
            param="weights",
        )
    if offline or environment.hub_offline():
        raise CannotLoad(
            f"{weights[:100]} is not in the cache and the server is offline; run `chatserve pull "
            f"{weights[:100]}` on its machine first",
            param="weights",
            exit_code=1,
        )
    try:
        hub.check_name(weights, revision)
    except StartupError as error:
        raise CannotLoad(error.message, param="weights", exit_code=error.exit_code) from error
    return weights


def is_here(weights: str, revision: str) -> bool:
    """Whether it is a name of a model whose files are in the cache, whatever lies in the current
    folder."""
    from chatserve import hub

    named = {model.name for model in hub.cached_models() if model.kind == "model"}
    if weights not in {*named, *hub.known_names()} or os.path.exists(weights):
        return False
    try:
        return hub.is_here(weights, revision)
    except StartupError:
        return False


def name_for(asked: LoadModel, weights: str) -> str:
    """Under which name they are served. Raises `InvalidRequest`."""
    try:
        return served_names(weights, (asked.name,) if asked.name else ())[0]
    except UsageError as error:
        raise InvalidRequest(
            f"the model needs a name of at most {MAX_NAME_LEN} printable characters, no comma in "
            "it and no blank at its ends",
            param="name",
        ) from error
