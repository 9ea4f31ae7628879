"""langchain-openai: invoke, stream, batch, structured output, text completions."""

from __future__ import annotations

import os

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    is_good: bool
    is_cheap: bool


def judge(url: str) -> None:
    api = {
        "base_url": f"{url}/v1",
        "api_key": os.environ["OPENAI_API_KEY"],
        "model": "tiny",
        "max_retries": 0,
    }
    chat = ChatOpenAI(**api, max_tokens=8, seed=3, stream_usage=True)

    whole = chat.invoke("hi")
    assert whole.content and whole.usage_metadata["output_tokens"] <= 8
    assert whole.response_metadata["system_fingerprint"]

    pieces = list(chat.stream("hi"))
    assert "".join(piece.content for piece in pieces) == whole.content
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.usage_metadata == whole.usage_metadata

    assert [reply.content for reply in chat.batch(["hi", "hi"])] == [whole.content] * 2

    try:
        chat.invoke("x" * 9000)
    except ContextOverflowError:
        pass
    else:
        raise AssertionError("LangChain does not see that the context was exceeded")

    picky = ChatOpenAI(**api, max_tokens=300, temperature=0)
    for method in ("json_schema", "function_calling"):
        verdict = picky.with_structured_output(Verdict, method=method).invoke("good or cheap?")
        assert isinstance(verdict, Verdict), method

    assert OpenAI(**api, max_tokens=4).invoke("Once")
