"""The API as other people's clients see it: through a controller, from a worker with a network.

Clients with a shadow of their own (warnings, threads, telemetry) run in another process, where
loopback is all the network there is.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.protocol.control import WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.model_slot import ModelSlot
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_slot_app
from tests import judges, tiny
from tests.fakes import FakeClock
from tests.servers import TIMEOUT_S, http_request, send_raw, serving

TOKEN = "control-token"
KEY = "a-key"
NODE = Path(sys.prefix) / "node" / "node_modules"
# answers that end by themselves, soon: the streaming helper takes a cut one for an error
SOON = {str(tiny.EOS_ID): 4}
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@contextmanager
def worker(folder: Path, name: str) -> Iterator[tuple[str, WorkerStatus]]:
    """A worker with all that one has; where it listens, and what it says of itself."""
    config = WorkerConfig(
        weights=str(folder), device="cpu", dtype="float32", model_names=(name,), max_num_seqs=4,
        self_check=False,
    )  # fmt: skip
    engine, model = load(config)
    grammars = GrammarCompiler(model.tokenizer, model.vocab_size, model.stop_token_ids)
    slot = ModelSlot.filled(engine, replace(model, grammars=grammars))
    policy = AccessPolicy.build("127.0.0.1", api_keys=[TOKEN])

    def build() -> Edge:
        engine.start()
        return create_slot_app(slot, policy=policy, control_token=TOKEN)

    with serving(build) as server:
        yield server.url, WorkerStatus(state="ready", models=slot.cards())
        server.call(engine.stop())
    grammars.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A controller with two models, of which `brief` says next to nothing."""
    folder, brief = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("brief")
    tiny.save_model(folder, max_position_embeddings=1024)
    model = tiny.save_model(brief, max_position_embeddings=1024)
    with torch.no_grad():
        # of every other token the end is by far the likeliest to follow
        model.lm_head.weight[tiny.EOS_ID] *= 30
    model.save_pretrained(brief)
    # nobody beats here, and nobody expires
    registry = WorkerRegistry(FakeClock())
    policy = AccessPolicy.build("127.0.0.1", api_keys=[KEY], control_token=TOKEN)
    with (
        worker(folder, "tiny") as talkative,
        worker(brief, "brief") as taciturn,
        serving(
            lambda: create_controller_app(registry, control_token=TOKEN, policy=policy)
        ) as controller,
    ):
        registry.register("talkative", *talkative)
        registry.register("taciturn", *taciturn)
        yield controller.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def judged(name: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", judges.__name__, name, url],
        capture_output=True, text=True, timeout=10 * TIMEOUT_S, check=False,
        env={**os.environ, "OPENAI_API_KEY": KEY},
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["litellm_calls", "langchain_calls", "llm_command", "schemathesis_run"]
)
def test_judge(name: str, url: str) -> None:
    result = judged(name, url)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert result.stdout.endswith("judged\n")


def test_who_calls_another_host_is_caught(url: str) -> None:
    result = judged("stranger", url)
    assert result.returncode == 1 and "judged" not in result.stdout
    assert "stranger wanted to reach 192.0.2.1, example.invalid" in result.stderr


def test_node(url: str) -> None:
    node = shutil.which("node")
    if node is None or not (NODE / "openai").is_dir():
        reason = "needs Node and its openai package: make judges"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    script = Path(judges.__file__).parent / "node" / "judge.cjs"
    result = subprocess.run(
        [node, script, url], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, "NODE_PATH": str(NODE), "OPENAI_API_KEY": KEY},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "judged\n"), result.stderr


class Verdict(BaseModel):
    taste: Literal["sweet", "sour"]
    is_good: bool


def test_parse(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Verdict, max_tokens=100
    )
    assert reply.choices[0].finish_reason == "stop"
    assert isinstance(reply.choices[0].message.parsed, Verdict)


def test_parse_of_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Verdict, max_tokens=3
        )


def test_streaming_helper(client: openai.OpenAI) -> None:
    kinds = []
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, seed=1, logit_bias=SOON, logprobs=True, top_logprobs=2
    ) as stream:
        text = ""
        for event in stream:
            kinds.append(event.type)
            if event.type == "content.delta":
                text += event.delta
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == text
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= set(kinds)


def test_streaming_helper_parses(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Verdict, max_tokens=100
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.parsed, Verdict)


def test_async_client(url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            asked = [
                client.chat.completions.create(
                    model="tiny", messages=MESSAGES, logit_bias=SOON, seed=seed
                )
                for seed in (1, 2, 1)
            ]
            first, other, again = [
                r.choices[0].message.content for r in await asyncio.gather(*asked)
            ]
            assert first == again != other
            async with client.chat.completions.stream(
                model="tiny", messages=MESSAGES, logit_bias=SOON, seed=1
            ) as stream:
                whole = await stream.get_final_completion()
            assert whole.choices[0].message.content == first

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_framing_of_a_stream(url: str, path: str) -> None:
    """Byte for byte: chunks of HTTP that add up, events that end with an empty line, no more."""
    fields = {"messages": MESSAGES} if path.endswith("chat/completions") else {"prompt": "hi"}
    body = {"model": "tiny", "stream": True, "max_tokens": 9, **fields}
    port = int(url.rpartition(":")[2])
    request = http_request("POST", path, body, headers={"Authorization": f"Bearer {KEY}"})
    # two requests on one connection: what is left of the first would spoil the second
    with send_raw(port, request + request) as sock:
        data = b""
        while data.count(b"\r\n0\r\n\r\n") < 2:
            piece = sock.recv(65536)
            assert piece, data
            data += piece
    answers = data.split(b"\r\n0\r\n\r\n")
    assert len(answers) == 3 and answers[2] == b""
    for answer in answers[:2]:
        head, _, chunked = answer.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        assert lines[0] == b"http/1.1 200 ok" and b"transfer-encoding: chunked" in lines
        assert not any(line.startswith(b"content-length") for line in lines)
        text = dechunked(chunked + b"\r\n")
        assert text.endswith(b"\n\ndata: [DONE]\n\n") and b"\r" not in text
        for event in text.decode().removesuffix("\n\n").split("\n\n"):
            assert event.startswith(("data: ", ": ")) and "\n" not in event


def dechunked(data: bytes) -> bytes:
    text = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        text += rest[:length]
        assert rest[length : length + 2] == b"\r\n"
        data = rest[length + 2 :]
    return text
