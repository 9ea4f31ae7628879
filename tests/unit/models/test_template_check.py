"""What is wrong with a prompt, found in the prompt itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from chatserve.engine.prompt import Message
from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import Rendered, Special
from chatserve.models.template_check import PromptReport, report
from chatserve.models.templates import ChatMessage
from chatserve.models.templates.builtin import BUILTIN
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from tests.unit.models.vocabularies import save_byte_level

BOS, EOS, END = Special("<s>"), Special("</s>"), Special("<|im_end|>")


@dataclass(frozen=True)
class Fixed:
    """A template that puts `before` in front and `after` behind every answer."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    adds_bos: bool = True
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    name: str = "fixed"
    is_single: bool = False
    drops_answers: bool = False

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> Rendered:
        if self.is_single and len(messages) > 1:
            raise InvalidRequest("one question only")
        parts: Rendered = [*self.before]
        for message in messages:
            if message.role == "assistant":
                parts += [] if self.drops_answers else [message.content, *self.after]
            else:
                parts.append(f"Q: {message.content} A: ")
        return parts


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_byte_level(
        tmp_path, special=[BOS, EOS, END], bos=BOS, bos_token=BOS, eos_token=EOS, add_bos_token=True
    )  # fmt: skip
    return load_tokenizer(tmp_path, None)


def made(template: Fixed, tokenizer: Tokenizer, text: str = "Hello") -> PromptReport:
    return report(template, tokenizer, [Message("user", text)])


def said(template: Fixed, tokenizer: Tokenizer) -> dict[str, str]:
    return {remark.text: remark.status for remark in made(template, tokenizer).remarks}


def test_a_good_prompt(tokenizer: Tokenizer) -> None:
    found = made(Fixed(after=(EOS,)), tokenizer)
    assert found.rendered[0] == BOS and found.ids[0] == tokenizer.bos_id
    assert found.stop_ids == sorted(tokenizer.eos_ids)
    assert [remark.status for remark in found.remarks] == ["ok"] * 3
    assert found.remarks[2].text == "an answer ends with </s>, which stops it"


def test_doubled_bos(tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_id
    assert said(Fixed(before=(BOS, BOS), after=(EOS,)), tokenizer) == {
        f"BOS {bos} is doubled: 2 at the start": "fail",
        "EOS: nowhere doubled": "ok",
        "an answer ends with </s>, which stops it": "ok",
    }


def test_bos_by_template_and_tokenizer_comes_once_here(tokenizer: Tokenizer) -> None:
    found = made(Fixed(before=(BOS,), after=(EOS,)), tokenizer)
    assert found.ids.count(tokenizer.bos_id or -1) == 1
    assert found.rendered.count(BOS) == 1
    assert "programs that encode the rendered text with BOS double it" in found.remarks[0].text


def test_missing_bos(tokenizer: Tokenizer) -> None:
    found = said(Fixed(adds_bos=False, after=(EOS,)), tokenizer)
    assert [status for text, status in found.items() if "is missing" in text] == ["warn"]


def test_no_bos_by_custom(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=[EOS], eos_token=EOS)
    tokenizer = load_tokenizer(tmp_path, None)
    assert said(Fixed(after=(EOS,)), tokenizer)["BOS: the vocabulary has none"] == "ok"
    save_byte_level(tmp_path, special=[BOS, EOS], bos_token=BOS, eos_token=EOS)
    tokenizer = load_tokenizer(tmp_path, None)
    assert said(Fixed(after=(EOS,)), tokenizer)["BOS: none, by this model's custom"] == "ok"


def test_doubled_eos(tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_ids
    template = Fixed(before=("x", EOS, EOS), after=(EOS,))
    assert said(template, tokenizer)[f"EOS {eos} is doubled after a turn"] == "fail"


def test_one_token_that_ends_a_turn_and_begins_the_next(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=[EOS], bos_token=EOS, eos_token=EOS)
    template = Fixed(before=("x", EOS, EOS), after=(EOS,))
    assert said(template, load_tokenizer(tmp_path, None))["EOS: nowhere doubled"] == "ok"


def test_special_tokens_spelled_as_text(tokenizer: Tokenizer) -> None:
    template = Fixed(before=("</s>",), after=(EOS,))
    complaint = "</s> is written as ordinary text, not as a special token"
    assert said(template, tokenizer)[complaint] == "fail"
    # what the user writes is the user's
    remarks = made(Fixed(after=(EOS,)), tokenizer, "what is </s>?").remarks
    assert complaint not in [remark.text for remark in remarks]


def test_an_answer_that_nothing_stops(tokenizer: Tokenizer) -> None:
    template = Fixed(after=(END,))
    assert said(template, tokenizer)["an answer ends with <|im_end|>, which stops nothing"] == (
        "fail"
    )
    stopped = Fixed(after=(END,), stop_tokens=(END,))
    assert said(stopped, tokenizer)["an answer ends with <|im_end|>, which stops it"] == "ok"
    assert made(stopped, tokenizer).stop_ids == sorted(
        {*tokenizer.eos_ids, tokenizer.special_ids[END]}
    )


def test_answers_that_text_stops(tokenizer: Tokenizer) -> None:
    template = Fixed(after=("\n", "### "), stop=("###",))
    assert said(template, tokenizer)["an answer ends with '###', which stops it"] == "ok"
    wrong = Fixed(after=("\n",), stop=("###",))
    assert list(said(wrong, tokenizer).values())[-1] == "warn"
    by_eos = Fixed(after=("\n",))
    assert said(by_eos, tokenizer)["only EOS stops an answer: what follows one is '\\nQ: b A: '"]
    assert list(said(by_eos, tokenizer).values())[-1] == "ok"


def test_a_template_that_forgets_answers(tokenizer: Tokenizer) -> None:
    found = said(Fixed(drops_answers=True), tokenizer)
    assert found["an earlier answer is left out of the prompt"] == "warn"


def test_a_template_for_one_question(tokenizer: Tokenizer) -> None:
    assert len(said(Fixed(is_single=True), tokenizer)) == 2


def test_stops_that_are_not_there(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=[BOS])
    tokenizer = load_tokenizer(tmp_path, None)
    found = said(Fixed(stop_tokens=("<end>",)), tokenizer)
    assert found["stop token <end> is not in the vocabulary"] == "warn"
    assert found["no stop id and no stop text: answers end at the limit only"] == "fail"


def test_chatml_is_sound(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=["<|im_start|>", END], eos_token=END)
    tokenizer = load_tokenizer(tmp_path, None)
    remarks = report(BUILTIN["chatml"], tokenizer, [Message("user", "Hello")]).remarks
    assert {remark.status for remark in remarks} == {"ok"}
