"""A request gets the answer in a busy batch that it gets alone, and tells the truth about it.

The real engine on a tiny random model, judged by the official client and by transformers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from chatserve.config import WorkerConfig
from chatserve.engine.serving import load
from chatserve.server.edge import Edge
from chatserve.server.logprobs import completion_token
from chatserve.server.worker import create_worker_app
from tests import tiny
from tests.servers import serving

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
TEXT = "The quick brown fox"
ENDLESS = {"ignore_eos": True}
# the tiny model's letters: what is said is text, and ids and text are one
LETTERS = {str(id_): -100 for id_ in range(259) if not 64 <= id_ < 90}
TOLERANCE = 1e-3


@dataclass(frozen=True)
class House:
    """A worker's address, and the same network in transformers with the ids of its tokens."""

    url: str
    judge: Any
    prompt_ids: Sequence[int]
    ids: dict[str, int]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """(T - 1, V): of the token behind each."""
        with torch.no_grad():
            logits = self.judge(torch.tensor([ids])).logits[0, :-1]
        return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("tiny")
    judge = tiny.save_model(folder, vocab_size=256 + len(tiny.SPECIALS))
    config = WorkerConfig(
        weights=str(folder), device="cpu", dtype="float32", model_names=("tiny",),
        max_num_seqs=6, max_num_batched_tokens=64, self_check=False,
    )  # fmt: skip
    engine, model = load(config)

    def build() -> Edge:
        engine.start()
        return create_worker_app(engine, model)

    with serving(build) as server:
        ids = {completion_token(model.tokenizer, id_): id_ for id_ in range(model.vocab_size)}
        yield House(f"{server.url}/v1", judge, model.prompts.completion(TEXT), ids)
        server.call(engine.stop())


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[openai.OpenAI]:
    with house.client() as client:
        yield client


# each with a sampler of its own; what is common to all is put in by `body_of`
CHATS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 1, "n": 3},
    {"seed": 2, "temperature": 0.5, "logprobs": True},
    {"seed": 3, "top_p": 0.8, "logprobs": True, "top_logprobs": 5},
    {"seed": 4, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"seed": 5, "logit_bias": {"65": 5, "66": -100}, "temperature": 1.8},
    {"seed": 6, "top_k": 7, "logprobs": True, "top_logprobs": 20, "n": 2},
    {"seed": 7, "min_p": 0.1, "repetition_penalty": 1.3},
    {"seed": 8, "stop": ["a", "Z"], "logprobs": True, "top_logprobs": 1},
    {"temperature": 0, "repetition_penalty": 1.5, "logprobs": True, "top_logprobs": 2},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": TEXT, "echo": True, "logprobs": 3, "max_tokens": 0},
    {"prompt": [TEXT, "Other"], "seed": 9, "logprobs": 2, "echo": True},
    {"prompt": [[84, 104], [105] * 70], "seed": 10, "n": 2},
    {"prompt": TEXT, "seed": 11, "n": 2, "best_of": 4},
    {"prompt": TEXT * 4, "seed": 12, "temperature": 0, "logprobs": 0, "stop": "x"},
]
# beyond the official client's own parameters
EXTRA = {"top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens"}


def body_of(fields: dict[str, Any]) -> dict[str, Any]:
    body = {"model": "tiny", "max_tokens": 24, **ENDLESS, **fields}
    body |= {} if "prompt" in fields else {"messages": MESSAGES}
    return {
        **{name: value for name, value in body.items() if name not in EXTRA},
        "extra_body": {name: value for name, value in body.items() if name in EXTRA},
    }


def choices_of(reply: ChatCompletion | Completion) -> list[tuple[str, str, list[float]]]:
    """Text, finish reason and every number of each choice."""
    assert reply.usage is not None
    count = reply.usage.completion_tokens
    told = []
    for choice in reply.choices:
        text = choice.text if isinstance(reply, Completion) else choice.message.content
        told.append((text, f"{choice.finish_reason} {count}", numbers_of(choice.logprobs)))
    return told


