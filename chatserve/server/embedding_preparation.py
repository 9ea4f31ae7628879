"""From the bytes of a request to prompts whose hidden states are pooled: the CPU work before it.

Pure and synchronous, to be run off the event loop. Knows no engine and no reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from chatserve.engine.reward import Reward
from chatserve.engine.sequence import LoadedAdapter, SamplingParams
from chatserve.engine.tokenization import MAX_BYTES_PER_TOKEN
from chatserve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from chatserve.protocol.embeddings import (
    PooledRequest,
    ScoreRequest,
    parse_embeddings,
    parse_score,
)
from chatserve.protocol.fields import Priority
from chatserve.server.adapted import find_adapter
from chatserve.server.contract import ServedModel
from chatserve.server.embedding_replies import Vector, cosine
from chatserve.server.rating import RATING, check_length, check_text, rated_ids, sigmoid

Input = TypeVar("Input", str, str | list[int])


@dataclass(frozen=True)
class Pooled:
    """Prompts to be pooled. `num_dropped`: tokens that were cut off; None where nobody asked."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    adapter: LoadedAdapter | None
    num_dropped: int | None
    priority: Priority = "interactive"

    @property
    def usage(self) -> dict[str, int]:
        """What is computed, and what is not because it was to be cut off."""
        num_tokens = sum(map(len, self.prompts))
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        if self.num_dropped is not None:
            usage["prompt_tokens_dropped"] = self.num_dropped
        return usage


@dataclass(frozen=True)
class PreparedEmbeddings:
    """`num_dimensions`: so many of each vector, the first; None: all."""

    pooled: Pooled
    num_dimensions: int | None
    is_base64: bool


@dataclass(frozen=True)
class PreparedScore:
    """`pairs`: places of two texts among the prompts, where each text is once."""

    pooled: Pooled
    pairs: Sequence[tuple[int, int]]
    shares_beginning: ClassVar[bool] = False

    def scores(self, vectors: Sequence[Vector]) -> list[float]:
        """The cosines of the pairs."""
        return [cosine(vectors[a], vectors[b]) for a, b in self.pairs]


@dataclass(frozen=True)
class PreparedRating:
    """Pairs for a reward model: `places` of each among the prompts. `is_activated`: a score is to
    be from 0 to 1. `shares_beginning`: all answer one question."""

    pooled: Pooled
    places: Sequence[int]
    reward: Reward
    is_activated: bool
    shares_beginning: bool

    def scores(self, vectors: Sequence[Vector]) -> list[float]:
        """What the reward model says of the pairs."""
        scores = [self.reward.score(vectors[place]) for place in self.places]
        return list(map(sigmoid, scores)) if self.is_activated else scores


def prepare_embeddings(body: bytes, model: ServedModel) -> PreparedEmbeddings:
    """Raises `InvalidRequest` and its children, `ModelNotFound`."""
    request = parse_embeddings(body)
    adapter = find_adapter(model, request.model)
    if request.dimensions is not None and request.dimensions > model.hidden_size:
        raise InvalidRequest(
            f"dimensions is {request.dimensions:,}, the vectors of {model.names[0]} have "
            f"{model.hidden_size:,}; ask for at most so many",
            param="dimensions",
        )
    pooled = _pooled(request, model, adapter, _named("input", request.input))
    return PreparedEmbeddings(pooled, request.dimensions, request.encoding_format == "base64")


def prepare_score(body: bytes, model: ServedModel) -> PreparedScore | PreparedRating:
    """Raises as `prepare_embeddings` does."""
    request = parse_score(body)
    adapter = find_adapter(model, request.model)
    if adapter is not None and adapter.reward is not None:
        return _rated(request, model, adapter, adapter.reward)
    if request.use_activation:
        raise UnsupportedParameter(
            f"use_activation is for reward models; the scores of {request.model} are cosines, from "
            "-1 to 1: leave it out",
            param="use_activation",
        )
    texts: dict[str, str] = {}
    for name, each in (("text_1", request.text_1), ("text_2", request.text_2)):
        for where, text in _named(name, each).items():
            texts.setdefault(text, where)
    places = {text: index for index, text in enumerate(texts)}
    pairs = [(places[a], places[b]) for a, b in _pairs(request)]
    named = {where: text for text, where in texts.items()}
    return PreparedScore(_pooled(request, model, adapter, named), pairs)


def _pairs(request: ScoreRequest) -> list[tuple[str, str]]:
    left = request.text_1 * (len(request.text_2) if len(request.text_1) == 1 else 1)
    return list(zip(left, request.text_2, strict=True))


