"""What the engine asks of a grammar: which tokens may come next. No parser, no schema, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GrammarOrigin:
    """What a grammar is compiled from, of the spec of a request; again, it gives the same masks.

    `after_space`: answers begin with a space that is taken away before anybody sees it.
    """

    kind: str
    source: str
    after_space: bool = False


class Matcher(Protocol):
    """How far one answer has come in a grammar. For one thread at a time."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        ...

    def fill_mask(self, words: NDArray[np.uint32]) -> None:
        """Set bit i of word w where token 32 * w + i may come next, and clear the others.

        End tokens are set where the answer may end. Called in a thread while the network computes.
        Raises `GenerationFailed`.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Go on behind `token_id`. Raises `GenerationFailed` for one that the mask ruled out."""
        ...


class Grammar(Protocol):
    """Compiled, and shared by all answers that must match it. Safe to use from any thread."""

    @property
    def origin(self) -> GrammarOrigin: ...
    def matcher(self) -> Matcher:
        """One at the beginning of an answer."""
        ...


class GrammarSpec(Protocol):
    """What a request says that an answer must match; `param` is where it says so."""

    @property
    def kind(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def param(self) -> str: ...


class Grammars(Protocol):
    """Compiles what requests say, for one model; may take seconds."""

    async def compile(
        self, spec: GrammarSpec, *, after_space: bool = False, salt: bytes = b""
    ) -> Grammar:
        """`after_space`: answers begin with a space that is taken away before anybody sees it.

        `salt`: whose request it is. Cancelled, it compiles nothing that nobody else waits for.
        Raises `InvalidRequest` naming `spec.param`, `Overloaded`.
        """
        ...

    def prepare(self) -> None:
        """Do what the first of them would have to: it holds up every thread for a moment."""
        ...

    def close(self) -> None:
        """Let go of what compiling needs. What is being compiled fails."""
        ...
