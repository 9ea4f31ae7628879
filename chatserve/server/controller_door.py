"""The controller's door: who would be refused by every worker is told so here, at once.

A worker knows best whether it has a place; the controller knows when none of them can have one, as
it has given them all that they take. Knows paths, no fields and no keys.
"""

from __future__ import annotations

from starlette.types import Scope

from chatserve.protocol.anthropic import MESSAGES_PATH
from chatserve.protocol.embeddings import EMBEDDINGS_PATH, SCORE_PATH
from chatserve.protocol.responses import RESPONSES_PATH
from chatserve.server.registry import WorkerRegistry

QUEUED_PATHS = frozenset(
    {
        "/v1/chat/completions", "/v1/completions", MESSAGES_PATH, RESPONSES_PATH, EMBEDDINGS_PATH,
        SCORE_PATH,
    }
)  # fmt: skip
"""Where an answer takes a place in a worker's batch."""


def takes_place(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in QUEUED_PATHS


class ControllerDoor:
    """In front of the workers of `registry`."""

    def __init__(self, registry: WorkerRegistry, *, can_load: bool = False) -> None:
        """`can_load`: a model may be asked for that no worker has yet."""
        self._registry = registry
        self._can_load = can_load

    def check(self, scope: Scope) -> None:
        """Before the body has come. Raises `Overloaded` when no worker has room, of any model."""
        if takes_place(scope) and not self._can_load:
            self._registry.check_room()
