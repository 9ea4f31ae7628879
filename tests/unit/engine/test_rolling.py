"""Old turns give way as whole turns, only as many as must, and it is said which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserve.engine.prompt import Message, PromptBuilder
from chatserve.engine.rolling import Rolled, Turns, most_that_fit
from chatserve.errors import ContextLengthExceeded, InvalidRequest
from chatserve.models.templates.builtin import BUILTIN
from chatserve.models.tokenizer import Rendered, Tokenizer, load_tokenizer
from tests.unit.models.vocabularies import save_byte_level

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = {"s": "system", "u": "user", "a": "assistant"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_level(folder, special=SPECIALS, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return load_tokenizer(folder)


def builder(
    tokenizer: Tokenizer, context_length: int, system_message: str | None = None
) -> PromptBuilder:
    return PromptBuilder(
        tokenizer, BUILTIN["chatml"], context_length, system_message, model_name="tiny"
    )


def chat(roles: str, num_chars: int = 10) -> list[Message]:
    """Message i says its place, padded to `num_chars`."""
    return [Message(ROLES[role], str(i).ljust(num_chars, ".")) for i, role in enumerate(roles)]


def alone(tokenizer: Tokenizer, messages: list[Message], places: list[int]) -> list[int]:
    return builder(tokenizer, 10**6).chat([messages[i] for i in places])


def length(tokenizer: Tokenizer, messages: list[Message], places: list[int]) -> int:
    return len(alone(tokenizer, messages, places))


def test_what_fits_stays_as_it_is(tokenizer: Tokenizer) -> None:
    messages = chat("suau")
    whole = alone(tokenizer, messages, [0, 1, 2, 3])
    exactly = builder(tokenizer, len(whole) + 7)
    assert exactly.rolling_chat(messages, 7) == Rolled(whole)
    assert exactly.rolling_chat(messages, 8).messages_dropped == (1, 2)


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        ("suauauau", [[0, 7], [0, 5, 6, 7], [0, 3, 4, 5, 6, 7]]),
        ("uauauu", [[5], [4, 5], [2, 3, 4, 5]]),
        # an answer never comes first, nor does a greeting outlive what it greeted
        ("sauau", [[0, 4], [0, 2, 3, 4]]),
        ("usuau", [[1, 4], [1, 2, 3, 4]]),
    ],
)
def test_as_many_whole_turns_stay_as_fit(
    tokenizer: Tokenizer, roles: str, kept: list[list[int]]
) -> None:
    messages = chat(roles)
    whole = length(tokenizer, messages, list(range(len(messages))))
    for fewer, more in zip(kept, [*kept[1:], list(range(len(messages)))], strict=True):
        for context in (length(tokenizer, messages, fewer), length(tokenizer, messages, more) - 1):
            rolled = builder(tokenizer, context + 5).rolling_chat(messages, 5)
            assert rolled.ids == alone(tokenizer, messages, fewer)
            assert list(rolled.messages_dropped) == [
                i for i in range(len(messages)) if i not in fewer
            ]
            assert rolled.num_tokens_dropped == whole - len(rolled.ids)


def test_the_servers_own_system_message_stays_and_is_not_counted_as_one(
    tokenizer: Tokenizer,
) -> None:
    messages = chat("uau")
    kept = [Message("system", "be kind"), messages[2]]
    ids = builder(tokenizer, 10**6).chat(kept)
    rolled = builder(tokenizer, len(ids) + 3, "be kind").rolling_chat(messages, 3)
    assert (rolled.ids, rolled.messages_dropped) == (ids, (0, 1))


def test_without_a_limit_a_quarter_of_the_context_is_kept_for_the_answer(
    tokenizer: Tokenizer,
) -> None:
    messages = chat("uauau")
    whole = length(tokenizer, messages, [0, 1, 2, 3, 4])
    context = whole * 4 // 3
    assert len(builder(tokenizer, context + 3).rolling_chat(messages, None).ids) == whole
    rolled = builder(tokenizer, context - 3).rolling_chat(messages, None)
    assert rolled.messages_dropped == (0, 1)
    # a last turn that needs more than the rest is no reason to refuse it
    last = length(tokenizer, messages, [4])
    rolled = builder(tokenizer, last + 1).rolling_chat(messages, None)
    assert (len(rolled.ids), rolled.messages_dropped) == (last, (0, 1, 2, 3))
    # nor is more kept than an answer takes
    long = chat("uau", 2000)
    two = length(tokenizer, long, [0, 1, 2])
    assert not builder(tokenizer, two + 1024).rolling_chat(long, None).messages_dropped
    assert builder(tokenizer, two + 1023).rolling_chat(long, None).messages_dropped


def test_a_last_turn_that_does_not_fit_is_refused_with_the_numbers(tokenizer: Tokenizer) -> None:
    messages = chat("suau", 50)
    last = length(tokenizer, messages, [0, 3])
    with pytest.raises(ContextLengthExceeded) as caught:
        builder(tokenizer, last).rolling_chat(messages, None)
    assert caught.value.message == (
        f"the last turn, with the system message, has {last} tokens; tiny holds {last} and only "
        "earlier turns are dropped; shorten the last message"
    )
    with pytest.raises(ContextLengthExceeded) as caught:
        builder(tokenizer, last + 19).rolling_chat(messages, 20)
    assert caught.value.message == (
        f"the last turn, with the system message, has {last} tokens and max_tokens is 20, together "
        f"{last + 20}; tiny holds {last + 19} and only earlier turns are dropped; shorten the last "
        "message or ask for fewer"
    )
    assert caught.value.param == "messages"


def test_a_long_history_is_read_about_once(tokenizer: Tokenizer) -> None:
    """Not once for each turn that is dropped."""
    messages = chat("ua" * 500 + "u", 40)
    num_chars = 0
    encode = tokenizer.encode

    class Counting(Tokenizer):
        def __init__(self) -> None:
            self.__dict__ = tokenizer.__dict__

        def encode(self, rendered: Rendered | str, *, add_bos: bool) -> list[int]:
            nonlocal num_chars
            num_chars += sum(map(len, rendered))
            return encode(rendered, add_bos=add_bos)

    rolled = builder(Counting(), 4000).rolling_chat(messages, 100)
    whole = len(alone(tokenizer, messages, list(range(len(messages)))))
    assert 3800 < len(rolled.ids) <= 3900
    assert num_chars < 3 * whole


@given(st.integers(1, 600), st.integers(1, 600))
def test_the_most_that_fit_are_found_in_few_steps(count: int, most: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= most

    assert most_that_fit(count, fits) == min(count, most)
    assert len(asked) <= 2 * max(2, min(count, most)).bit_length()
    assert all(1 < number <= min(count, 2 * most) for number in asked)


@given(st.text("sua", min_size=1, max_size=12))
def test_no_turn_is_torn(letters: str) -> None:
    roles = [ROLES[letter] for letter in letters]
    order = Turns(roles)
    for number in range(1, order.count + 1):
        places = order.places(number)
        assert sorted([*places, *order.dropped(number)]) == list(range(len(roles)))
        assert {i for i, role in enumerate(roles) if role == "system"} <= set(places)
        spoken = [roles[i] for i in places if roles[i] != "system"]
        if "user" in roles:
            assert spoken[0] == "user" and spoken.count("user") == number


def test_an_answer_that_has_begun_goes_on(tokenizer: Tokenizer) -> None:
    messages = chat("uauaua")
    kept = builder(tokenizer, 10**6).chat(messages[2:], is_open=True)
    rolled = builder(tokenizer, len(kept) + 3).rolling_chat(messages, 3, is_open=True)
    assert (rolled.ids, rolled.messages_dropped) == (kept, (0, 1))
    with pytest.raises(InvalidRequest, match="needs a last message of the assistant"):
        builder(tokenizer, 100).rolling_chat(messages[:3], 3, is_open=True)
