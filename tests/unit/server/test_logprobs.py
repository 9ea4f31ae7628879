"""Logprobs, echo and best_of: what of an answer is told beside its text, and when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest

from chatserve.engine.output import OutputText
from chatserve.engine.sequence import SamplingParams, TokenEvent, TokenLogprobs
from chatserve.errors import GenerationFailed
from chatserve.server.choices import DetailedChoice, Piece
from chatserve.server.logprobs import chat_logprobs, completion_logprobs
from chatserve.server.preparation import Prepared, Prompt
from chatserve.server.shown_tokens import Shown
from tests.fakes import FakeEngine, FakeTokenizer
from tests.unit.server.test_streaming import events, folded, frames_of

END = 7
NAMED = 300


def prepared(*, is_chat: bool = False, **changes: Any) -> Prepared:
    return Prepared(
        model="m", prompts=(), num_choices=1, is_chat=is_chat, is_stream=False,
        includes_usage=False, strip_leading_space=is_chat, shows_logprobs=True, **changes,
    )  # fmt: skip


def said(
    ids: Sequence[int],
    *,
    stop: Sequence[str] = (),
    max_tokens: int = 100,
    strip: bool = False,
    **options: Any,
) -> list[Piece]:
    """The pieces of an answer whose tokens are `ids`, by the engine's own rules for its text."""
    params = SamplingParams(max_tokens=max_tokens, stop=tuple(stop), logprobs=0)
    choice = DetailedChoice(prepared(**options), Prompt((1, 2), params), FakeTokenizer())
    output = OutputText(FakeTokenizer(), stop, strip_leading_space=strip)
    pieces = []
    for number, token_id in enumerate(ids, 1):
        text, is_stop = output.add(token_id, is_hidden=token_id == END)
        reason: Any = "stop" if is_stop or token_id == END else None
        if reason is None and number == max_tokens:
            reason = "length"
        if reason and not is_stop:
            text += output.finish()
        entry = TokenLogprobs(token_id, -float(number))
        pieces.append(
            choice.feed(TokenEvent("s", text, (token_id,), finish_reason=reason, logprobs=(entry,)))
        )
    return pieces


def told(pieces: Sequence[Piece], field: str = "tokens") -> list[list[Any]]:
    return [piece.logprobs[field] if piece.logprobs else [] for piece in pieces]


def test_a_token_is_told_with_its_text() -> None:
    pieces = said([*b"ab", END])
    assert [piece.text for piece in pieces] == ["a", "b", ""]
    assert told(pieces) == [["a"], ["b"], ["\x07"]]
    assert told(pieces, "text_offset") == [[0], [1], [2]]
    assert told(pieces, "token_logprobs") == [[-1.0], [-2.0], [-3.0]]


def test_an_end_token_of_a_chat_is_no_part_of_its_message() -> None:
    contents = told(said([*b"ab", END], is_chat=True), "content")
    assert [[each["token"] for each in content] for content in contents] == [["a"], ["b"], []]


def test_tokens_wait_with_their_text_for_a_stop_string() -> None:
    pieces = said(b"aSTx", stop=["STOP"], max_tokens=4)
    assert [piece.text for piece in pieces] == ["a", "", "", "STx"]
    assert told(pieces) == [["a"], [], [], ["S", "T", "x"]]


def test_tokens_that_a_stop_string_hides_are_not_told() -> None:
    pieces = said(b"aSTOP", stop=["STOP"])
    assert "".join(piece.text for piece in pieces) == "a"
    assert list(chain(*told(pieces))) == ["a"]
    assert pieces[-1].finish_reason == "stop"


