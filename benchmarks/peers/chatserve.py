"""chatserve itself: the engine alone, and `chatserve serve` as a user starts it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import psutil

from benchmarks.peers.agent import AgentPeer
from benchmarks.peers.peer import Peer
from benchmarks.peers.server import ServerPeer
from benchmarks.run_model import RunModel
from chatserve.config import WorkerConfig

# form -> settings, as environment variables
FORMS: Mapping[str, Mapping[str, str]] = {
    "bf16": {"CHATSERVE_DTYPE": "bfloat16"},
    "int8": {"CHATSERVE_LOAD_8BIT": "1"},
    "group32": {"CHATSERVE_LOAD_8BIT": "1", "CHATSERVE_QUANT_GROUP": "32"},
    "int4": {"CHATSERVE_LOAD_4BIT": "1"},
    "int8-avx2": {"CHATSERVE_LOAD_8BIT": "1", "CHATSERVE_KERNELS": "avx2"},
    "int8-torch": {"CHATSERVE_LOAD_8BIT": "1", "CHATSERVE_KERNELS": "off"},
}
DEFAULT_FORMS = ("int8", "bf16")
# repeats in random text would be drafted: the figures are of the kernels, for drafts see
# benchmarks.features
PLAIN = {"CHATSERVE_SPECULATION": "0", "HF_HUB_OFFLINE": "1"}
_NO_SETTINGS = {"CHATSERVE_KERNELS"}


def peers(mode: str, model: RunModel, forms: Sequence[str]) -> list[Peer]:
    """One peer per form; a form that this version has no setting for is an error."""
    return [_peer(mode, model, form) for form in forms]


def check_form(form: str) -> None:
    """A setting that does not exist would be ignored, and another form measured under its name."""
    if form not in FORMS:
        raise SystemExit(f"chatserve has no form {form}; there are {', '.join(FORMS)}")
    known = {f"CHATSERVE_{field.name.upper()}" for field in fields(WorkerConfig)} | _NO_SETTINGS
    if missing := FORMS[form].keys() - known:
        raise SystemExit(f"chatserve {form}: this version has no {', '.join(sorted(missing))}")


def _peer(mode: str, model: RunModel, form: str) -> Peer:
    check_form(form)
    environment = {**PLAIN, **FORMS[form]}
    name = f"chatserve {form}"
    if mode == "http":
        return ChatserveServer(name, model, environment)
    command = [sys.executable, "-m", "benchmarks.agents.chatserve_agent", str(model.folder)]
    return AgentPeer(name, command, environment)


class ChatserveServer(ServerPeer):
    """Controller and one supervised worker."""

    def __init__(self, name: str, model: RunModel, environment: Mapping[str, str]) -> None:
        super().__init__(name, model.vocab_size)
        self._model = model
        self._environment = environment

    def commands(self, port: int) -> Sequence[Sequence[str]]:
        command = [sys.executable, "-m", "chatserve", "serve", str(self._model.folder)]
        return [[*command, "--port", str(port), "--model-names", "benchmark"]]

    def environment(self) -> Mapping[str, str]:
        return self._environment

    def is_ready(self) -> bool:
        return self.get("/health/ready")[0] == 200

    def body(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        # what llama-server's ignore_eos does, too: the end is forbidden by a bias
        return {
            **super().body(prompt, tokens),
            "logit_bias": {str(id_): -100 for id_ in self._model.eos_ids},
        }

    def roles(self) -> dict[str, tuple[int, bool]]:
        """The worker's main thread is its event loop: HTTP without the engine."""
        controller = self._processes[0].pid
        (worker,) = psutil.Process(controller).children()
        return {"controller": (controller, False), "worker": (worker.pid, True)}
