"""`/compare`: each question to two models at once; one of the answers goes on in the chat."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

from chatserve.cli.answer import Answer, ChatDelta, ModelInfo
from chatserve.cli.asking import Rival, ask, wait_until_ready
from chatserve.cli.contest import Contest
from chatserve.cli.escapes import one_line
from chatserve.cli.render import place_text, progress_text, thinking_text
from chatserve.cli.slash.settings import served_models
from chatserve.cli.stats import answer_text
from chatserve.errors import ChatserveError

if TYPE_CHECKING:
    from chatserve.cli.chat import Chat

Pair = tuple[ModelInfo, ModelInfo]


def _compare(chat: Chat, names: str) -> None:
    wanted = names.split()
    if not wanted:
        chat.display.note(_state(chat))
    elif wanted == ["off"]:
        chat.rivals = None
        chat.display.note(_state(chat))
    elif len(wanted) > 2:
        chat.display.error("/compare takes one or two models")
    elif not chat.display.has_columns:
        chat.display.error("/compare needs a terminal")
    elif (models := served_models(chat)) is not None:
        if len(wanted) == 1:
            wanted.insert(0, chat.server.model().name)
            models.setdefault(wanted[0], chat.server.model())
        for name in wanted:
            if name not in models:
                there = ", ".join(map(one_line, models))
                chat.display.error(f"{one_line(name)} is not served; there is {there}")
                return
        chat.rivals = models[wanted[0]], models[wanted[1]]
        chat.display.note(_state(chat))


def _state(chat: Chat) -> str:
    if chat.rivals is None:
        return f"{one_line(chat.server.model().name)} answers alone; /compare MODEL adds another"
    first, second = (one_line(model.name) for model in chat.rivals)
    return f"{first} and {second} answer, and you choose; /compare off ends that"


def ask_both(chat: Chat, question: str, pair: Pair) -> None:
    """Draw both answers and keep the one that the user chooses; the first one where the chat ends
    instead. Raises `StartupError`.
    """
    chat.transcript.ask(question)
    answers, is_whole = (Answer(), Answer()), [False, False]
    chosen: int | None = 0
    try:
        with chat.stopped_by_ctrl_c():
            try:
                wait_until_ready(chat.server, chat.display)
                _stream(chat, pair, answers, is_whole)
            except KeyboardInterrupt:
                chat.display.note("stopped")
        for model, answer in zip(pair, answers, strict=True):
            chat.stats.add(model.name, answer)
        chosen = _choice(chat, pair, answers)
    finally:
        if chosen is None:
            chat.transcript.remove_last()
            chat.display.note("neither goes on; the question is taken back")
        else:
            _keep(chat, pair, answers, is_whole, chosen)


def _keep(
    chat: Chat, pair: Pair, answers: tuple[Answer, Answer], is_whole: list[bool], chosen: int
) -> None:
    chat.transcript.answer(answers[chosen].text, is_partial=not is_whole[chosen])
    chat.take_answer(answers[chosen], pair[chosen])


def _stream(chat: Chat, pair: Pair, answers: tuple[Answer, Answer], is_whole: list[bool]) -> None:
    """Raises `KeyboardInterrupt`; what fails is told for each model by itself."""
    messages, failures = chat.messages(), list[tuple[int, ChatserveError]]()

    def deltas(index: int, rival: Rival) -> Generator[ChatDelta, None, None]:
        return ask(rival, messages, chat.options, answers[index])

    contest = Contest([chat.server.rival(model) for model in pair], deltas, chat.clock)
    titles = [one_line(model.name) for model in pair]
    for answer in answers:
        answer.asked_at = chat.clock()
    with chat.display.answers(titles) as drawn, contest.batches() as batches:
        for batch in batches:
            for event in batch:
                if event.delta is not None:
                    answers[event.index].take(event.delta, event.at)
                    drawn.draw(event.index, event.delta.text)
                    if text := _wait_text(event.delta, answers[event.index]):
                        drawn.wait(event.index, text)
                else:
                    drawn.end(event.index)
                    is_whole[event.index] = event.failure is None
                if event.failure is not None:
                    failures.append((event.index, event.failure))
            drawn.show()
    for index, failure in failures:
        chat.display.error(f"{titles[index]}: {failure.message}")


def _wait_text(delta: ChatDelta, answer: Answer) -> str:
    """What an answer waits for that has not begun, if the server has just told."""
    if answer.text:
        return ""
    if delta.place is not None:
        return place_text(delta.place)
    if delta.loading is not None:
        return progress_text(delta.loading)
    return delta.note or (thinking_text(len(answer.reasoning)) if delta.reasoning else "")


def _choice(chat: Chat, pair: Pair, answers: tuple[Answer, Answer]) -> int | None:
    """Which answer goes on; None: neither. Raises `EOFError`."""
    there = [index for index, answer in enumerate(answers) if answer.text]
    if len(there) < 2:
        return there[0] if there else 0
    rows = (
        f"{number} {one_line(model.name)} · {answer_text(answer)}"
        for number, (model, answer) in enumerate(zip(pair, answers, strict=True), 1)
    )
    chat.display.note("\n".join(rows))
    chat.display.note("which goes on? 1 or 2, 0 neither (Enter: 1)")
    read = partial(chat.lines.read) if chat.lines is not None else str
    while True:
        try:
            word = read().strip()
        except KeyboardInterrupt:
            return 0
        if word in ("", "1", "2"):
            return 1 if word == "2" else 0
        if word == "0":
            return None
        chat.display.error("1, 2 or 0; Enter takes 1")


RUNS = {"compare": _compare}
