"""An answer as JSON: one object when it is over, and before it a line for each of its pieces.

Knows answers, errors and a text stream; no server, no terminal. All but ASCII is escaped: no
encoding of a pipe and no terminal can make anything else of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from chatserve.cli.answer import Answer
from chatserve.errors import ChatserveError

INTERRUPTED = "interrupted"


class JsonAnswer:
    """Prints one answer, however it ends; draws its pieces where they are wanted."""

    def __init__(self, out: TextIO, *, has_pieces: bool) -> None:
        self._out = out
        self._has_pieces = has_pieces
        self.answer = Answer()
        self.model: str | None = None

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Print the object at the end; of a failure, too, which goes on its way then."""
        try:
            yield
        except BrokenPipeError:
            raise  # nobody is there to read it
        except ChatserveError as failure:
            error = {"code": failure.code, "message": failure.message, "param": failure.param}
            self._print_end(error)
            raise
        except (KeyboardInterrupt, SystemExit):
            self._print_end({"code": INTERRUPTED, "message": "interrupted", "param": None})
            raise
        else:
            self._print_end(None)

    def begin(self, status: Callable[[], str] | None = None) -> None:
        """Nothing stands before the pieces."""

    def draw(self, text: str) -> None:
        if text and self._has_pieces:
            self._print({"delta": text})

    def think(self, text: str) -> None:
        """What the model thinks apart of its answer."""
        if self._has_pieces:
            self._print({"reasoning_delta": text})

    def end(self) -> None:
        """The object comes when it is known how all has ended."""

    def _print_end(self, error: dict[str, Any] | None) -> None:
        answer = self.answer
        self._print({
            "text": answer.text, "reasoning": answer.reasoning or None, "model": self.model,
            "finish_reason": answer.finish_reason, "usage": _usage(answer),
            "timings": _timings(answer), "error": error,
        })  # fmt: skip

    def _print(self, table: dict[str, Any]) -> None:
        self._out.write(json.dumps(table) + "\n")
        self._out.flush()


def _usage(answer: Answer) -> dict[str, Any] | None:
    """OpenAI's; None where the server has counted nothing."""
    if answer.num_prompt_tokens is None:
        return None
    num_tokens = answer.num_tokens or 0
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": answer.num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached_tokens},
    }


def _timings(answer: Answer) -> dict[str, float | None]:
    total_s = None
    if answer.asked_at is not None and answer.last_token_at is not None:
        total_s = answer.last_token_at - answer.asked_at
    times = {"ttft_s": answer.ttft_s, "total_s": total_s, "tokens_per_s": answer.tokens_per_s}
    return {name: None if value is None else round(value, 6) for name, value in times.items()}
