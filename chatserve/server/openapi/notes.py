"""What each field of a request means, in a sentence, by its name: one meaning on every route."""

from __future__ import annotations

from collections.abc import Mapping

_NOT_SUPPORTED = "not supported: accepted with a value that changes nothing"

NOTES: Mapping[str, str] = {
    "model": "the name of a model that is served, or `MODEL:ADAPTER`",
    "messages": "the conversation so far; `developer` is another word for `system`",
    "prompt": "a text, token ids, or a list of either",
    "stream": "send the answer as it comes, as server-sent events",
    "stream_options": "`include_usage`: a last chunk with the token counts",
    "n": "how many answers",
    "best_of": "how many answers are made; must be `n`",
    "max_tokens": "the longest answer, in tokens; default: what the context has room for, 16 for a "
    "text completion",
    "max_completion_tokens": "the newer name of `max_tokens`",
    "temperature": "0 takes the likeliest token; default 1",
    "top_p": "only the likeliest tokens, up to this share; default 1",
    "top_k": "only so many of the likeliest tokens; 0 or -1: all",
    "min_p": "only tokens at least this share as likely as the likeliest; default 0",
    "repetition_penalty": "over 1 makes tokens of prompt and answer less likely; default 1",
    "presence_penalty": "taken off the logit of every token that the answer has had",
    "frequency_penalty": "the same, for each time",
    "seed": "the same seed gives the same text",
    "stop": "texts that end the answer and are not part of it",
    "logit_bias": "added to the logits of tokens, by id",
    "user": "a label; changes nothing",
    "metadata": "labels; change nothing",
    "safety_identifier": "a label; changes nothing",
    "prompt_cache_key": "a label; changes nothing",
    "logprobs": _NOT_SUPPORTED,
    "top_logprobs": _NOT_SUPPORTED,
    "tools": _NOT_SUPPORTED,
    "tool_choice": _NOT_SUPPORTED,
    "parallel_tool_calls": _NOT_SUPPORTED,
    "functions": "the older name of `tools`; not supported",
    "function_call": "the older name of `tool_choice`; not supported",
    "response_format": _NOT_SUPPORTED,
    "modalities": "text only",
    "audio": _NOT_SUPPORTED,
    "prediction": _NOT_SUPPORTED,
    "reasoning_effort": _NOT_SUPPORTED,
    "verbosity": _NOT_SUPPORTED,
    "web_search_options": _NOT_SUPPORTED,
    "service_tier": _NOT_SUPPORTED,
    "store": _NOT_SUPPORTED,
    "echo": _NOT_SUPPORTED,
    "suffix": _NOT_SUPPORTED,
    "lora_name": "NAME, or BASE:NAME where several models are served",
    "lora_path": "a folder below `--adapter-root` on the worker's machine",
    "load_inplace": "put it in the place of one that has the name already",
}
