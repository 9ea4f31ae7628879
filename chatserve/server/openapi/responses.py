"""/v1/responses, in the document."""

from __future__ import annotations

from chatserve.protocol.response_replies import (
    DeletedResponse,
    InputItemList,
    ResponseEvent,
    ResponseReply,
)
from chatserve.protocol.responses import RESPONSES_NO_OPS, RESPONSES_PATH, ResponsesRequest
from chatserve.server.openapi.operation import (
    ANY_REQUEST,
    WITH_BODY,
    WITH_MODEL,
    Body,
    Operation,
)

NO_LABELS: frozenset[str] = frozenset()
ONE = RESPONSES_PATH + "/{response_id}"
ID = {"response_id": "its id"}
ERRORS = (*ANY_REQUEST, 400, 404)

OPERATIONS = (
    Operation(
        "post", RESPONSES_PATH, "createResponse", "Responses", "Answer items", ResponseReply,
        about="It is kept for 30 days, unless `store` is false or the server was started with "
        "`--no-store-responses`.",
        body=Body(
            ResponsesRequest,
            {"model": "smollm2-135m", "input": "Say hello."},
            RESPONSES_NO_OPS,
            labels=NO_LABELS,
        ),
        event=ResponseEvent,
        errors=(*ANY_REQUEST, *WITH_BODY, *WITH_MODEL),
    ),
    Operation(
        "get", ONE, "getResponse", "Responses", "A response that is kept, or being streamed",
        ResponseReply, parameters=ID, errors=ERRORS,
    ),
    Operation(
        "delete", ONE, "deleteResponse", "Responses", "Keep a response no longer", DeletedResponse,
        parameters=ID, errors=ERRORS,
    ),
    Operation(
        "post", ONE + "/cancel", "cancelResponse", "Responses", "End a response that is streamed",
        ResponseReply,
        about="Its stream ends with `response.incomplete`, in which its status is `cancelled`.",
        parameters=ID, errors=(*ERRORS, 413, 415, 502, 503),
    ),
    Operation(
        "get", ONE + "/input_items", "listInputItems", "Responses",
        "What a response was an answer to", InputItemList,
        about="With what came before it, newest first.",
        parameters=ID, errors=ERRORS,
        query={
            "after": {"type": "string", "description": "the item behind which to begin"},
            "limit": {
                "type": "integer", "minimum": 1, "maximum": 100, "default": 20,
                "description": "how many at most",
            },
            "order": {"enum": ["asc", "desc"], "default": "desc", "description": "oldest first?"},
        },
    ),
)  # fmt: skip
