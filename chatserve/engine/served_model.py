"""ServedModel: what a server needs to know of a model that has been loaded. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatserve.engine.adapters import Adapters
from chatserve.engine.grammar import Grammars
from chatserve.engine.no_answers import NoAnswers
from chatserve.engine.prompt import PromptBuilder
from chatserve.engine.sequence import Pooling
from chatserve.engine.tokenization import Tokenization
from chatserve.models.templates.render_process import RenderProcess
from chatserve.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """See `chatserve.server.contract`."""

    names: Sequence[str]
    context_length: int
    vocab_size: int
    prompts: PromptBuilder | NoAnswers
    hidden_size: int
    pooling: Pooling
    tokenization: Tokenization
    tokenizer: Tokenizer
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    strip_leading_space: bool
    fingerprint: str
    description: Mapping[str, Any]
    defaults: Mapping[str, float]
    adapters: Adapters
    grammars: Grammars | None = None
    renderer: RenderProcess | None = None
    is_encoder: bool = False
