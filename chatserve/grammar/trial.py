"""The process in which a grammar is tried first: `python -m chatserve.grammar.trial`.

It holds the vocabulary and tries each spec in a child of its own, which may hang, crash or eat
memory: the child ends, the vocabulary stays. Imports llguidance and nothing that starts threads,
because it forks. Ends with its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chatserve import frames
from chatserve.grammar.limits import TRIAL_BYTES, TRIAL_S, TRIAL_STEPS
from chatserve.grammar.matcher import Rejected, pristine_matcher, short_reason
from chatserve.grammar.source import KINDS_OF_JSON, BadGrammar, to_llguidance
from chatserve.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

NICENESS = 5
"""Trials give way to the network, which shares their cores."""
# of a process that was killed, by what it was doing wrong
TOO_SLOW, TOO_LARGE = "too slow", "too large"


def main() -> int:
    os.nice(NICENESS)
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    vocabulary = Vocabulary.from_json(frames.receive(connection))
    tokenizer = vocabulary.build()
    frames.send(connection, {})
    while (request := frames.receive(connection)) is not None:
        frames.send(connection, _try_in_child(request, tokenizer, vocabulary))
    return 0


def _try_in_child(
    request: dict[str, Any], tokenizer: LLTokenizer, vocabulary: Vocabulary
) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _run_child(writing, request, tokenizer, vocabulary)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 and answer:
        result: dict[str, Any] = json.loads(answer)
        return result
    is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return {"failure": TOO_SLOW if is_late else TOO_LARGE}


def _run_child(
    writing: int, request: dict[str, Any], tokenizer: LLTokenizer, vocabulary: Vocabulary
) -> NoReturn:
    try:
        _limit(request.get("seconds", TRIAL_S), request.get("num_bytes", TRIAL_BYTES))
        result = _try(request, tokenizer, vocabulary)
        with open(writing, "wb") as pipe:
            pipe.write(json.dumps(result).encode())
        os._exit(0)
    finally:
        # whatever it was, it must not become a second trial process
        os._exit(1)


def _limit(seconds: float, num_bytes: int) -> None:
    """End this process by the clock, also in native code, and refuse it memory."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + num_bytes
        # some containers have a lower limit of their own
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _try(request: dict[str, Any], tokenizer: LLTokenizer, vocabulary: Vocabulary) -> dict[str, Any]:
    """The grammar for llguidance and the memory it takes, or why there is none."""
    before = _peak_bytes()
    kind, after_space = request["kind"], request["after_space"]
    try:
        text = to_llguidance(kind, request["source"], after_space=after_space)
        matcher = pristine_matcher(tokenizer, text, is_json=kind in KINDS_OF_JSON)
        _walk(matcher, vocabulary)
    except BadGrammar as error:
        return {"rejected": str(error)}
    except Rejected as error:
        return {"rejected": short_reason(str(error))}
    return {"grammar": text, "num_bytes": _peak_bytes() - before}


def _walk(matcher: LLMatcher, vocabulary: Vocabulary) -> None:
    """Say something that the grammar allows. Raises `Rejected` at a dead end."""
    choose = random.Random(0).choice
    walker = matcher.deep_copy()
    for _ in range(TRIAL_STEPS):
        if walker.is_stopped():
            break
        mask = walker.compute_bitmask()
        allowed = [each for each in _bits(mask) if vocabulary.tokens[each]]
        if not allowed:
            break
        walker.consume_token(choose(allowed))
    if walker.is_error():
        raise Rejected(walker.get_error())


def _bits(mask: bytes) -> list[int]:
    return [
        8 * position + bit
        for position, byte in enumerate(mask)
        if byte
        for bit in range(8)
        if byte >> bit & 1
    ]


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    raise SystemExit(main())
