"""Exception -> (status, error). The only table of statuses, for controller and worker.

Errors have OpenAI's shape, but on the routes of other protocols: `error_dialects.py`.
"""

from __future__ import annotations

import logging

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chatserve import errors
from chatserve.errors import ChatserveError
from chatserve.protocol.control import GIVEN_UP, JOURNAL_HEADER
from chatserve.protocol.fields import invalid_request
from chatserve.protocol.replies import ErrorType
from chatserve.server.disconnect import nobody_listens
from chatserve.server.error_dialects import dialect_of
from chatserve.server.json_response import JSON_TYPE
from chatserve.server.outcome import note_error

logger = logging.getLogger(__name__)

STATUSES: dict[type[ChatserveError], tuple[int, ErrorType]] = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.ContextLengthExceeded: (400, "invalid_request_error"),
    errors.UnsupportedParameter: (400, "invalid_request_error"),
    errors.AdapterRefused: (400, "invalid_request_error"),
    errors.AdapterConflict: (409, "invalid_request_error"),
    errors.CannotLoad: (400, "invalid_request_error"),
    errors.ModelConflict: (409, "invalid_request_error"),
    errors.CannotResume: (409, "invalid_request_error"),
    errors.InvalidAPIKey: (401, "invalid_request_error"),
    errors.OriginNotAllowed: (403, "invalid_request_error"),
    errors.HostNotAllowed: (403, "invalid_request_error"),
    errors.OperatorOnly: (403, "invalid_request_error"),
    errors.RegistrationRefused: (403, "invalid_request_error"),
    errors.PreviousResponseNotFound: (400, "invalid_request_error"),
    errors.ModelNotFound: (404, "invalid_request_error"),
    errors.ResponseNotFound: (404, "invalid_request_error"),
    errors.ConversationNotFound: (404, "invalid_request_error"),
    errors.RouteNotFound: (404, "invalid_request_error"),
    errors.MethodNotAllowed: (405, "invalid_request_error"),
    errors.ConversationChanged: (409, "invalid_request_error"),
    errors.BodyTooSlow: (408, "invalid_request_error"),
    errors.HeadersTooSlow: (408, "invalid_request_error"),
    errors.BodyTooLarge: (413, "invalid_request_error"),
    errors.UnsupportedMediaType: (415, "invalid_request_error"),
    errors.Overloaded: (429, "rate_limit_error"),
    errors.HeadersTooLarge: (431, "invalid_request_error"),
    errors.GenerationFailed: (500, "server_error"),
    errors.StorageFailed: (500, "server_error"),
    errors.StorageFull: (507, "server_error"),
    errors.StorageUnavailable: (503, "server_error"),
    errors.WorkerLost: (502, "server_error"),
    errors.BadStream: (502, "server_error"),
    errors.OutOfMemory: (503, "server_error"),
    errors.NoWorkerAvailable: (503, "server_error"),
    errors.ModelNotLoaded: (503, "server_error"),
    errors.NoRoomForModel: (503, "server_error"),
    errors.ShuttingDown: (503, "server_error"),
    errors.DeadlineExceeded: (504, "server_error"),
    errors.QueueTimeout: (504, "server_error"),
    errors.FirstTokenTimeout: (504, "server_error"),
    errors.TokenGapTimeout: (504, "server_error"),
    errors.RequestTimeout: (504, "server_error"),
    errors.WorkerStalled: (504, "server_error"),
    errors.EngineStopped: (503, "server_error"),
}
OF_THE_PAGE = (
    errors.OriginNotAllowed,
    errors.ConversationNotFound,
    errors.ConversationChanged,
    errors.StorageFull,
    errors.StorageUnavailable,
)
"""Of the routes that only the server's own page asks: no operation of the API has them."""
LOST_HERE = (
    errors.EngineStopped,
    errors.WorkerStalled,
    errors.TokenGapTimeout,
    errors.ShuttingDown,
    errors.NoWorkerAvailable,
)
"""No fault of the request: another worker could answer it."""
INTERNAL: tuple[int, ErrorType] = (500, "server_error")
INTERNAL_MESSAGE = "internal error; the server's log says more"
# OpenAI's own: LiteLLM and LangChain know the case by its words alone, not by its code
TOO_LONG_WORDS = " (Input tokens exceed the configured limit)"


