"""From bytes to prompt ids and sampling params."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.engine.sequence import SamplingParams
from chatserve.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from chatserve.server.preparation import Prepared, prepare_chat, prepare_completion
from tests.fakes import FakeModel


def chat(served: FakeModel | None = None, /, **fields: Any) -> Prepared:
    messages = [{"role": "user", "content": "hi"}]
    body = json.dumps({"model": "fake", "messages": messages, **fields}).encode()
    return prepare_chat(body, served or FakeModel())


def completion(served: FakeModel | None = None, /, **fields: Any) -> Prepared:
    body = json.dumps({"model": "fake", "prompt": "hi", **fields}).encode()
    return prepare_completion(body, served or FakeModel())


def test_chat_gets_the_rest_of_the_context_and_the_templates_stops() -> None:
    prepared = chat(stop=["END"])
    [prompt] = prepared.prompts
    assert bytes(prompt.ids) == b"<user>hi"
    assert prompt.params == SamplingParams(
        max_tokens=1000 - 8, stop=("END", "</s>"), stop_token_ids=(7,)
    )
    assert prepared.is_chat and prepared.strip_leading_space
    assert prepared.num_prompt_tokens == 8


def test_completion_gets_16_tokens_and_only_its_own_stops() -> None:
    prepared = completion(stop="END")
    [prompt] = prepared.prompts
    assert bytes(prompt.ids) == b"hi"
    assert prompt.params == SamplingParams(max_tokens=16, stop=("END",), stop_token_ids=(7,))
    assert not prepared.is_chat and not prepared.strip_leading_space


def test_completion_near_the_end_of_the_context() -> None:
    assert completion(FakeModel(context_length=10)).prompts[0].params.max_tokens == 8
    assert completion(max_tokens=20).prompts[0].params.max_tokens == 20


def test_every_sampling_field_arrives() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": -5, "max_tokens": 12,
    }  # fmt: skip
    params = chat(**fields, logit_bias={"3": -1}).prompts[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {3: -1.0}


def test_what_does_not_fit_names_the_way_to_make_it_fit() -> None:
    turn, model = {"role": "user", "content": "x" * 8}, FakeModel(context_length=20)
    way_out = ', or drop the oldest turns with truncation: "rolling"'

    def message(*turns: Any, **fields: Any) -> str:
        with pytest.raises(ContextLengthExceeded) as caught:
            chat(model, messages=turns, **fields)
        return caught.value.message

    assert message(turn, turn).endswith(way_out)
    short = {"role": "user", "content": "x"}
    assert message(short, short, max_tokens=19).endswith(way_out)
    assert "truncation" not in message({"role": "user", "content": "x" * 30})
    assert "truncation" not in message(turn, turn, max_tokens=19, truncation="rolling")


def test_min_tokens_and_endless_answers() -> None:
    params = chat(min_tokens=5, max_tokens=5, ignore_eos=True).prompts[0].params
    assert (params.min_tokens, params.ignore_eos, params.stop_token_ids) == (5, True, ())
    with pytest.raises(InvalidRequest, match=r"min_tokens is 6, .* 5 tokens") as caught:
        chat(min_tokens=6, max_tokens=5)
    assert caught.value.param == "min_tokens"


def test_an_answer_that_has_begun_keeps_its_spaces() -> None:
    prepared = chat(continue_final_message=True)
    assert bytes(prepared.prompts[0].ids) == b"<user>hi..." and not prepared.strip_leading_space


def test_stop_tokens_join_those_of_the_model() -> None:
    assert chat(stop_token_ids=[5]).prompts[0].params.stop_token_ids == (5, 7)
    assert chat(stop_token_ids=[255], ignore_eos=True).prompts[0].params.stop_token_ids == (255,)
    with pytest.raises(InvalidRequest, match="there is no token 256") as caught:
        chat(stop_token_ids=[0, 256])
    assert caught.value.param == "stop_token_ids"


def test_a_prompt_that_is_only_scored_may_fill_the_context() -> None:
    model = FakeModel(context_length=4)
    assert completion(model, prompt="full", max_tokens=0).prompts[0].params.max_tokens == 0
    with pytest.raises(ContextLengthExceeded):
        completion(model, prompt="full")


def test_logprobs_of_a_chat() -> None:
    prepared = chat(logprobs=True, top_logprobs=3)
    assert prepared.shows_logprobs and prepared.prompts[0].params.logprobs == 3
    assert not chat(logprobs=False).shows_logprobs
    assert chat().prompts[0].params.logprobs is None


def test_logprobs_of_a_completion() -> None:
    prepared = completion(logprobs=0)
    assert prepared.shows_logprobs and not prepared.is_echo
    params = prepared.prompts[0].params
    assert (params.logprobs, params.prompt_logprobs) == (0, None)


def test_a_prompt_is_scored_where_it_is_echoed() -> None:
    prepared = completion(prompt=["hü", [104, 105]], echo=True, logprobs=2, max_tokens=0)
    assert prepared.is_echo and [prompt.text for prompt in prepared.prompts] == ["hü", "hi"]
    params = prepared.prompts[0].params
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (0, 2, 2)
    assert completion(echo=True).prompts[0].params.prompt_logprobs is None


def test_scores_of_long_prompts_have_a_limit() -> None:
    model = FakeModel(context_length=10**6)
    fields: dict[str, Any] = {"prompt": ["x" * 2**14] * 64, "echo": True, "max_tokens": 0}
    assert len(completion(model, **fields, logprobs=0).prompts) == 64
    with pytest.raises(InvalidRequest, match=r"1,048,576 echoed tokens are 2,097,152") as caught:
        completion(model, **fields, logprobs=1)
    assert caught.value.param == "logprobs"
    completion(model, **{**fields, "echo": False}, logprobs=1)


def test_the_best_are_chosen_by_logprobs_that_are_not_shown() -> None:
    prepared = completion(n=2, best_of=3)
    assert (prepared.num_choices, prepared.num_dropped) == (3, 1)
    assert prepared.prompts[0].params.logprobs == 0 and not prepared.shows_logprobs
    assert completion(n=3, best_of=3).prompts[0].params.logprobs is None


def test_top_k_of_minus_one_is_off() -> None:
    assert chat(top_k=-1).prompts[0].params.top_k == 0


def test_models_defaults_fill_what_is_left_out() -> None:
    model = FakeModel(defaults={"temperature": 0.6, "top_k": 20.0})
    params = chat(model, top_k=None).prompts[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 1.0)
    assert chat(model, temperature=0, top_k=0).prompts[0].params.temperature == 0


def test_several_prompts() -> None:
    prepared = completion(prompt=["a", "bc"], n=2)
    assert [bytes(prompt.ids) for prompt in prepared.prompts] == [b"a", b"bc"]
    assert prepared.num_choices == 2 and prepared.num_prompt_tokens == 3
    assert completion(prompt=[[1, 2], [3]]).prompts[1].ids == (3,)


def test_other_model() -> None:
    with pytest.raises(ModelNotFound, match="a, b") as caught:
        chat(FakeModel(names=("a", "b")), model="c")
    assert caught.value.param == "model"
    assert chat(FakeModel(names=("a", "b")), model="b").model == "b"


@pytest.mark.parametrize("ids", [[256], [-1], [0, 1, 10**12]])
def test_ids_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="256") as caught:
        completion(prompt=ids)
    assert caught.value.param == "prompt"


def test_bias_outside_the_vocabulary() -> None:
    assert chat(logit_bias={"255": 1}).prompts[0].params.logit_bias == {255: 1.0}
    with pytest.raises(InvalidRequest, match="no token 256") as caught:
        chat(logit_bias={"256": 1})
    assert caught.value.param == "logit_bias.256"


def test_empty_prompt() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        completion(prompt="")


class Untouched(FakeModel):
    """A model whose tokenizer must not be asked."""

    @property
    def prompts(self) -> Any:
        raise AssertionError("tokenised")


def test_hopelessly_long_prompt_is_refused_before_it_is_tokenised() -> None:
    model = Untouched(context_length=10)
    with pytest.raises(ContextLengthExceeded, match=r"161 bytes.* 10 tokens"):
        completion(model, prompt="x" * 161)
    with pytest.raises(ContextLengthExceeded):
        chat(model, messages=[{"role": "user", "content": "ü" * 81}])
    with pytest.raises(AssertionError, match="tokenised"):
        completion(model, prompt="x" * 160)
