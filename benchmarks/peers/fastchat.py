"""FastChat under a Python of its own: `generate_stream`, and its three servers together.

FASTCHAT_PYTHON names the interpreter; see benchmarks/peers.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.peers.agent import AgentPeer
from benchmarks.peers.peer import Peer
from benchmarks.peers.server import ServerPeer, free_port, is_listening, wait_for_port
from benchmarks.run_model import RunModel

DEFAULT_FORMS = ("fp32",)


def peers(mode: str, model: RunModel, forms: Sequence[str], python: Path) -> list[Peer]:
    """One peer per form: fp32 or 8bit."""
    if mode == "http":
        return [FastChatServer(model, form, python) for form in forms]
    module = [str(python), "-m", "benchmarks.agents.fastchat_agent", str(model.folder)]
    return [
        AgentPeer(f"fastchat {form}", [*module, form], {"HF_HUB_OFFLINE": "1"}, max_streams=1)
        for form in forms
    ]


class FastChatServer(ServerPeer):
    """Controller, model worker and OpenAI server."""

    def __init__(self, model: RunModel, form: str, python: Path) -> None:
        super().__init__(f"fastchat {form}", model.vocab_size)
        self._model = model
        self._form = form
        self._python = str(python)
        self._worker_port = 0
        self._tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))

    def commands(self, port: int) -> Iterator[Sequence[str]]:
        controller, worker = free_port(), free_port()
        self._worker_port = worker
        address = f"http://127.0.0.1:{controller}"
        form = ["--load-8bit"] if self._form == "8bit" else []
        module = [self._python, "-m"]
        yield [*module, "fastchat.serve.controller", "--port", str(controller)]
        # a worker that does not find its controller gives up
        wait_for_port(controller)
        yield [
            *module, "fastchat.serve.model_worker", "--port", str(worker), "--device", "cpu",
            "--num-gpus", "1", "--model-path", str(self._model.folder),
            "--model-names", "benchmark", "--controller-address", address,
            "--worker-address", f"http://127.0.0.1:{worker}", "--stream-interval", "1",
            "--limit-worker-concurrency", "16", *form,
        ]  # fmt: skip
        yield [
            *module, "fastchat.serve.openai_api_server", "--port", str(port),
            "--controller-address", address,
        ]  # fmt: skip

    def environment(self) -> Mapping[str, str]:
        # it writes its logs where it stands, otherwise
        return {"HF_HUB_OFFLINE": "1", "LOGDIR": tempfile.gettempdir()}

    def is_ready(self) -> bool:
        # the worker is listed before it listens
        status, body = self.get("/v1/models")
        is_listed = status == 200 and bool(json.loads(body)["data"])
        return is_listed and is_listening(self._worker_port)

    def body(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        # it would decode ids with OpenAI's vocabulary
        body = {**super().body(prompt, tokens), "prompt": self._tokenizer.decode(prompt)}
        del body["stream_options"]  # it says no usage: its events are counted
        return body
