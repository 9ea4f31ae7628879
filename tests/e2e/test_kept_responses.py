"""Responses that outlive the server that answered them, killed in the middle of another one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.test_serve_process import SERVE, Process
from tests.fakes import ANSWER

Serve = Callable[..., Process]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def serve(*arguments: str) -> Process:
            process = Process(*SERVE, "--port", "0", "fake", *arguments, home=tmp_path / "home")
            stack.callback(process.end)
            return process

        yield serve


@contextlib.contextmanager
def client_of(process: Process) -> Iterator[openai.OpenAI]:
    url = f"{process.ready_url()}/v1"
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        yield client


def test_a_chain_over_a_kill(serve: Serve, tmp_path: Path) -> None:
    process = serve()
    with client_of(process) as client:
        assert not (tmp_path / "home" / "responses.db").exists(), "nothing was kept yet"
        first = client.responses.create(model="fake", input="one")
        stream = client.responses.create(model="fake", input="two", stream=True)
        assert next(stream).type == "response.created"
        process.popen.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with contextlib.suppress(openai.APIError):
            list(stream)
    process = serve()
    with client_of(process) as client:
        second = client.responses.create(model="fake", input="x", previous_response_id=first.id)
        assert second.output_text == "".join(ANSWER)
        items = client.responses.input_items.list(second.id, order="asc").data
        assert [item.type for item in items] == ["message"] * 3


def test_nothing_is_kept_where_nobody_wants_it(serve: Serve, tmp_path: Path) -> None:
    with client_of(serve("--no-store-responses")) as client:
        first = client.responses.create(model="fake", input="one")
        with pytest.raises(openai.BadRequestError, match="no responses are kept"):
            client.responses.create(model="fake", input="x", previous_response_id=first.id)
    assert not list((tmp_path / "home").glob("responses.db*"))
