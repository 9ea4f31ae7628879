"""A worker goes on with streams that another one has begun; the relay's part is done by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from chatserve.server.edge import AccessPolicy
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeEngine, FakeModel
from tests.journals import TOKEN, resume, stream, without_times
from tests.servers import serving

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": "fake", "prompt": ["one", "two"], "stream": True, "n": 2, "max_tokens": 9}
MESSAGE = {**CHAT, "max_tokens": 100}
RESPONSE = {"model": "fake", "input": "hi", "stream": True}
POLICY = AccessPolicy.build("127.0.0.1", api_keys=(TOKEN,), control_token=TOKEN)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(
        lambda: create_worker_app(FakeEngine(), FakeModel(), policy=POLICY, control_token=TOKEN)
    ) as server:
        yield server.url


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "n": 3, "return_token_ids": True}),
    ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}),
    (
        "/v1/chat/completions",
        {**CHAT, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, "echo": True, "max_tokens": 0}),
    ("/v1/messages", MESSAGE),
    ("/v1/messages", {**MESSAGE, "stop_sequences": ["!"]}),
    ("/v1/responses", RESPONSE),
]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_stream_goes_on_where_it_was_cut(url: str, path: str, body: dict[str, Any]) -> None:
    whole = stream(url, path, body)
    assert whole[0].block.startswith(b":s ") and whole[-1].block == b":e\n\n"
    for place in range(1, len(whole)):
        again = resume(url, path, body, whole[:place])
        assert again[0] == (b"", whole[0].block)
        assert without_times(again[1:]) == without_times(whole[place:]), place
