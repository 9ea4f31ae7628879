"""LiteLLM: chat whole and streamed, text completion, errors."""

from __future__ import annotations

import os

import litellm

MESSAGES = [{"role": "user", "content": "hi"}]


def judge(url: str) -> None:
    litellm.telemetry = False
    api = {"api_base": f"{url}/v1", "api_key": os.environ["OPENAI_API_KEY"], "max_retries": 0}
    chat = {**api, "model": "openai/tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 1}

    whole = litellm.completion(**chat)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason in ("stop", "length")
    assert 0 < whole.usage.completion_tokens <= 8 and whole.usage.prompt_tokens > 0

    chunks = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert rebuilt.choices[0].message.content == text

    completion = litellm.text_completion(
        **api, model="text-completion-openai/tiny", prompt="Once", max_tokens=4
    )
    assert completion.choices[0].text

    try:
        litellm.completion(**{**chat, "temperature": 1.0, "n": 9})
    except litellm.BadRequestError as error:
        assert "n is 9" in str(error)
    else:
        raise AssertionError("nine choices were allowed")
    try:
        litellm.completion(**{**chat, "messages": [{"role": "user", "content": "x" * 9000}]})
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("LiteLLM does not see that the context was exceeded")