def numbers_of(logprobs: Any) -> list[float]:
    if logprobs is None:
        return []
    if hasattr(logprobs, "token_logprobs"):
        tops = [value for top in logprobs.top_logprobs for value in (top or {}).values()]
        return [value or 0.0 for value in logprobs.token_logprobs] + tops
    return [
        value
        for entry in logprobs.content
        for value in (entry.logprob, *(top.logprob for top in entry.top_logprobs))
    ]


def ask(client: openai.OpenAI, fields: dict[str, Any]) -> ChatCompletion | Completion:
    body = body_of(fields)
    if "prompt" in body:
        return client.completions.create(**body)
    return client.chat.completions.create(**body)


async def ask_all(url: str, requests: Sequence[dict[str, Any]]) -> list[Any]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        return await asyncio.gather(
            *(
                client.completions.create(**body)
                if "prompt" in body
                else client.chat.completions.create(**body)
                for body in map(body_of, requests)
            )
        )


def test_a_busy_batch_changes_no_answer(house: House, client: openai.OpenAI) -> None:
    requests = CHATS + COMPLETIONS
    alone = [choices_of(ask(client, request)) for request in requests]
    for order in (requests, requests[::-1]):
        replies = asyncio.run(ask_all(house.url, order))
        together = [choices_of(reply) for reply in replies]
        together = together if order is requests else together[::-1]
        for request, mine, others in zip(requests, alone, together, strict=True):
            for one, other in zip(mine, others, strict=True):
                assert one[:2] == other[:2], request
                assert one[2] == pytest.approx(other[2], abs=TOLERANCE), request
    assert len({text for answer in alone for text, _, _ in answer}) > len(requests)


@pytest.mark.parametrize("fields", CHATS[:10:3] + COMPLETIONS[:3], ids=str)
def test_streamed_equals_whole(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    whole: Any = ask(client, fields)
    body = {**body_of(fields), "stream": True, "stream_options": {"include_usage": True}}
    create = client.completions.create if "prompt" in body else client.chat.completions.create
    *chunks, last = create(**body)
    assert last.usage.to_dict() | {"prompt_tokens_details": None} == (
        whole.usage.to_dict() | {"prompt_tokens_details": None}
    )
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        reasons = [each.finish_reason for each in mine if each.finish_reason]
        assert reasons == [choice.finish_reason]
        logprobs = [each.logprobs for each in mine if each.logprobs]
        if "prompt" in body:
            assert "".join(each.text for each in mine) == choice.text
            told = [token for each in logprobs for token in each.tokens]
            assert told == (choice.logprobs.tokens if choice.logprobs else [])
            offsets = [offset for each in logprobs for offset in each.text_offset]
            assert offsets == (choice.logprobs.text_offset if choice.logprobs else [])
        else:
            text = "".join(each.delta.content or "" for each in mine)
            assert text == choice.message.content
            told = [entry for each in logprobs for entry in each.content]
            assert told == (choice.logprobs.content if choice.logprobs else [])


def test_choices_of_a_request_are_the_ones_of_its_seed(client: openai.OpenAI) -> None:
    one, several = ask(client, CHATS[1]), ask(client, CHATS[2])
    texts = [text for text, _, _ in choices_of(several)]
    assert texts[0] == choices_of(one)[0][0] and len(set(texts)) == 3


# logprobs against transformers


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logprobs_are_those_of_the_distribution(
    house: House, client: openai.OpenAI, temperature: float
) -> None:
    reply = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=8, logprobs=20, seed=3, temperature=temperature,
        extra_body=ENDLESS,
    )  # fmt: skip
    [choice] = reply.choices
    assert choice.logprobs is not None
    ids = [house.ids[token] for token in choice.logprobs.tokens]
    judged = house.logprobs([*house.prompt_ids, *ids])[-len(ids) :]
    judged = (judged / (temperature or 1.0)).log_softmax(-1)
    expected = judged[range(len(ids)), ids].tolist()
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=TOLERANCE)
    for place, tops in enumerate(choice.logprobs.top_logprobs or []):
        likeliest = judged[place].topk(20).values.tolist()
        assert sorted(tops.values(), reverse=True)[:20] == pytest.approx(likeliest, abs=TOLERANCE)
        assert sum(map(math.exp, tops.values())) <= 1 + TOLERANCE
        if temperature == 0:
            assert max(tops.values()) == choice.logprobs.token_logprobs[place]


