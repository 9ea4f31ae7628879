"""What a server's JSON says: models, progress, events of a stream, errors.

Knows the shapes of the OpenAI API and `chatserve.errors`; no socket. Whatever a server sends
becomes plain data or one of our errors.
"""

from __future__ import annotations

import json
from typing import Any

from chatserve.cli.answer import ChatDelta, ModelInfo, Progress
from chatserve.errors import (
    BadStream,
    ChatserveError,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidAPIKey,
    InvalidRequest,
    ModelNotFound,
    NoWorkerAvailable,
    Overloaded,
    ShuttingDown,
    StartupError,
    WorkerLost,
)

_MAX_RANGE_LEN = 9
_MAX_PLACES = 1 << 16


def read_model(entry: dict[str, Any]) -> ModelInfo:
    extra = entry.get("chatserve")
    extra = extra if isinstance(extra, dict) else {}

    def text(key: str) -> str | None:
        value = extra.get(key)
        return value if isinstance(value, str) else None

    parent, bits = entry.get("parent"), extra.get("weight_bits")
    meta = entry.get("meta")
    # ours; vLLM's; that of several gateways; llama-server's
    lengths = (
        extra.get("context_length"), entry.get("max_model_len"), entry.get("context_length"),
        meta.get("n_ctx") if isinstance(meta, dict) else None,
    )  # fmt: skip
    return ModelInfo(
        name=str(entry.get("id", "")),
        device=text("device"),
        dtype=text("dtype"),
        weight_bits=bits if type(bits) is int else None,
        context_length=next((n for n in lengths if type(n) is int and n > 0), None),
        template_name=text("template"),
        parent=parent if isinstance(parent, str) else None,
    )


def read_progress(table: Any, name: str | None = None) -> Progress | None:
    """The first model that is not ready; a body of another shape says only "not ready".

    `name`: of that model alone, if it is there; None when it is ready.
    """
    models = table.get("models") if isinstance(table, dict) else None
    there = [model for model in models if isinstance(model, dict)] if models else []
    there = [model for model in there if model.get("name") == name] or there
    if any(model.get("name") == name and model.get("state") == "ready" for model in there):
        return None
    for model in there:
        if model.get("state") != "ready":
            return Progress(
                name=str(model.get("name", "")),
                state=str(model.get("state", "")),
                loaded_bytes=_count(model.get("loaded_bytes")) or 0,
                total_bytes=_count(model.get("total_bytes")) or 0,
            )
    return Progress()


def read_models(table: Any) -> list[ModelInfo] | None:
    """The entries of `/v1/models`, with or without a table around them; None: it is neither."""
    entries = table.get("data") if isinstance(table, dict) else table or None
    if not isinstance(entries, list):
        return None
    return [read_model(entry) for entry in entries if isinstance(entry, dict)]


def read_delta(data: str) -> ChatDelta:
    """One event of a chat stream. Raises what it reports."""
    try:
        event = json.loads(data)
        return _read_chunk(event, "delta")
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        raise BadStream(f"the server sent an event that is no chat answer: {data[:60]!r}") from None


def read_whole(table: Any) -> ChatDelta:
    """An answer that came in one piece. Raises what it reports."""
    try:
        if not table.get("error") and not table["choices"][0]["message"]:
            raise ValueError
        return _read_chunk(table, "message")
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
        raise BadStream(f"the server sent no chat answer: {str(table)[:60]!r}") from None


def _read_chunk(event: Any, where: str) -> ChatDelta:
    """Raises what it reports, and all that misses in a table of another shape."""
    if not isinstance(event, dict):
        raise ValueError
    if event.get("error") or event.get("object") == "error":
        raise read_error(error_body(event))
    choice = (event.get("choices") or [{}])[0]
    said = choice.get(where) or {}
    text = said.get("content") or ""
    # llama-server's, vLLM's and DeepSeek's name; Ollama's and the gateways'
    reasoning = said.get("reasoning_content") or said.get("reasoning") or ""
    finish_reason = choice.get("finish_reason")
    usage = event.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    if not isinstance(text, str) or not isinstance(finish_reason, str | None):
        raise ValueError
    if not isinstance(usage, dict) or not isinstance(details, dict):
        raise ValueError
    return ChatDelta(
        scalar_values(text),
        finish_reason,
        _count(usage.get("completion_tokens")),
        num_prompt_tokens=_count(usage.get("prompt_tokens")),
        num_cached_tokens=_count(details.get("cached_tokens")),
        reasoning=scalar_values(reasoning) if isinstance(reasoning, str) else "",
    )