class Pairs(FakeTokenizer):
    """Ids from 400 on are two bytes."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"xS" if token_id >= 400 else super().token_bytes(token_id)

    def name_of(self, token_id: int) -> str | None:
        return None


def test_a_token_that_is_partly_shown_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.server.test_logprobs.FakeTokenizer", Pairs)
    pieces = said([400, *b"TOP"], stop=["STOP"])
    assert "".join(piece.text for piece in pieces) == "x"
    assert list(chain(*told(pieces))) == ["xS"]


def test_an_answer_that_is_nothing_but_a_stop_string_has_empty_logprobs() -> None:
    assert told(said(b"STOP", stop=["STOP"]))[-1] == []
    assert said(b"STOP", stop=["STOP"])[-1].logprobs == {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    assert said(b"STOP", stop=["STOP"], is_chat=True)[-1].logprobs == {
        "content": [], "refusal": None,
    }  # fmt: skip


def test_pieces_of_a_character_are_told_with_it() -> None:
    pieces = said("aé".encode() + b"b", max_tokens=4)
    assert [piece.text for piece in pieces] == ["a", "", "é", "b"]
    assert told(pieces) == [["a"], [], ["bytes:\\xc3", "bytes:\\xa9"], ["b"]]
    assert told(pieces, "text_offset") == [[0], [], [1, 1], [2]]


def test_the_last_token_is_told_even_if_it_shows_nothing() -> None:
    """Scorers count: lm-evaluation-harness drops the last entry of each answer unseen."""
    [piece] = said([0xC3], max_tokens=1)
    assert (piece.text, piece.finish_reason) == ("", "length")
    assert told([piece]) == [["bytes:\\xc3"]]
    assert told(said([NAMED], max_tokens=1)) == [["<|300|>"]]
    assert told(said([END])) == [["\x07"]]


def test_a_space_that_is_taken_away_is_told_with_the_text_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeTokenizer, "strips_leading_space", True)
    pieces = said(b" ab", is_chat=True, max_tokens=3, strip=True)
    assert "".join(piece.text for piece in pieces) == "ab"
    assert [len(content) for content in told(pieces, "content")] == [0, 2, 1]


def test_several_tokens_of_one_step() -> None:
    params = SamplingParams(logprobs=0)
    choice = DetailedChoice(prepared(), Prompt((1,), params), FakeTokenizer())
    entries = tuple(TokenLogprobs(id_, -1.0) for id_ in b"abc")
    piece = choice.feed(TokenEvent("s", "abc", tuple(b"abc"), logprobs=entries))
    assert piece.logprobs is not None and piece.logprobs["tokens"] == ["a", "b", "c"]


class Anything:
    """A grammar, as far as anybody here looks at it."""

    def matcher(self) -> Any:
        raise AssertionError("the engine's own")


@pytest.mark.parametrize(
    ("options", "is_text"),
    [
        ({"ignore_eos": True}, True),
        ({"ignore_eos": True, "grammar": Anything()}, False),
        ({}, False),
    ],
)
def test_an_end_token_that_ends_nothing_is_text(options: dict[str, Any], is_text: bool) -> None:
    params = SamplingParams(logprobs=0, **options)
    entries = (TokenLogprobs(97, -1.0), TokenLogprobs(END, -1.0))
    text = "a\x07" if is_text else "a"
    event = TokenEvent("s", text, (97, END), finish_reason="stop", logprobs=entries)
    for is_chat in (False, True):
        shape = prepared(is_chat=is_chat)
        logprobs = DetailedChoice(shape, Prompt((1,), params), FakeTokenizer()).feed(event).logprobs
        assert logprobs is not None
        if is_chat:
            expected = ["a", "\x07"] if is_text else ["a"]
            assert [entry["token"] for entry in logprobs["content"]] == expected
        else:
            assert logprobs["tokens"] == ["a", "\x07"]


# how tokens are written


def shown(token_id: int, *top: tuple[int, float], logprob: float = -1.0) -> Shown:
    return Shown(0, token_id, TokenLogprobs(token_id, logprob, top))


def test_chat_tokens() -> None:
    entries = chat_logprobs(
        FakeTokenizer(), [shown(97, (98, -0.5), (NAMED, -3.0)), shown(0xF0, logprob=-2.0)]
    )
    assert entries == {
        "content": [
            {
                "token": "a", "logprob": -1.0, "bytes": [97],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.5, "bytes": [98]},
                    {"token": "<|300|>", "logprob": -3.0, "bytes": None},
                ],
            },
            {"token": "\\xf0", "logprob": -2.0, "bytes": [0xF0], "top_logprobs": []},
        ],
        "refusal": None,
    }  # fmt: skip


def test_completion_tokens_are_among_their_alternatives() -> None:
    entries = completion_logprobs(
        FakeTokenizer(), [shown(97, (97, -1.0)), shown(97, (98, -0.5)), shown(NAMED)]
    )
    assert entries["tokens"] == ["a", "a", "<|300|>"]
    assert entries["top_logprobs"] == [{"a": -1.0}, {"b": -0.5, "a": -1.0}, {"<|300|>": -1.0}]


def test_of_tokens_that_look_alike_the_likeliest_is_told() -> None:
    class Alike(FakeTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b"a"

    entries = completion_logprobs(Alike(), [shown(97, (98, -0.5), (97, -1.0))])
    assert entries["top_logprobs"] == [{"a": -0.5}]


# echo


PROMPT = tuple("é!".encode())
SCORES = (None, TokenLogprobs(PROMPT[1], -1.0, ((97, -0.1),)), TokenLogprobs(PROMPT[2], -2.0))


class Scores(FakeEngine):
    """Says the logprobs of a prompt in two pieces, then its answer with logprobs."""

    def _script(self, seq_id: str, num_prompt: int, params: Any) -> list[TokenEvent]:
        answer = [
            TokenEvent(
                seq_id, text, (ord(text),), num_generated_tokens=number,
                logprobs=() if params.logprobs is None else (TokenLogprobs(ord(text), -3.0),),
            )
            for number, text in enumerate(self.pieces[: params.max_tokens], 1)
        ]  # fmt: skip
        scores = [SCORES[:1], SCORES[1:]] if params.prompt_logprobs is not None else []
        last = TokenEvent(seq_id, num_generated_tokens=len(answer), finish_reason="length")
        return [*(TokenEvent(seq_id, prompt_logprobs=part) for part in scores), *answer, last]


def echoing(max_tokens: int = 2, *, scores: bool = True) -> dict[str, Any]:
    params = SamplingParams(
        max_tokens=max_tokens,
        logprobs=0 if scores else None,
        prompt_logprobs=0 if scores else None,
    )
    return {
        "is_chat": False, "prompt": Prompt(PROMPT, params, "é!"), "is_echo": True,
        "shows_logprobs": scores,
    }  # fmt: skip


def test_echo_scores_the_prompt() -> None:
    [choice] = folded(Scores("ab"), **echoing())["choices"]
    assert choice["text"] == "é!ab" and choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", "!", "a", "b"],
        "token_logprobs": [None, -1.0, -2.0, -3.0, -3.0],
        "top_logprobs": [
            None, {"a": -0.1, "bytes:\\xa9": -1.0}, {"!": -2.0}, {"a": -3.0}, {"b": -3.0},
        ],
        "text_offset": [0, 0, 1, 2, 3],
    }  # fmt: skip


def test_offsets_stay_inside_a_prompt_that_its_tokens_do_not_spell() -> None:
    shape = {**echoing(max_tokens=1), "prompt": Prompt(PROMPT, SamplingParams(
        max_tokens=1, logprobs=0, prompt_logprobs=0), "")}  # fmt: skip
    [choice] = folded(Scores("a"), **shape)["choices"]
    assert choice["text"] == "a" and choice["logprobs"]["text_offset"] == [0, 0, 0, 0]


def test_a_prompt_can_be_scored_and_no_more() -> None:
    reply = folded(Scores("ab"), **echoing(max_tokens=0))
    [choice] = reply["choices"]
    assert choice["text"] == "é!" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (3, 0)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_without_scores(max_tokens: int) -> None:
    [choice] = folded(Scores("ab"), **echoing(max_tokens, scores=False))["choices"]
    assert choice["text"] == "é!ab"[: 2 + max_tokens] and choice["logprobs"] is None


@pytest.mark.parametrize("scores", [False, True])
def test_streamed_echo_equals_folded(scores: bool) -> None:
    shape = echoing(scores=scores)
    *chunks, _done = events(frames_of(Scores("ab"), num_choices=2, **shape))
    for index, choice in enumerate(folded(Scores("ab"), num_choices=2, **shape)["choices"]):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(each["text"] for each in mine) == choice["text"]
        logprobs = [each["logprobs"] for each in mine if each["logprobs"]]
        if not scores:
            assert not logprobs and choice["logprobs"] is None
            continue
        joined = {name: list(chain(*(each[name] for each in logprobs))) for name in logprobs[0]}
        assert joined == choice["logprobs"]


class Late(Scores):
    """An engine with a bug: it answers first."""

    def _script(self, seq_id: str, num_prompt: int, params: Any) -> list[TokenEvent]:
        first, second, *rest = super()._script(seq_id, num_prompt, params)
        return [first, rest[0], second, *rest[1:]]


def test_an_answer_before_the_prompts_scores_is_an_error() -> None:
    with pytest.raises(GenerationFailed, match="before it had scored"):
        folded(Late("ab"), **echoing())


# best_of


class Tries(FakeEngine):
    """Choice k says k tokens; those of choice 2 are the likeliest, choice 0 has the highest sum."""

    def _script(self, seq_id: str, num_prompt: int, params: Any) -> list[TokenEvent]:
        choice = int(seq_id.rpartition("-")[2])
        logprob = [-1.0, -2.0, -0.5][choice]
        pieces = [
            TokenEvent(
                seq_id, f"{choice}", (1,), num_generated_tokens=number + 1,
                logprobs=(TokenLogprobs(1, logprob),),
            )
            for number in range(choice + 1)
        ]  # fmt: skip
        return [*pieces, TokenEvent(seq_id, num_generated_tokens=choice + 1, finish_reason="stop")]


def test_the_likeliest_answers_on_average_are_returned() -> None:
    reply = folded(Tries(), num_choices=3, num_dropped=1, num_prompts=2, is_chat=False)
    assert [(each["index"], each["text"]) for each in reply["choices"]] == [
        (0, "222"), (1, "0"), (2, "222"), (3, "0"),
    ]  # fmt: skip
    assert {each["logprobs"] for each in reply["choices"]} == {None}
    assert reply["usage"]["completion_tokens"] == 12, "those that are thrown away count, too"


def test_all_that_are_wanted_keep_their_order() -> None:
    reply = folded(Tries(), num_choices=3, is_chat=False)
    assert [each["text"] for each in reply["choices"]] == ["0", "11", "222"]


def test_usage_in_every_chunk() -> None:
    *chunks, last, _done = events(
        frames_of(FakeEngine(["a", "b"]), usage=True, has_usage_in_chunks=True)
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [0, 1, 2, 2] and last["usage"]["completion_tokens"] == 2
    assert [chunk["usage"]["prompt_tokens"] for chunk in chunks] == [3] * 4
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "ab"
