"""Mixed requests by seed: streams and whole answers of every API, some cancelled, some bad."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from tests.faults.client import CHAT, Request
from tests.faults.engine import Script
from tests.faults.house import MODEL

_BAD: tuple[Any, ...] = (
    b"{", b"[]", b"\xff", {}, {"model": MODEL}, {"model": MODEL, "messages": []},
    {"model": "other", "messages": [{"role": "user", "content": "x"}]},
    *({"model": MODEL, "messages": [{"role": "user", "content": "x"}], **wrong} for wrong in (
        {"temperature": 5}, {"n": 0}, {"n": 9}, {"max_tokens": -1}, {"stop": ["x"] * 99},
        {"logit_bias": {"x": 1}}, {"unheard_of": 1}, {"stream": "yes"},
    )),
)  # fmt: skip


class Traffic:
    """Request after request; the same for the same seed.

    `cancelled` and `bad` are shares. Scripts say `say` tokens, one every `step_s`.
    """

    def __init__(
        self,
        seed: int | str,
        *,
        cancelled: float = 0.2,
        bad: float = 0.05,
        say: int = 8,
        step_s: float = 0.0,
    ) -> None:
        self._choose = random.Random(seed)
        self._cancelled = cancelled
        self._bad = bad
        self._say = say
        self._step_s = step_s
        self._count = 0

    def take(self, number: int) -> Iterator[Request]:
        return (self.draw() for _ in range(number))

    def draw(self) -> Request:
        choose = self._choose
        self._count += 1
        if choose.random() < self._bad:
            return Request(choose.choice(_BAD), CHAT, is_bad=True)
        kind = choose.choices(
            (self._chat, self._completion, self._message, self._response), (6, 2, 1, 1)
        )[0]
        script = Script(f"r{self._count}", choose.randint(1, 2 * self._say), self._step_s)
        is_stream = choose.random() < 0.7
        request = kind(script, is_stream)
        if choose.random() < self._cancelled:
            most = script.say if is_stream else 0
            return dataclasses.replace(request, cancel_after=choose.randint(0, most))
        return request

    def _chat(self, script: Script, is_stream: bool) -> Request:
        messages = [{"role": "user", "content": script.prompt}]
        body = {"messages": messages, **_stream(is_stream)}
        return Request({"model": MODEL, **body}, CHAT, script.text(), script.say)

    def _completion(self, script: Script, is_stream: bool) -> Request:
        body = {"prompt": script.prompt, "max_tokens": script.say, **_stream(is_stream)}
        return Request({"model": MODEL, **body}, "/v1/completions", script.text(), script.say)

    def _message(self, script: Script, is_stream: bool) -> Request:
        messages = [{"role": "user", "content": script.prompt}]
        body = {"max_tokens": 1000, "messages": messages, "stream": is_stream}
        return Request({"model": MODEL, **body}, "/v1/messages", script.text())

    def _response(self, script: Script, is_stream: bool) -> Request:
        body = {"input": script.prompt, "stream": is_stream, "store": self._choose.random() < 0.5}
        return Request({"model": MODEL, **body}, "/v1/responses", script.text())


def _stream(is_stream: bool) -> dict[str, Any]:
    options = {"stream_options": {"include_usage": True}} if is_stream else {}
    return {"stream": is_stream, **options}