def read_dropped(ranges: str) -> tuple[int, ...]:
    """The places of messages in a header such as `0-3,7`; nothing where it is no such list."""
    places: list[int] = []
    for part in ranges.split(","):
        start, _, end = part.strip().partition("-")
        if not start.isdecimal() or not (end or start).isdecimal() or len(part) > _MAX_RANGE_LEN:
            return ()
        places += range(int(start), int(end or start) + 1)
        if len(places) > _MAX_PLACES:
            return ()
    return tuple(places)


def read_token_count(table: Any) -> int | None:
    """What `/tokenize` counts, in vLLM's shape or llama-server's."""
    if not isinstance(table, dict):
        return None
    tokens = table.get("tokens")
    return len(tokens) if isinstance(tokens, list) else _count(table.get("count"))


def scalar_values(text: str) -> str:
    """JSON can spell half a surrogate pair, which no terminal, file or request can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


_STATUS_ERRORS: dict[int, type[ChatserveError]] = {
    401: InvalidAPIKey, 403: InvalidAPIKey, 404: ModelNotFound,
    429: Overloaded, 502: WorkerLost, 503: NoWorkerAvailable,
}  # fmt: skip


_TYPE_ERRORS: dict[str, type[ChatserveError]] = {
    "exceed_context_size_error": ContextLengthExceeded,  # llama-server's
}
_CONTEXT_PHRASE = "maximum context length"  # OpenAI's and vLLM's, where there is no code


def error_body(table: Any) -> Any:
    """What tells of an error in a body: OpenAI's `error`, or what others have in its place."""
    if isinstance(table, list) and table:
        table = table[0]
    if not isinstance(table, dict):
        return None
    if table.get("error"):
        return table["error"]
    if isinstance(table.get("message"), str):  # older vLLM
        return table
    if isinstance(detail := table.get("detail"), list):  # FastAPI, where a request is malformed
        faults = [each for each in detail if isinstance(each, dict)]
        return "; ".join(f"{_path(each.get('loc'))}: {each.get('msg')}" for each in faults)
    return detail


def _path(places: Any) -> str:
    return ".".join(map(str, places)) if isinstance(places, list) else "request"


def read_error(
    body: Any,
    status: int = 500,
    retry_after: str = "",
    *,
    otherwise: str = "the server failed",
) -> ChatserveError:
    """The error that the `error` object of an event, or of an answer other than 200, tells of.

    `otherwise` is its message where the object has none.
    """
    body = body if isinstance(body, dict) else {"message": body}
    message = body.get("message")
    if not isinstance(message, str) or not message:
        message = otherwise
    code = body.get("code")
    kind = _error_classes().get(code) if isinstance(code, str) else None
    kind = kind or _TYPE_ERRORS.get(str(body.get("type")))
    if kind is None and 400 <= status < 500 and _CONTEXT_PHRASE in message:
        kind = ContextLengthExceeded
    if kind is None:
        default = InvalidRequest if 400 <= status < 500 else GenerationFailed
        kind = _STATUS_ERRORS.get(status, default)
    if kind in (Overloaded, ShuttingDown):
        return kind(message, retry_after_s=int(retry_after) if retry_after.isdecimal() else 1)
    if kind is InvalidAPIKey:
        message += " (the key is read from the environment variable CHATSERVE_API_KEY)"
    param = body.get("param")
    return kind(message, param=param if isinstance(param, str) else None)


def _error_classes() -> dict[str, type[ChatserveError]]:
    """`code` on the wire -> class, for all errors that a server may name."""
    classes: dict[str, type[ChatserveError]] = {}
    waiting = [ChatserveError]
    while waiting:
        kind = waiting.pop()
        if not issubclass(kind, StartupError):
            classes.setdefault(kind.code, kind)
            waiting += kind.__subclasses__()
    return classes
