"""What a reward model is to read of answers that are not there yet: `Ranking`. Knows no engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from chatserve.config import adapted_name
from chatserve.engine.reward import Reward
from chatserve.engine.sequence import LoadedAdapter, SamplingParams
from chatserve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from chatserve.protocol.chat import ChatMessage, ChatRequest
from chatserve.server.contract import ServedModel
from chatserve.server.rating import rated_ids


@dataclass(frozen=True)
class Frame:
    """What stands around an answer where it is rated: a text, or token ids, `before` it."""

    before: str | tuple[int, ...]
    after: str = ""

    def ids(self, answer: str, reward: Reward, model: ServedModel) -> tuple[int, ...]:
        """Of the whole text; it may be longer than the model holds."""
        if isinstance(self.before, str):
            return rated_ids(model, reward, f"{self.before}{answer}{self.after}")
        return rated_ids(model, reward, f"{answer}{self.after}", behind=self.before)


@dataclass(frozen=True)
class Ranking:
    """Answers are ordered by what `reward`, of `adapter`, says of them; a frame for each prompt."""

    adapter: LoadedAdapter
    reward: Reward
    frames: tuple[Frame, ...]

    def ids(self, place: int, answer: str, model: ServedModel) -> tuple[int, ...]:
        """What is rated of an answer to prompt `place`. Raises `ContextLengthExceeded`."""
        ids = self.frames[place].ids(answer, self.reward, model)
        if len(ids) > model.context_length:
            raise ContextLengthExceeded(
                f"an answer has {len(ids):,} tokens as {self.adapter.name} reads it with its "
                f"question, {model.names[0]} holds {model.context_length:,}, and nothing is cut; "
                "ask for fewer max_tokens",
                param="max_tokens",
            )
        return ids

    def with_room(
        self, place: int, params: SamplingParams, asked: int | None, model: ServedModel, param: str
    ) -> SamplingParams:
        """`params` of prompt `place` for answers that fit where they are rated, too.

        Raises `ContextLengthExceeded` where the question alone does not, or what was `asked`.
        """
        num_tokens = len(self.frames[place].ids("", self.reward, model))
        room = model.context_length - num_tokens
        if room < 1:
            raise ContextLengthExceeded(
                f"rank_by: {self.adapter.name} reads the question in {num_tokens:,} tokens, "
                f"{model.names[0]} holds {model.context_length:,}; shorten it",
                param=param,
            )
        if asked is not None and asked > room:
            raise ContextLengthExceeded(
                f"max_tokens is {asked:,}, and where {self.adapter.name} reads the answer with its "
                f"question of {num_tokens:,} tokens there is room for {room:,} of "
                f"{model.context_length:,}; ask for fewer",
                param="max_tokens",
            )
        return replace(params, max_tokens=min(params.max_tokens, room))


def chat_ranking(
    request: ChatRequest, model: ServedModel, dropped: Collection[int] = ()
) -> Ranking | None:
    """Of the chat less the messages that are `dropped`; None where nobody asks for one.

    The turns are written as the reward model was trained to read one; it knows no system message.
    Raises `InvalidRequest` for a chat that is no questions and answers.
    """
    if request.rank_by is None:
        return None
    adapter, reward = find_reward(model, request.rank_by)
    turns = _turns(
        [(place, each) for place, each in enumerate(request.messages) if place not in dropped]
    )
    *earlier, (question, answer) = turns
    if answer is not None and not request.is_open:
        raise _no_question()
    before = reward.before(question, [(asked, said or "") for asked, said in earlier])
    return Ranking(adapter, reward, (Frame(before + (answer or ""), reward.after),))


def completion_ranking(
    rank_by: str | None, prompts: Sequence[str | list[int]], model: ServedModel
) -> Ranking | None:
    """Of prompts that are in the form of the reward model's texts already: what is rated is the
    prompt, as it is, and its answer."""
    if rank_by is None:
        return None
    adapter, reward = find_reward(model, rank_by)
    frames = [Frame(each if isinstance(each, str) else tuple(each)) for each in prompts]
    return Ranking(adapter, reward, tuple(frames))


def find_reward(model: ServedModel, name: str) -> tuple[LoadedAdapter, Reward]:
    """The reward model of that name, which may be NAME or BASE:NAME. Raises `InvalidRequest`."""
    loaded = model.adapters.loaded()
    short = next(
        (
            name[len(adapted_name(base, "")) :]
            for base in model.names
            if name.startswith(adapted_name(base, ""))
        ),
        name,
    )
    adapter = loaded.get(short)
    if adapter is not None and adapter.reward is not None:
        return adapter, adapter.reward
    rewards = [each for each, adapter in loaded.items() if adapter.reward is not None]
    there = (
        f"there is {', '.join(rewards)}"
        if rewards
        else "there is none: start the server with --reward-adapter NAME=PATH"
    )
    what = "is an adapter that writes, no reward model" if adapter else "is no reward model here"
    raise InvalidRequest(f"rank_by: {name[:80]!r} {what}; {there}", param="rank_by")


def _turns(messages: Sequence[tuple[int, ChatMessage]]) -> list[tuple[str, str | None]]:
    """Questions and their answers; the last may have none yet. Messages of one side in a row are
    paragraphs of one text."""
    turns: list[tuple[str, str | None]] = []
    for place, message in messages:
        if message.tool_calls or message.role == "tool":
            raise UnsupportedParameter(
                f"rank_by rates questions and answers, and messages[{place}] is of a tool; leave "
                "rank_by out",
                param="rank_by",
            )
        if message.role == "system":
            continue
        if message.role == "user":
            question, answer = turns[-1] if turns else ("", "")
            if turns and answer is None:
                turns[-1] = (f"{question}\n\n{message.content}", None)
            else:
                turns.append((message.content, None))
            continue
        if not turns:
            raise _no_question()
        question, answer = turns[-1]
        said = message.content if answer is None else f"{answer}\n\n{message.content}"
        turns[-1] = (question, said)
    if not turns:
        raise _no_question()
    return turns


def _no_question() -> InvalidRequest:
    return InvalidRequest(
        "rank_by rates answers to questions: the chat must begin with a message of the user, and "
        "end with one, or with the beginning of the answer (continue_final_message)",
        param="rank_by",
    )
