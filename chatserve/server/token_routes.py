"""A worker's /tokenize and /detokenize: what its network reads of a text, and the way back."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from chatserve.protocol.tokens import (
    DETOKENIZE_PATH,
    TOKENIZE_PATH,
    parse_detokenize,
    parse_tokenize,
    tokenize_reply,
)
from chatserve.server.adapted import find_adapter
from chatserve.server.contract import ServedModel
from chatserve.server.json_response import json_response
from chatserve.server.model_slot import ModelSlot
from chatserve.server.preparation_pool import PreparationPool


class TokenRoutes:
    def __init__(self, slot: ModelSlot, pool: PreparationPool) -> None:
        self._slot = slot
        self._pool = pool

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(TOKENIZE_PATH, self.tokenize, methods=["POST"])
        app.add_api_route(DETOKENIZE_PATH, self.detokenize, methods=["POST"])

    async def tokenize(self, request: Request) -> Response:
        """The ids of a text or a chat, however many they are."""
        _, model = self._slot.served()
        return json_response(await self._pool.run(tokenize, await request.body(), model))

    async def detokenize(self, request: Request) -> Response:
        """The text of ids."""
        _, model = self._slot.served()
        return json_response(await self._pool.run(detokenize, await request.body(), model))


def tokenize(body: bytes, model: ServedModel) -> dict[str, Any]:
    """Raises `InvalidRequest` and its children, `ModelNotFound`."""
    request = parse_tokenize(body)
    _check_model(request.model, model)
    if request.messages is not None:
        ids = model.tokenization.of_chat(
            request.messages,
            add_generation_prompt=request.add_generation_prompt is not False,
            is_open=bool(request.continue_final_message),
            tools=[tool.definition for tool in request.tools],
        )
    else:
        ids = model.tokenization.of_text(
            request.prompt or "", add_special_tokens=request.add_special_tokens is not False
        )
    pieces = model.tokenization.pieces(ids) if request.return_token_strs else None
    return tokenize_reply(ids, model.context_length, pieces)


def detokenize(body: bytes, model: ServedModel) -> dict[str, Any]:
    """Raises as `tokenize` does."""
    request = parse_detokenize(body)
    _check_model(request.model, model)
    skip = bool(request.skip_special_tokens)
    return {"prompt": model.tokenization.text(request.tokens, skip_special_tokens=skip)}


def _check_model(name: str | None, model: ServedModel) -> None:
    """An adapter's tokens are its base's."""
    if name is not None:
        find_adapter(model, name)