def status_of(error: ChatserveError) -> tuple[int, ErrorType]:
    """The row of the nearest class above `error`'s own."""
    rows = (STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    return next(rows, INTERNAL)


def error_fields(error: Exception) -> dict[str, str | None]:
    """OpenAI's fields; what is not a ChatserveError is a bug and stays in the log.

    Who asks is going to tell the client, which is noted for the operator.
    """
    note_error(error, status_of(error)[0] if isinstance(error, ChatserveError) else INTERNAL[0])
    if isinstance(error, ChatserveError):
        fields = {
            "message": error.message + _words_of(error),
            "type": status_of(error)[1],
            "param": error.param,
            "code": error.code,
        }
    else:
        fields = {
            "message": INTERNAL_MESSAGE,
            "type": INTERNAL[1],
            "param": None,
            "code": ChatserveError.code,
        }
    # a message may quote a lone surrogate of a path or header, which UTF-8 cannot hold
    return {**fields, "message": str(fields["message"]).encode("utf-8", "replace").decode()}


def _words_of(error: ChatserveError) -> str:
    return TOO_LONG_WORDS if isinstance(error, errors.ContextLengthExceeded) else ""


def error_body(error: Exception, path: str = "") -> bytes:
    """`{"error": {...}}`, or what stands for it on the routes of another protocol."""
    status = status_of(error)[0] if isinstance(error, ChatserveError) else INTERNAL[0]
    return orjson.dumps(dialect_of(path).body(error_fields(error), status))


def error_event(error: Exception, path: str = "", last: bytes = b"") -> bytes:
    """The last event of a stream that fails after its first byte; no `[DONE]` follows it.

    `last`: frames that it follows.
    """
    status = status_of(error)[0] if isinstance(error, ChatserveError) else INTERNAL[0]
    return dialect_of(path).event(error_fields(error), status, last)


def error_response(error: ChatserveError, path: str = "") -> Response:
    """The whole answer to a request for `path` that fails before its first byte."""
    headers = {}
    if isinstance(error, (errors.Overloaded, errors.NoWorkerAvailable, errors.ShuttingDown)):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, errors.InvalidAPIKey):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, LOST_HERE):
        headers[JOURNAL_HEADER] = GIVEN_UP
    body = error_body(error, path)
    return Response(body, status_of(error)[0], headers=headers, media_type=JSON_TYPE)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of `app` the one shape: ours, the router's, FastAPI's 422, and bugs."""

    async def on_client_left(request: Request, _error: Exception) -> Response:
        return nobody_listens(request)

    async def on_chatserve_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ChatserveError)
        return error_response(error, request.url.path)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _router_error(request, error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        # where it was found (body, query …) is not part of the name
        fault = invalid_request({**first, "loc": first["loc"][1:]})
        return error_response(fault, request.url.path)

    async def on_bug(request: Request, error: Exception) -> Response:
        body = error_body(error, request.url.path)
        # uvicorn closes behind a bug: who keeps connections must not send a request into that
        return Response(body, INTERNAL[0], headers={"Connection": "close"}, media_type=JSON_TYPE)

    app.add_exception_handler(ClientDisconnect, on_client_left)
    app.add_exception_handler(ChatserveError, on_chatserve_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(Exception, on_bug)


def _router_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        way_out = f"use {allowed or 'another method'}"
        response = error_response(
            errors.MethodNotAllowed(f"no {_asked(request)} here; {way_out}"), path
        )
        response.headers["Allow"] = allowed
        return response
    if error.status_code == 404:
        return error_response(no_route(request), path)
    return error_response(errors.InvalidRequest(f"{_asked(request)}: {error.detail}"), path)


def no_route(request: Request) -> errors.RouteNotFound:
    return errors.RouteNotFound(f"no route {_asked(request)}; /openapi.json lists them")


def _asked(request: Request) -> str:
    return f"{request.method} {request.url.path}"[:200]
