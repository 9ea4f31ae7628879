"""`chatserve replay ID`: ask a running server for a logged answer again, and name the first
difference."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from chatserve import config, environment
from chatserve.cli.escapes import one_line
from chatserve.errors import BadStream, ChatserveError, UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

if TYPE_CHECKING:
    from chatserve.cli.client import ChatClient
    from chatserve.server.replay_log import LoggedAnswer

NUM_LISTED = 20
EXIT_DIFFERENT = 1


@dataclass(frozen=True)
class ReplayConfig:
    """Settings of `chatserve replay`."""

    base_url: str = setting(
        f"http://127.0.0.1:{config.DEFAULT_PORT}/v1", "the server to ask", metavar="URL"
    )
    model: str | None = setting(
        None, "ask this model instead of the one that answered", metavar="NAME"
    )
    json: bool = setting(
        False,
        "print JSON, a line for each choice: id, choice, is_same, num_tokens, seed, fingerprint, "
        "fingerprint_now, and where they differ position, token, token_now",
    )


def main(argv: list[str]) -> int:
    """Exit code 0 where all tokens are the same, 1 where one differs. Raises `ChatserveError`."""
    parser = CommandParser(
        "chatserve replay",
        "Repeat an answer of the replay log (`chatserve serve --replay-log`) by its ids and seed, "
        f"and name the first token that differs. Without ID: list the newest {NUM_LISTED}.",
        ReplayConfig,
    )
    parser.add_argument("id", metavar="ID", nargs="?", help="`id` of the answer")
    flags = parser.flags(argv)
    answer_id = flags.pop("id")
    options = config.build(ReplayConfig, flags)
    # here and not above: --help should not wait for them
    from chatserve.cli.client import ChatClient
    from chatserve.server import replay_log

    path = replay_log.default_path()
    if answer_id is None:
        _list(replay_log.newest(path, NUM_LISTED))
        return 0
    answers = replay_log.find(path, answer_id)
    if not answers:
        raise UsageError(
            f"{one_line(answer_id)[:100]} is not in the replay log {path}; `chatserve replay` "
            "lists the newest"
        )
    key = environment.client_api_key(options.base_url)
    with contextlib.closing(ChatClient(options.base_url, key)) as client:
        outcomes = [
            outcome
            for choices in _by_prompt(answers)
            for outcome in _replay(client, choices, options.model)
        ]
        for outcome in outcomes:
            print(json.dumps(outcome.as_json()) if options.json else outcome.as_text())
    return 0 if all(outcome.is_same for outcome in outcomes) else EXIT_DIFFERENT


@dataclass(frozen=True)
class _Token:
    """An id and its text, where the server tells it; no id: the answer had ended."""

    id: int | None
    text: str | None = None

    def __str__(self) -> str:
        if self.id is None:
            return "the end"
        return (
            f"{self.id}" if self.text is None else f"{one_line(json.dumps(self.text))} ({self.id})"
        )


@dataclass(frozen=True)
class _Outcome:
    """One choice, then and now; `position` of the first token that differs."""

    logged: LoggedAnswer
    fingerprint_now: str
    position: int | None = None
    token: _Token = _Token(None)
    token_now: _Token = _Token(None)

    @property
    def is_same(self) -> bool:
        return self.position is None

    def as_json(self) -> dict[str, Any]:
        difference = {
            "position": self.position,
            "token": {"id": self.token.id, "text": self.token.text},
            "token_now": {"id": self.token_now.id, "text": self.token_now.text},
        }
        return {
            "id": self.logged.id,
            "choice": self.logged.choice,
            "is_same": self.is_same,
            "num_tokens": len(self.logged.token_ids),
            "seed": self.logged.sampling["seed"],
            "fingerprint": self.logged.fingerprint,
            "fingerprint_now": self.fingerprint_now,
            **({} if self.is_same else difference),
        }

    def as_text(self) -> str:
        logged = self.logged
        name, number = f"{logged.id} choice {logged.choice}", len(logged.token_ids)
        if self.is_same:
            text = f"{name}: all {number} tokens are the same"
        else:
            text = (
                f"{name}: token {self.position} of {number} differs: then {self.token}, now "
                f"{self.token_now}"
            )
        if logged.fingerprint == self.fingerprint_now:
            return f"{text}, fingerprint {self.fingerprint_now}"
        return f"{text}; fingerprint then {logged.fingerprint}, now {self.fingerprint_now}"


def _by_prompt(answers: Iterable[LoggedAnswer]) -> list[list[LoggedAnswer]]:
    """The choices of each prompt, in their order."""
    ordered = sorted(answers, key=lambda answer: (len(answer.id), answer.id, answer.choice))
    return [list(choices) for _, choices in groupby(ordered, key=lambda answer: answer.id)]


def _replay(
    client: ChatClient, choices: Sequence[LoggedAnswer], model: str | None
) -> list[_Outcome]:
    """Ask for all choices of one prompt at once: they have their seed in common."""
    from chatserve.protocol.replay import ID_PREFIX

    first = choices[0]
    num_tokens = max(len(answer.token_ids) for answer in choices)
    if num_tokens == 0:
        raise UsageError(f"{first.id} ended before its first token; there is nothing to repeat")
    served = (
        first.model if first.adapter is None else config.adapted_name(first.model, first.adapter)
    )
    sampling = {name: value for name, value in first.sampling.items() if value is not None}
    reply = client.post(
        "/completions",
        {
            "model": model or served, "prompt": first.prompt_ids, **sampling,
            "n": max(answer.choice for answer in choices) + 1, "max_tokens": num_tokens,
            "min_tokens": min(sampling["min_tokens"], num_tokens), "return_token_ids": True,
            "replay": {"grammar": first.grammar},
        },
    )  # fmt: skip
    said, fingerprint = _read(reply)
    if first.grammar is not None and not str(reply.get("id")).startswith(ID_PREFIX):
        raise BadStream(
            f"{first.id} had to match a grammar (response_format, tools, …), to which the server "
            "has not held its answer; ask chatserve"
        )
    return [
        _compare(client, answer, said.get(answer.choice, []), fingerprint, model or served)
        for answer in choices
    ]


def _read(reply: Any) -> tuple[Mapping[int, list[int]], str]:
    try:
        said = {choice["index"]: list(choice["token_ids"]) for choice in reply["choices"]}
        return said, str(reply["system_fingerprint"])
    except (KeyError, TypeError):
        raise BadStream(
            "the server does not say which tokens it generates; is it chatserve or vLLM?"
        ) from None


def _compare(
    client: ChatClient, logged: LoggedAnswer, now: Sequence[int], fingerprint: str, model: str
) -> _Outcome:
    """What the server says behind the logged answer's end is no difference: a stop text, or a
    client that left, ended it there."""
    then = logged.token_ids
    for position, token_id in enumerate(then):
        token_now = now[position] if position < len(now) else None
        if token_now != token_id:
            return _Outcome(
                logged, fingerprint, position,
                _token(client, token_id, model), _token(client, token_now, model),
            )  # fmt: skip
    return _Outcome(logged, fingerprint)


def _token(client: ChatClient, token_id: int | None, model: str) -> _Token:
    if token_id is None:
        return _Token(None)
    # another server may have no such route; the id says enough then
    with contextlib.suppress(ChatserveError, KeyError, TypeError):
        body = {"model": model, "tokens": [token_id], "skip_special_tokens": False}
        return _Token(token_id, str(client.post("/detokenize", body, below_v1=False)["prompt"]))
    return _Token(token_id)


def _list(answers: Iterable[LoggedAnswer]) -> None:
    for answer in answers:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer.created))
        print(
            f"{answer.id}  choice {answer.choice}  {when}  {one_line(answer.model)}  "
            f"{len(answer.prompt_ids)} + {len(answer.token_ids)} tokens  "
            f"{answer.finish_reason or 'aborted'}  {answer.fingerprint}"
        )