def test_what_the_filters_keep_adds_up_to_one(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=20, seed=3,
        extra_body={"top_k": 10, **ENDLESS},
    )  # fmt: skip
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 10
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) == pytest.approx(1)
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and entry.logprob in values


def test_bytes_of_a_chats_tokens_are_its_text(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=40, logprobs=True, seed=4,
        logit_bias={str(id_): -100 for id_ in (tiny.BOS_ID, tiny.START_ID, tiny.EOS_ID)},
    )  # fmt: skip
    [choice] = reply.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert reply.usage is not None
    assert len(choice.logprobs.content) == reply.usage.completion_tokens == 40
    raw = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert choice.message.content is not None
    assert raw.decode("utf-8", "replace").startswith(choice.message.content)


# prompts that are scored


def test_a_prompt_is_scored_as_transformers_scores_it(house: House, client: openai.OpenAI) -> None:
    ids = list(house.prompt_ids)
    reply = client.completions.create(
        model="tiny", prompt=[ids, ids[:4]], echo=True, logprobs=2, max_tokens=0, temperature=0.3
    )
    for choice, mine in zip(reply.choices, (ids, ids[:4]), strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.top_logprobs is not None
        assert logprobs.token_logprobs is not None and logprobs.token_logprobs[0] is None
        judged = house.logprobs(mine)
        expected = judged[range(len(mine) - 1), mine[1:]].tolist()
        assert logprobs.token_logprobs[1:] == pytest.approx(expected, abs=TOLERANCE)
        best = judged.max(-1).values.tolist()
        assert [max(top.values()) for top in logprobs.top_logprobs[1:]] == pytest.approx(
            best, abs=TOLERANCE
        )
        assert choice.finish_reason == "length"
    assert reply.choices[0].text == TEXT
    assert reply.usage is not None
    assert (reply.usage.completion_tokens, reply.usage.prompt_tokens) == (0, len(ids) + 4)


def harness_reads(reply: dict[str, Any], num_context: Sequence[int]) -> list[tuple[float, bool]]:
    """What lm-evaluation-harness' `local-completions` makes of an answer: the likelihood of what
    stands behind the context, without the last token, and whether it is the greedy choice."""
    read = []
    for choice, start in zip(
        sorted(reply["choices"], key=lambda each: each["index"]), num_context, strict=True
    ):
        values = choice["logprobs"]["token_logprobs"][start:-1]
        tops = choice["logprobs"]["top_logprobs"][start:-1]
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        read.append((sum(values), is_greedy))
    return read


@pytest.mark.parametrize("as_text", [False, True])
def test_lm_evaluation_harness(house: House, client: openai.OpenAI, as_text: bool) -> None:
    contexts = [list(house.prompt_ids[:6]), list(house.prompt_ids[:9])]
    greedy = house.judge.generate(
        torch.tensor([contexts[1]]), max_new_tokens=3, min_new_tokens=3, do_sample=False
    )[0].tolist()
    rows = [list(house.prompt_ids), greedy]
    payload: dict[str, Any] = {
        "model": "tiny", "prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    if as_text:
        rows = rows[:1]
        payload["prompt"] = TEXT
    reply = client.completions.create(**payload).to_dict()
    for (likelihood, is_greedy), row, context in zip(
        harness_reads(reply, [6, 9][: len(rows)]), rows, contexts, strict=False
    ):
        judged = house.logprobs(row)[len(context) - 1 :]
        behind = row[len(context) :]
        assert likelihood == pytest.approx(
            judged[range(len(behind)), behind].sum().item(), abs=TOLERANCE
        )
        assert is_greedy == (judged.argmax(-1).tolist() == behind)


# where answers end


def test_nothing_ends_an_answer_before_its_least(client: openai.OpenAI) -> None:
    def length(**fields: Any) -> tuple[int, str | None]:
        reply = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=9, seed=1,
            logit_bias={str(tiny.EOS_ID): 100}, extra_body=fields,
        )  # fmt: skip
        assert reply.usage is not None
        return reply.usage.completion_tokens, reply.choices[0].finish_reason

    assert length() == (1, "stop")
    assert length(min_tokens=5) == (6, "stop")
    assert length(min_tokens=9) == (9, "length")
    assert length(ignore_eos=True) == (9, "length")


def test_a_token_may_end_it(house: House, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny", "prompt": TEXT, "max_tokens": 60, "seed": 2, "logprobs": 0,
    }  # fmt: skip
    free = client.completions.create(**fields, extra_body=ENDLESS).choices[0].logprobs
    assert free is not None and free.tokens is not None and free.token_logprobs is not None
    end = free.tokens[9]
    where = free.tokens.index(end)
    reply = client.completions.create(
        **fields, extra_body={**ENDLESS, "stop_token_ids": [house.ids[end]]}
    )
    [choice] = reply.choices
    assert choice.finish_reason == "stop" and choice.logprobs is not None
    assert choice.logprobs.tokens == free.tokens[: where + 1]
    assert reply.usage is not None and reply.usage.completion_tokens == where + 1


def test_a_prompt_that_fills_the_context_is_scored(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tiny", prompt=[65] * 512, echo=True, logprobs=0, max_tokens=0
    )
    assert reply.choices[0].logprobs is not None
    assert len(reply.choices[0].logprobs.token_logprobs or []) == 512


def test_the_first_of_several_stop_strings_ends_it(client: openai.OpenAI) -> None:
    free = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=60, seed=2, extra_body=ENDLESS
    )
    text = free.choices[0].text
    late, early = text[-4:], text[7:10]
    reply = client.completions.create(
        model="tiny", prompt=TEXT, max_tokens=60, seed=2, stop=[late, early], logprobs=0,
        extra_body=ENDLESS,
    )  # fmt: skip
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(early)], "stop")
    assert choice.logprobs is not None and choice.logprobs.text_offset is not None
    assert max(choice.logprobs.text_offset) < len(choice.text)


