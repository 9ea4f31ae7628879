"""The prompts of a model that reads texts and writes none: all are refused. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from chatserve.engine.rolling import Rolled
from chatserve.errors import UnsupportedParameter
from chatserve.models.tool_format import ToolFormat


class NoAnswers:
    """In the place of a `PromptBuilder`. All of it raises `UnsupportedParameter`."""

    def __init__(self, model_name: str, why: str) -> None:
        """`why`: the model has no answers, as in "has no head"."""
        self.stop: tuple[str, ...] = ()
        self.stop_token_ids: tuple[int, ...] = ()
        self._message = (
            f"{model_name} {why}, so it writes no answers; it is served for /v1/embeddings and "
            "/v1/score: send it there, or ask another model"
        )

    @property
    def tool_format(self) -> ToolFormat:
        self._refuse()

    @property
    def tool_control_id(self) -> int | None:
        self._refuse()

    @property
    def tool_marks(self) -> Mapping[str, int]:
        self._refuse()

    def chat(self, messages: Sequence[Any], *, is_open: bool = False, tools: Any = ()) -> list[int]:
        self._refuse()

    def chat_ids(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool = True,
        is_open: bool = False,
        tools: Any = (),
    ) -> list[int]:
        self._refuse()

    def rolling_chat(
        self,
        messages: Sequence[Any],
        asked: int | None,
        *,
        is_open: bool = False,
        tools: Any = (),
    ) -> Rolled:
        self._refuse()

    def completion(self, prompt: str | Sequence[int], *, is_answered: bool = True) -> list[int]:
        self._refuse()

    def max_tokens(self, num_prompt_tokens: int, asked: int | None) -> int:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedParameter(self._message, param="model")
