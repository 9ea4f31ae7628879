"""A worker's routes that load and unload adapters while it serves.

Who may call them is the edge's business (`KEYED_PATHS`), which folders may be read the adapters'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from chatserve.config import adapted_name
from chatserve.engine.sequence import LoadedAdapter
from chatserve.errors import (
    AdapterConflict,
    AdapterRefused,
    DoesNotFit,
    ModelLoadError,
    OutOfMemory,
)
from chatserve.protocol.adapters import (
    LOAD_PATH,
    SETTLE_PATH,
    STAGE_PATH,
    UNLOAD_PATH,
    LoadAdapter,
    SettleAdapter,
    UnloadAdapter,
    parse,
)
from chatserve.server.adapted import adapter_name
from chatserve.server.json_response import json_response
from chatserve.server.model_slot import ModelSlot

OnChange = Callable[[], Awaitable[None]]


async def nobody_to_tell() -> None:
    """For a worker without a controller."""


class AdapterRoutes:
    """`on_change` is awaited before a change is confirmed: whoever dispatches must know of it."""

    def __init__(self, slot: ModelSlot, on_change: OnChange = nobody_to_tell) -> None:
        self._slot = slot
        self._on_change = on_change

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(LOAD_PATH, self.load, methods=["POST"])
        app.add_api_route(UNLOAD_PATH, self.unload, methods=["POST"])

    def add_for_controller(self, app: FastAPI) -> None:
        app.add_api_route(STAGE_PATH, self.stage, methods=["POST"])
        app.add_api_route(SETTLE_PATH, self.settle, methods=["POST"])

    async def load(self, request: Request) -> Response:
        """The new card, once requests can name it."""
        asked = parse(LoadAdapter, await request.body())
        _, model = self._slot.served()
        name = adapter_name(self._slot.names, asked.lora_name)
        await _read(model.adapters.load_below, name, asked)
        return await self._changed(name)

    async def stage(self, request: Request) -> Response:
        """The adapter is read and checked; nobody can name it yet."""
        asked = parse(LoadAdapter, await request.body())
        _, model = self._slot.served()
        name = adapter_name(self._slot.names, asked.lora_name)
        staged = await _read(model.adapters.stage_below, name, asked)
        return json_response({"id": asked.lora_name, "adapter": staged.fingerprint})

    async def settle(self, request: Request) -> Response:
        """The new card where it is served now."""
        asked = parse(SettleAdapter, await request.body())
        _, model = self._slot.served()
        name = adapter_name(self._slot.names, asked.lora_name)
        # it waits for a load that is under way
        await asyncio.to_thread(model.adapters.settle, name, is_wanted=asked.is_wanted)
        if not asked.is_wanted:
            return json_response({"id": asked.lora_name, "adapter": None})
        return await self._changed(name)

    async def unload(self, request: Request) -> Response:
        """Requests under way go on with it; new ones get 404."""
        asked = parse(UnloadAdapter, await request.body())
        _, model = self._slot.served()
        name = adapter_name(self._slot.names, asked.lora_name)
        # it waits for a load that is under way
        await asyncio.to_thread(model.adapters.unload, name)
        await self._on_change()
        served = adapted_name(self._slot.names[0], name)
        return json_response({"id": served, "object": "model", "deleted": True})

    async def _changed(self, name: str) -> Response:
        await self._on_change()
        served = adapted_name(self._slot.names[0], name)
        cards = {card.name: card for card in self._slot.cards()}
        if served not in cards:
            raise AdapterConflict(
                f"{served} was unloaded while it was loaded; load it again", param="lora_name"
            )
        return json_response(cards[served].to_openai())


async def _read(read: Callable[..., LoadedAdapter], name: str, asked: LoadAdapter) -> LoadedAdapter:
    try:
        return await asyncio.to_thread(read, name, asked.lora_path, replace=asked.load_inplace)
    except ModelLoadError as error:
        raise AdapterRefused(error.message, param="lora_path") from error
    except DoesNotFit as error:
        raise OutOfMemory(error.message) from error
