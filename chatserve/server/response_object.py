"""What a Responses answer says of itself beside its output: the request's fields, usage, errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chatserve.errors import InvalidRequest, Overloaded
from chatserve.protocol.responses import AskedResponse
from chatserve.server.error_response import error_fields
from chatserve.server.generation import Generation
from chatserve.server.preparation import Prepared


def head_of(
    asked: AskedResponse, prepared: Prepared, response_id: str, created: int, fingerprint: str
) -> dict[str, Any]:
    """The fields that stay as they are, whatever the answer becomes."""
    request, raw, params = asked.request, asked.raw, prepared.prompts[0].params
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata,
        "model": request.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.store is not False,
        "system_fingerprint": fingerprint,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}, **_given(raw.get("text"))},
        "tool_choice": raw.get("tool_choice") or "auto",
        "tools": raw.get("tools") or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


def _given(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (fields or {}).items() if value is not None}


def usage_of(generation: Generation, places: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Token counts. Where oldest items could give way: how many tokens they were, and which.

    `places`: the items that each message of the chat came from.
    """
    prepared = generation.prepared
    num_input, num_output = prepared.num_prompt_tokens, generation.num_generated_tokens
    usage = {
        "input_tokens": num_input,
        "input_tokens_details": {
            "cached_tokens": generation.num_cached_tokens, "cache_write_tokens": 0,
        },
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }  # fmt: skip
    if prepared.rolled is not None:
        usage["input_tokens_dropped"] = prepared.rolled.num_tokens_dropped
        usage["input_items_dropped"] = items_of(prepared.rolled.messages_dropped, places)
    return usage


def items_of(messages: Iterable[int], places: Sequence[Sequence[int]]) -> list[int]:
    return [item for message in messages for item in places[message]]


def error_of(error: Exception) -> dict[str, Any]:
    """In the codes of this API, which are fewer than ours."""
    code = "server_error"
    if isinstance(error, Overloaded):
        code = "rate_limit_exceeded"
    elif isinstance(error, InvalidRequest):
        code = "invalid_prompt"
    return {"code": code, "message": error_fields(error)["message"]}
