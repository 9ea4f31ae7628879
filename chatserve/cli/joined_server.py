"""A running server that a chat joins. Knows the HTTP client; starts nothing, stops nothing."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from chatserve.cli.answer import ChatDelta, ModelInfo, Progress
from chatserve.cli.client import ChatClient
from chatserve.cli.reachability import Reachability
from chatserve.errors import (
    BadStream,
    ChatserveError,
    InvalidAPIKey,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NoWorkerAvailable,
    UsageError,
    WorkerLost,
)

MOST_NAMED = 20


class JoinedServer:
    """A server that somebody else started: ready, or an error."""

    def __init__(self, client: ChatClient, model_name: str | None) -> None:
        """Raises `ChatserveError` when it cannot be asked, or a model must be named."""
        self._client = client
        self._model = _choose(client, model_name)
        self._reachability = Reachability(client.base_url)

    def progress(self) -> Progress | None:
        return None

    def wait(self, timeout_s: float) -> None:
        return

    def model(self) -> ModelInfo:
        return self._model

    def news(self) -> str:
        return self._reachability.news()

    def models(self) -> list[ModelInfo]:
        return self._client.models()

    def choose(self, model: ModelInfo) -> None:
        self._model = model

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        self._reachability.forget()
        return self._client.stream(messages, self._model.name, **sampling)

    def count_tokens(self, text: str) -> int | None:
        return self._client.count_tokens(text, self._model.name)

    def rival(self, model: ModelInfo) -> RivalConnection:
        return RivalConnection(self._client.again(), model)

    def close(self) -> None:
        self._client.close()


class RivalConnection:
    """A connection for one model's answer, beside those of others."""

    def __init__(self, client: ChatClient, model: ModelInfo) -> None:
        self._client = client
        self._model = model

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        return self._client.stream(messages, self._model.name, **sampling)

    def abort(self) -> None:
        self._client.abort()

    def close(self) -> None:
        self._client.close()


def _choose(client: ChatClient, model_name: str | None) -> ModelInfo:
    """The model of that name; without a name the only one there is, adapters left aside."""
    if model_name is not None:
        # a server may serve names that it does not list: aliases, adapters; or list none at all
        there = _listed(client)
        return next((m for m in there if m.name == model_name), ModelInfo(model_name))
    try:
        models = client.models()
    except (BadStream, InvalidRequest, MethodNotAllowed, ModelNotFound) as error:
        raise UsageError(f"{error.message}; name a model by --model NAME") from error
    if not models:
        raise NoWorkerAvailable(f"{client.base_url} serves no model now; try again soon")
    bases = [model for model in models if model.parent is None]
    if len(bases) != 1:
        names = ", ".join(model.name for model in models[:MOST_NAMED])
        more = f" and {len(models) - MOST_NAMED} more" if len(models) > MOST_NAMED else ""
        raise UsageError(f"{client.base_url} serves {names}{more}; choose one with --model NAME")
    return bases[0]


def _listed(client: ChatClient) -> list[ModelInfo]:
    """Raises only what a request for an answer would meet, too."""
    try:
        return client.models()
    except (NoWorkerAvailable, InvalidAPIKey, WorkerLost):
        raise
    except ChatserveError:
        return []
