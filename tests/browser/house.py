"""A controller with fake workers that answer what a test says, at an address that stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve.errors import ChatserveError
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.server.controller import create_controller_app
from chatserve.server.conversation_store import ConversationStore
from chatserve.server.edge import AccessPolicy
from chatserve.server.registry import WorkerRegistry
from chatserve.server.worker import create_worker_app
from tests.fakes import FakeClock, FakeEngine, FakeModel, FakeStream
from tests.servers import RunningServer, serving

TOKEN = "control-token"
CONTEXT_LENGTH = 1_000_000


@dataclass(frozen=True)
class Reply:
    """What an engine says to a question: as `FakeEngine` has it, but for one request."""

    pieces: Sequence[str] = ("Hello", ", ", "wörld", " 🙂", "!")
    step_s: float | None = 0.002
    hangs: bool = False
    error: ChatserveError | None = None
    refusal: ChatserveError | None = None
    place: int | None = None


def said(text: str, **options: Any) -> Reply:
    """`text` in pieces as a model would say it."""
    return Reply([text[start : start + 4] for start in range(0, len(text), 4)], **options)


class ScriptedEngine(FakeEngine):
    """Asks `reply` what to say; it is given the whole prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.reply: Callable[[str], Reply] = lambda _prompt: Reply()
        self.prompts: list[str] = []

    def submit(
        self, request_id: str, prompt_ids: Sequence[int], *a: Any, **options: Any
    ) -> FakeStream:
        prompt = bytes(prompt_ids).decode()
        reply = self.reply(prompt)
        self.pieces, self.step_s, self.hangs = tuple(reply.pieces), reply.step_s, reply.hangs
        self.error, self.refusal, self.place = reply.error, reply.refusal, reply.place
        self.prompts.append(prompt)
        return super().submit(request_id, prompt_ids, *a, **options)


class House:
    """`names`: one worker each. `stop` and `start` are the controller's; workers go on."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        folder: Path,
        names: Sequence[str] = ("alpha", "beta"),
        *,
        keeps: bool = True,
        **policy: Any,
    ) -> None:
        self.engines: Mapping[str, ScriptedEngine] = {name: ScriptedEngine() for name in names}
        self.store = ConversationStore(folder / "page" / "conversations.db") if keeps else None
        self.registry = WorkerRegistry(FakeClock(), expected=names)
        self._policy = policy
        self._workers = {
            name: stack.enter_context(
                serving(
                    lambda engine=engine, name=name: create_worker_app(
                        engine,
                        FakeModel(names=(name,), context_length=CONTEXT_LENGTH),
                        policy=AccessPolicy.build("127.0.0.1", api_keys=[TOKEN]),
                        control_token=TOKEN,
                        ping_interval_s=0.1,
                    )
                )
            ).url
            for name, engine in self.engines.items()
        }
        self._controller = contextlib.ExitStack()
        stack.callback(self.stop)
        self._port = 0
        self.start()

    def start(self) -> None:
        """At the same port as before."""
        policy = AccessPolicy.build("127.0.0.1", control_token=TOKEN, **self._policy)
        server: RunningServer = self._controller.enter_context(
            serving(
                lambda: create_controller_app(
                    self.registry, control_token=TOKEN, policy=policy, conversations=self.store
                ),
                port=self._port,
            )
        )
        self._port, self.url = server.port, server.url
        for name in self.engines:
            self.ready(name)

    def stop(self) -> None:
        """As if it were killed: streams are cut."""
        self._controller.close()

    def reset(self) -> None:
        """As at the beginning."""
        for kept in self.store.summaries(b"") if self.store is not None else ():
            self.store.delete(b"", kept["id"])
        for name, engine in self.engines.items():
            engine.reply = lambda _prompt: Reply()
            engine.prompts.clear()
            self.ready(name)

    def ready(self, name: str) -> None:
        self._register(
            name, "ready", [ModelCard(name=name, created=1, context_length=CONTEXT_LENGTH)]
        )

    def loading(self, name: str, loaded_bytes: int, total_bytes: int) -> None:
        self._register(name, "loading", [], loaded_bytes=loaded_bytes, total_bytes=total_bytes)

    def _register(self, name: str, state: Any, cards: list[ModelCard], **fields: Any) -> None:
        if not cards:
            cards = [ModelCard(name=name, created=1)]
        status = WorkerStatus(state=state, models=cards, **fields)
        self.registry.register(name, self._workers[name], status)

    def answers(self, *replies: Reply, model: str = "alpha") -> None:
        """To questions in this order; the last is for all that follow."""
        queue = list(replies)
        self.engines[model].reply = lambda _: queue.pop(0) if len(queue) > 1 else queue[0]


@contextlib.contextmanager
def house(folder: Path, *names: str, **options: Any) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        yield House(stack, folder, names or ("alpha", "beta"), **options)