def test_an_answer_that_has_begun_goes_on_as_it_would_have(client: openai.OpenAI) -> None:
    def answer(*begun: ChatCompletionMessageParam, **fields: Any) -> str:
        reply = client.chat.completions.create(
            model="tiny", messages=[*MESSAGES, *begun], temperature=0, logit_bias=LETTERS,
            extra_body=fields, max_tokens=10 if begun else 20,
        )  # fmt: skip
        return reply.choices[0].message.content or ""

    whole = answer()
    assert len(whole) == 20
    begun: ChatCompletionMessageParam = {"role": "assistant", "content": whole[:10]}
    assert answer(begun, continue_final_message=True) == whole[10:]
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        answer(begun)


def test_the_best_of_several_is_the_likeliest(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny", "prompt": TEXT, "max_tokens": 12, "seed": 5, "logprobs": 0,
        "extra_body": ENDLESS,
    }  # fmt: skip
    every = client.completions.create(**fields, n=4)
    best = client.completions.create(**fields, n=2, best_of=4)
    means = {
        each.text: sum(each.logprobs.token_logprobs) / len(each.logprobs.token_logprobs)
        for each in every.choices
    }
    assert [each.text for each in best.choices] == sorted(means, key=lambda text: -means[text])[:2]
    assert best.usage is not None and best.usage.completion_tokens == 48
