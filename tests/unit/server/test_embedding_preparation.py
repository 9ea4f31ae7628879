"""From bytes to prompts that are pooled: nothing is cut unasked, limits at -1, 0, max, max + 1."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from chatserve.engine.sequence import SamplingParams
from chatserve.engine.tokenization import MAX_BYTES_PER_TOKEN
from chatserve.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    UnsupportedParameter,
)
from chatserve.server.embedding_preparation import (
    Pooled,
    PreparedEmbeddings,
    PreparedScore,
    prepare_embeddings,
    prepare_score,
)
from tests.fakes import FakeAdapters, FakeModel, FakeTokenization

CONTEXT = 20
MODEL = FakeModel(context_length=CONTEXT)  # a text's bytes are its tokens, behind a 0


def prepared(served: FakeModel = MODEL, **fields: Any) -> PreparedEmbeddings:
    return prepare_embeddings(json.dumps({"model": "fake", **fields}).encode(), served)


def pooled(served: FakeModel = MODEL, **fields: Any) -> Pooled:
    return prepared(served, **fields).pooled


def test_texts_get_what_begins_a_prompt_and_ids_are_left_alone() -> None:
    found = pooled(input=["hi", [104, 105]])
    assert found.prompts == ((0, 104, 105), (104, 105))
    assert found.params == SamplingParams(max_tokens=0, pooling="mean")
    assert found.usage == {"prompt_tokens": 5, "total_tokens": 5}


def test_the_models_pooling_unless_another_is_asked_for() -> None:
    last = replace(MODEL, pooling="last")
    assert pooled(last, input="hi").params.pooling == "last"
    assert pooled(last, input="hi", pooling="mean").params.pooling == "mean"


def test_cls_is_for_encoders() -> None:
    with pytest.raises(UnsupportedParameter, match="pooling cls is for encoders") as caught:
        pooled(input="hi", pooling="cls")
    assert caught.value.param == "pooling"
    encoder = replace(MODEL, is_encoder=True)
    assert pooled(encoder, input="hi", pooling="cls").params.pooling == "cls"


def test_an_adapter() -> None:
    model = replace(MODEL, adapters=FakeAdapters("hat"))
    found = pooled(model, model="fake:hat", input="hi").adapter
    assert found is not None and found.name == "hat"
    with pytest.raises(ModelNotFound):
        pooled(model, model="fake:cap", input="hi")


def test_inputs_fill_the_context_and_no_more() -> None:
    assert len(pooled(input=[1] * CONTEXT).prompts[0]) == CONTEXT
    with pytest.raises(ContextLengthExceeded, match=r"input\[1\] has 21 tokens, fake holds 20"):
        pooled(input=[[1], [1] * (CONTEXT + 1)])


def test_a_text_that_cannot_fit_is_not_even_tokenized() -> None:
    with pytest.raises(ContextLengthExceeded, match="bytes, which cannot fit"):
        pooled(input="a" * (CONTEXT * MAX_BYTES_PER_TOKEN + 1))


@pytest.mark.parametrize(("limit", "kept"), [(-1, 20), (1, 1), (20, 20)])
def test_truncation_keeps_the_beginning_and_says_so(limit: int, kept: int) -> None:
    found = pooled(input=[list(range(30)), list(range(10, 20))], truncate_prompt_tokens=limit)
    assert found.prompts == (tuple(range(kept)), tuple(range(10, 20))[:kept])
    num_kept = kept + min(kept, 10)
    assert found.usage == {
        "prompt_tokens": num_kept, "total_tokens": num_kept, "prompt_tokens_dropped": 40 - num_kept,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, (0,)), (2, (0, 7)), (3, (0, 104, 7)), (4, (0, 104, 105, 7))]
)
def test_what_ends_a_text_stays_at_its_end(limit: int, kept: tuple[int, ...]) -> None:
    class Ending(FakeTokenization):
        num_ending = 1

        def of_embedded(self, text: str) -> list[int]:
            return [*self.of_text(text), 7]

    class Served(FakeModel):
        @property
        def tokenization(self) -> FakeTokenization:
            return Ending(self.prompts)

    found = pooled(Served(context_length=CONTEXT), input="hi", truncate_prompt_tokens=limit)
    assert found.prompts == (kept,)
    assert found.num_dropped == 4 - limit
    # ids are taken as they are
    ids = pooled(Served(context_length=CONTEXT), input=[[1, 2, 7]], truncate_prompt_tokens=2)
    assert ids.prompts == ((1, 2),)


def test_truncation_that_cuts_nothing_says_so_too() -> None:
    assert pooled(input="hi", truncate_prompt_tokens=-1).usage["prompt_tokens_dropped"] == 0


def test_a_long_text_may_be_cut() -> None:
    text = "a" * (CONTEXT * MAX_BYTES_PER_TOKEN + 1)
    assert len(pooled(input=text, truncate_prompt_tokens=-1).prompts[0]) == CONTEXT


@pytest.mark.parametrize("limit", [0, CONTEXT + 1])
def test_truncation_to_nothing_or_to_more_than_there_is(limit: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pooled(input="hi", truncate_prompt_tokens=limit)
    assert caught.value.param == "truncate_prompt_tokens"


def test_dimensions() -> None:
    assert prepared(input="a", dimensions=1).num_dimensions == 1
    assert prepared(input="a", dimensions=MODEL.hidden_size).num_dimensions == MODEL.hidden_size
    assert prepared(input="a").num_dimensions is None
    with pytest.raises(InvalidRequest, match="vectors of fake have 4") as caught:
        prepared(input="a", dimensions=MODEL.hidden_size + 1)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize("token_id", [-1, MODEL.vocab_size])
def test_ids_outside_the_vocabulary(token_id: int) -> None:
    with pytest.raises(InvalidRequest, match=f"no token {token_id}") as caught:
        pooled(input=[0, MODEL.vocab_size - 1, token_id])
    assert caught.value.param == "input"


def test_each_text_of_a_score_is_computed_once() -> None:
    body = {"model": "fake", "text_1": "a", "text_2": ["b", "a", "b"]}
    found = prepare_score(json.dumps(body).encode(), MODEL)
    assert isinstance(found, PreparedScore)
    assert found.pooled.prompts == ((0, 97), (0, 98))
    assert found.pairs == [(0, 1), (0, 0), (0, 1)]


def test_texts_one_to_one() -> None:
    body = {"model": "fake", "text_1": ["a", "b"], "text_2": ["c", "a"]}
    found = prepare_score(json.dumps(body).encode(), MODEL)
    assert isinstance(found, PreparedScore) and found.pairs == [(0, 2), (1, 0)]


def test_a_text_of_a_score_that_is_too_long_is_named() -> None:
    body = {"model": "fake", "text_1": "a", "text_2": ["b", "c" * CONTEXT]}
    with pytest.raises(ContextLengthExceeded, match=r"text_2\[1\] has 21 tokens") as caught:
        prepare_score(json.dumps(body).encode(), MODEL)
    assert caught.value.param == "text_2"
