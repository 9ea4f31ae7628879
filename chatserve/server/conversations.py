"""/page/conversations and /page/votes: what the page keeps on the server, apart for each API key.

The document is the page's own (web/src/conversation.ts says what is in it); what is checked here is
what a list of conversations shows, and what a search looks at. Knows no model and no worker.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, TypeVarTuple

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chatserve.errors import ConversationChanged, ConversationNotFound, InvalidRequest
from chatserve.options import KeepingOptions
from chatserve.protocol.fields import is_number, read_object
from chatserve.server.conversation_store import ChangedElsewhere, ConversationStore, Document
from chatserve.server.edge import AccessPolicy, is_loopback
from chatserve.server.error_response import error_fields, status_of
from chatserve.server.json_response import json_response
from chatserve.server.response_door import owner_of

logger = logging.getLogger(__name__)

PATH = "/page/conversations"
VOTES_PATH = "/page/votes"
MAX_TITLE_LEN = 1_000
MAX_NAME_LEN = 1_000
MAX_MESSAGES = 10_000
MAX_SEARCH_LEN = 1_000
NUM_THREADS = 4
# a number that JavaScript holds exactly
MAX_REVISION = 2**53 - 2
# what a column of numbers holds, and JavaScript
MAX_TIME_S = 2**53
VOTES = {"left": "leftvote", "right": "rightvote", "tie": "tievote", "both_bad": "bothbad_vote"}
"""The page's word for each vote, and FastChat's."""
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


def store_for(options: KeepingOptions, host: str, policy: AccessPolicy) -> ConversationStore | None:
    """Where a server on `host` keeps them: nowhere, where strangers could not be told apart."""
    if not options.store_conversations:
        return None
    if policy.api_keys is None and not is_loopback(host):
        logger.warning("conversations stay in the browser: without API keys all would share them")
        return None
    return ConversationStore.of_user()


class Conversations:
    """`store` None: this server keeps none; the list says so, and the page keeps them itself."""

    def __init__(
        self, store: ConversationStore | None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._clock = clock
        # searches read whole files: whatever else takes a thread must not wait for them
        self._threads = ThreadPoolExecutor(NUM_THREADS, "page")

    def add_to(self, app: FastAPI) -> None:
        # the page's own, which ships with it: no part of the API that /openapi.json describes
        one = PATH + "/{conversation_id}"
        app.add_route(PATH, self.list, methods=["GET"])
        app.add_route(one, self.get, methods=["GET"])
        app.add_route(one, self.put, methods=["PUT"])
        app.add_route(one, self.delete, methods=["DELETE"])
        app.add_route(VOTES_PATH, self.vote, methods=["POST"])
        app.add_route(VOTES_PATH, self.votes, methods=["GET"])
        app.add_route(VOTES_PATH, self.delete_votes, methods=["DELETE"])

    async def list(self, request: Request) -> Response:
        search = request.query_params.get("search", "")
        if len(search) > MAX_SEARCH_LEN:
            raise InvalidRequest(
                f"search has {len(search):,} characters, the limit is {MAX_SEARCH_LEN:,}",
                param="search",
            )
        store = self._store
        found = (
            []
            if store is None
            else await self._beside(store.summaries, owner_of(request.headers), search)
        )
        return _answer({"conversations": found, "is_kept": store is not None})

    async def get(self, request: Request) -> Response:
        name = request.path_params["conversation_id"]
        store = self._store
        found = (
            None
            if store is None
            else await self._beside(store.find, owner_of(request.headers), name)
        )
        if found is None:
            raise _not_found(name)
        return _answer(found)

    async def put(self, request: Request) -> Response:
        store = self._kept()
        name = request.path_params["conversation_id"]
        document = await self._beside(read_conversation, await request.body(), name)
        try:
            summary = await self._beside(store.put, owner_of(request.headers), document)
        except ChangedElsewhere as changed:
            if changed.newer is None:
                raise _not_found(name) from None
            error = ConversationChanged(
                f"revision {document['revision']} of the conversation is not the newest any more; "
                f"take {changed.newer['revision']} over, which is in this answer",
                param="revision",
            )
            answer = {"error": error_fields(error), "conversation": changed.newer}
            return _answer(answer, status_of(error)[0])
        return _answer(summary)

    async def delete(self, request: Request) -> Response:
        if self._store is not None:
            name = request.path_params["conversation_id"]
            await self._beside(self._store.delete, owner_of(request.headers), name)
        return Response(status_code=204, headers=HEADERS)

    async def vote(self, request: Request) -> Response:
        store = self._kept()
        vote = await self._beside(read_vote, await request.body(), self._clock())
        await self._beside(store.add_vote, owner_of(request.headers), vote)
        return Response(status_code=201, headers=HEADERS)

    async def votes(self, request: Request) -> Response:
        """All of this key, one a line, as FastChat's arena logs them."""
        owner = owner_of(request.headers)
        # what goes wrong at once has a status of its own
        first = await self._votes_after(owner, 0)
        return StreamingResponse(
            self._lines(owner, first), media_type="application/x-ndjson",
            headers={**HEADERS, "Content-Disposition": 'attachment; filename="votes.jsonl"'},
        )  # fmt: skip

    async def _lines(
        self, owner: bytes, piece: Sequence[tuple[int, bytes]]
    ) -> AsyncGenerator[bytes]:
        while piece:
            yield b"".join(vote + b"\n" for _, vote in piece)
            piece = await self._votes_after(owner, piece[-1][0])

    async def _votes_after(self, owner: bytes, place: int) -> Sequence[tuple[int, bytes]]:
        return [] if self._store is None else await self._beside(self._store.votes, owner, place)

    async def delete_votes(self, request: Request) -> Response:
        if self._store is not None:
            await self._beside(self._store.delete_votes, owner_of(request.headers))
        return Response(status_code=204, headers=HEADERS)

    async def _beside(self, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """In a thread: streams go on while a disk is slow, or a document large."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: context.run(work, *arguments))

    def _kept(self) -> ConversationStore:
        if self._store is None:
            raise ConversationNotFound(
                "this server keeps no conversations; let the browser keep them"
            )
        return self._store


def read_conversation(body: bytes, name: str) -> Document:
    """The conversation `name` as a body has it. Raises `InvalidRequest`."""
    document = read_object(body)
    if not _ID.fullmatch(name) or document.get("id") != name:
        raise InvalidRequest(
            "id must be 8 to 64 of A-Z a-z 0-9 _ - and the same as in the path", param="id"
        )
    revision = document.get("revision")
    if type(revision) is not int or not 0 <= revision <= MAX_REVISION:
        raise InvalidRequest(
            "revision must be an integer, 0 for a new conversation", param="revision"
        )
    _check_text(document, "title", MAX_TITLE_LEN)
    for field in ("created_at", "changed_at"):
        value: Any = document.get(field)
        if not is_number(value) or abs(value) > MAX_TIME_S:
            raise InvalidRequest(f"{field} must be seconds since 1970", param=field)
    _check_models(document, at_least=0)
    messages = document.get("messages")
    if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must be a list of up to {MAX_MESSAGES:,} messages", param="messages"
        )
    _check_messages(messages, "messages")
    return document


def read_vote(body: bytes, now: float) -> Document:
    """A vote of the page as FastChat's arena writes it into its log. Raises `InvalidRequest`."""
    given = read_object(body)
    vote = given.get("vote")
    if not isinstance(vote, str) or vote not in VOTES:
        raise InvalidRequest(f"vote must be one of {', '.join(VOTES)}", param="vote")
    name = given.get("conversation_id")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise InvalidRequest(
            "conversation_id must be that of a conversation", param="conversation_id"
        )
    _check_models(given, at_least=2)
    sides = given.get("messages")
    if not isinstance(sides, list) or len(sides) != 2:
        raise InvalidRequest("messages must be two lists, one of each side", param="messages")
    for index, side in enumerate(sides):
        if not isinstance(side, list) or len(side) > MAX_MESSAGES:
            raise InvalidRequest(
                f"messages.{index} must be a list of up to {MAX_MESSAGES:,} messages",
                param=f"messages.{index}",
            )
        _check_messages(side, f"messages.{index}")
    return {
        "tstamp": round(now, 4),
        "type": VOTES[vote],
        "models": given["models"],
        "states": [
            _state(name, model, side) for model, side in zip(given["models"], sides, strict=True)
        ],
        # FastChat's scripts look for it; addresses are not kept
        "ip": "",
        "names_hidden": given.get("names_hidden") is True,
    }


def _state(name: str, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    system = [each["content"] for each in messages if each["role"] == "system"]
    return {
        "template_name": "chatserve",
        "system_message": "\n\n".join(system),
        "roles": ["user", "assistant"],
        "messages": [
            [each["role"], each["content"]] for each in messages if each["role"] != "system"
        ],
        "offset": 0,
        "conv_id": name,
        "model_name": model,
    }


def _check_models(given: Mapping[str, Any], *, at_least: int) -> None:
    models = given.get("models")
    if (
        not isinstance(models, list)
        or not at_least <= len(models) <= 2
        or not all(isinstance(model, str) and len(model) <= MAX_NAME_LEN for model in models)
    ):
        count = "two" if at_least else "up to two"
        raise InvalidRequest(f"models must be the names of {count} models", param="models")


def _check_messages(messages: list[Any], where: str) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where}.{index} must be an object", param=f"{where}.{index}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                name = f"{where}.{index}.{field}"
                raise InvalidRequest(f"{name} must be a text", param=name)


def _check_text(given: Mapping[str, Any], field: str, max_len: int) -> None:
    value = given.get(field)
    if not isinstance(value, str) or len(value) > max_len:
        raise InvalidRequest(f"{field} must be a text of up to {max_len:,} characters", param=field)


def _not_found(name: str) -> ConversationNotFound:
    return ConversationNotFound(
        f"conversation {name[:100]!r} is not kept here; it was deleted, or is another key's: "
        "put it with revision 0 to keep it anew"
    )


def _answer(payload: Any, status: int = 200) -> Response:
    response = json_response(payload, status)
    response.headers.update(HEADERS)
    return response