def _rated(
    request: ScoreRequest, model: ServedModel, adapter: LoadedAdapter, reward: Reward
) -> PreparedRating:
    """Questions with their answers; what stands there twice is computed once."""
    for name in ("truncate_prompt_tokens", "pooling"):
        if getattr(request, name) is not None:
            raise UnsupportedParameter(
                f"{name} is for embeddings; {request.model} is a reward model, which rates whole "
                "texts by their last token: leave it out",
                param=name,
            )
    prompts: dict[tuple[int, ...], int] = {}
    places = []
    for where, pair in zip(_named("text_2", request.text_2), _pairs(request), strict=True):
        text, what = reward.text(*pair), f"{where} with its question"
        check_text(text, model, what, "text_2")
        ids = rated_ids(model, reward, text)
        check_length(ids, model, what, "text_2")
        places.append(prompts.setdefault(ids, len(prompts)))
    pooled = Pooled(
        request.model, tuple(prompts), RATING, adapter, None, request.priority or "interactive"
    )
    return PreparedRating(
        pooled, places, reward, bool(request.use_activation), len(request.text_1) == 1
    )


def _named(name: str, inputs: Sequence[Input]) -> dict[str, Input]:
    """Each input by how a message calls it."""
    if len(inputs) == 1:
        return {name: inputs[0]}
    return {f"{name}[{index}]": each for index, each in enumerate(inputs)}


def _pooled(
    request: PooledRequest,
    model: ServedModel,
    adapter: LoadedAdapter | None,
    inputs: Mapping[str, Input],
) -> Pooled:
    limit = request.truncate_prompt_tokens
    if limit == 0 or (limit or 0) > model.context_length:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {limit:,}; it must be 1 to {model.context_length:,}, or "
            "-1 for as many as the model holds",
            param="truncate_prompt_tokens",
        )
    kept = model.context_length if limit == -1 else limit
    prompts = []
    num_dropped = 0
    for where, each in inputs.items():
        ids = _ids(each, where, model, is_cut=kept is not None)
        if kept is None and len(ids) > model.context_length:
            raise ContextLengthExceeded(
                f"{where} has {len(ids):,} tokens, {model.names[0]} holds "
                f"{model.context_length:,}; shorten it, or cut it with truncate_prompt_tokens",
                param=_param(where),
            )
        prompts.append(_cut(ids, kept, _num_ending(each, model)))
        num_dropped += len(ids) - len(prompts[-1])
    if request.pooling == "cls" and not model.is_encoder:
        raise UnsupportedParameter(
            f"pooling cls is for encoders: the first token of {model.names[0]}, which reads from "
            "left to right, has seen nothing else; use mean or last",
            param="pooling",
        )
    params = SamplingParams(max_tokens=0, pooling=request.pooling or model.pooling)
    return Pooled(
        request.model, tuple(prompts), params, adapter, None if kept is None else num_dropped,
        request.priority or "interactive",
    )  # fmt: skip


def _num_ending(each: str | list[int], model: ServedModel) -> int:
    return model.tokenization.num_ending if isinstance(each, str) else 0


def _cut(ids: list[int], kept: int | None, num_ending: int) -> tuple[int, ...]:
    """The first so many; what ends each text stays at its end."""
    if kept is None or len(ids) <= kept or num_ending >= kept:
        return tuple(ids[:kept])
    return (*ids[: kept - num_ending], *ids[len(ids) - num_ending :])


def _ids(each: str | list[int], where: str, model: ServedModel, *, is_cut: bool) -> list[int]:
    if isinstance(each, str):
        # cheaper than the tokenizer, whose time grows with the text
        num_bytes = len(each.encode())
        if not is_cut and num_bytes > model.context_length * MAX_BYTES_PER_TOKEN:
            raise ContextLengthExceeded(
                f"{where} has {num_bytes:,} bytes, which cannot fit into the "
                f"{model.context_length:,} tokens of {model.names[0]}; shorten it, or cut it with "
                "truncate_prompt_tokens",
                param=_param(where),
            )
        each = model.tokenization.of_embedded(each)
        if not each:
            raise InvalidRequest(f"{where} has no tokens; send some text", param=_param(where))
    for token_id in (min(each), max(each)):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"{where}: there is no token {token_id}, the vocabulary has {model.vocab_size:,}",
                param=_param(where),
            )
    return each


def _param(where: str) -> str:
    """The field that a place is in."""
    return where.partition("[")[0]
