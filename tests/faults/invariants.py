"""What must hold of every request's history, whatever went wrong: functions from a record to the
sentences that say how it does not. An empty list is a good history.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tests.faults.client import Record
from tests.faults.history import Malformed, Reply

Violations = list[str]
FINISHES = frozenset({"stop", "length"})
SHAPE = {"message", "type", "param", "code"}


def check(records: Iterable[Record], *, harmed: Iterable[int] = ()) -> Violations:
    """All invariants on all records. `harmed`: ports of clients whose own connection was spoilt,
    who may have got less than all, but nothing that is wrong."""
    spoilt = set(harmed)
    found = []
    for record in records:
        found += [f"request {record.number}: {each}" for each in _of(record, record.port in spoilt)]
    return found


def _of(record: Record, is_spoilt: bool) -> Violations:
    try:
        reply = Reply(record)
        found = [each for invariant in INVARIANTS for each in invariant(reply)]
    except Malformed as error:
        return [str(error)]
    if not is_spoilt:
        found += [each for invariant in UNSPOILT for each in invariant(reply)]
    return found


def ends_once(reply: Reply) -> Violations:
    """A request has one end: a whole answer, a refusal, an error, or that the client left."""
    if reply.record.end is None:
        return ["it has no end"]
    ends = sum(frame.is_done or _is_error(frame.json) for frame in reply.frames)
    return [f"it ends {ends} times"] if ends > 1 else []


def nothing_after_the_end(reply: Reply) -> Violations:
    """No frame behind `[DONE]` or an error, no text of a choice behind its finish reason."""
    found = []
    finished: set[int] = set()
    for i, frame in enumerate(reply.frames):
        if frame.is_done or _is_error(frame.json):
            if i != len(reply.frames) - 1:
                found.append(f"{len(reply.frames) - 1 - i} frames behind the end")
            break
        for choice in frame.json.get("choices", ()):
            if choice["index"] in finished:
                found.append(f"choice {choice['index']} goes on behind its end")
            if choice["finish_reason"] is not None:
                finished.add(choice["index"])
    return found


def errors_have_a_shape(reply: Reply) -> Violations:
    """Everything that is not an answer says why, as OpenAI's clients read it."""
    if (error := reply.error) is None:
        if reply.is_whole and reply.status != 200:
            return [f"status {reply.status} without an error: {reply.body[:200]!r}"]
        return []
    if not set(error) >= SHAPE or not error["message"] or not error["code"]:
        return [f"a bad error: {dict(error)}"]
    return []


def text_is_right(reply: Reply) -> Violations:
    """What was said is the known text, or a beginning of it: nothing lost, doubled or foreign."""
    wanted = reply.record.request.text
    if wanted is None or reply.status != 200:
        return []
    if reply.is_stream:
        text, is_all = text_of(reply).get(0, ""), reply.is_done
    elif reply.is_whole:
        text, is_all = _said(reply.json["choices"][0]), True
    else:
        return []
    if is_all and text != wanted:
        return [f"a whole answer is not the text: {_difference(text, wanted)}"]
    if not wanted.startswith(text):
        return [f"it is not the text: {_difference(text, wanted)}"]
    return []


def is_one_answer(reply: Reply) -> Violations:
    """One id, one role and one finish reason a choice, the finish reason a true one."""
    chunks = [frame.json for frame in reply.frames if not frame.is_done]
    chunks = [chunk for chunk in chunks if not _is_error(chunk)]
    found = []
    if len(ids := {chunk.get("id") for chunk in chunks}) > 1:
        found.append(f"it has the ids {ids}")
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    roles = Counter(c["index"] for c in choices if "role" in c.get("delta", {}))
    finishes = Counter(c["index"] for c in choices if c["finish_reason"] is not None)
    found += [f"choice {i} begins {n} times" for i, n in roles.items() if n > 1]
    found += [f"choice {i} finishes {n} times" for i, n in finishes.items() if n > 1]
    if reply.is_done and set(finishes) != {choice["index"] for choice in choices}:
        found.append("it is done and a choice has no finish reason")
    return found


def counters_add_up(reply: Reply) -> Violations:
    """Usage is of what was said."""
    usage, wanted = _usage(reply), reply.record.request.num_tokens
    if usage is None:
        return []
    found = []
    if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"]:
        found.append(f"usage does not add up: {usage}")
    if wanted is not None and usage["completion_tokens"] != wanted:
        found.append(f"usage has {usage['completion_tokens']} tokens, {wanted} were to be said")
    return found


def not_cut_in_silence(reply: Reply) -> Violations:
    """Who stays is told how it ended: `[DONE]`, an error, or a status."""
    record = reply.record
    if record.end in ("cancelled", None):
        return []
    if record.end == "timeout":
        return [f"it hangs, after {len(reply.frames)} frames"]
    if record.end != "closed" or not reply.is_whole:
        return [f"it was cut ({record.end}) after {len(reply.frames)} frames"]
    if reply.is_stream and not reply.is_done and reply.error is None:
        return [f"it ends without a word after {len(reply.frames)} frames"]
    return []


def bad_is_refused(reply: Reply) -> Violations:
    """A bad request gets a 4xx, a good one never does for what it asks."""
    status, request = reply.status, reply.record.request
    if status is None or reply.record.end == "cancelled":
        return []
    if request.is_bad and not 400 <= status < 500:
        return [f"a bad request got {status}"]
    if not request.is_bad and 400 <= status < 500 and status != 429:
        return [f"a good request got {status}: {reply.body[:200]!r}"]
    return []


INVARIANTS: tuple[Callable[[Reply], Violations], ...] = (
    ends_once, nothing_after_the_end, errors_have_a_shape, text_is_right, is_one_answer,
    counters_add_up,
)  # fmt: skip
UNSPOILT: tuple[Callable[[Reply], Violations], ...] = (not_cut_in_silence, bad_is_refused)


def outcome(record: Record) -> str:
    """One word, to count by: `done`, `200`, `429`, `cancelled`, the code of an error …"""
    reply = Reply(record)
    if record.end == "cancelled":
        return "cancelled"
    if reply.is_stream:
        if reply.is_done:
            return "done"
        return str(reply.error["code"]) if reply.error is not None else f"cut ({record.end})"
    return str(reply.status) if reply.is_whole else f"cut ({record.end})"


def text_of(reply: Reply) -> dict[int, str]:
    """What each choice of a stream has said."""
    texts: dict[int, str] = {}
    for frame in reply.frames:
        if not frame.is_done:
            for choice in frame.json.get("choices", ()):
                index = choice["index"]
                texts[index] = texts.get(index, "") + _said(choice)
    return texts


def _is_error(chunk: Mapping[str, Any]) -> bool:
    return "error" in chunk or chunk.get("type") == "error"


def _said(choice: Mapping[str, Any]) -> str:
    said = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")
    return said or ""


def _usage(reply: Reply) -> Mapping[str, Any] | None:
    if reply.is_stream:
        usages = [f.json["usage"] for f in reply.frames if not f.is_done and f.json.get("usage")]
        return usages[-1] if usages else None
    if reply.status == 200 and reply.is_whole:
        usage = reply.json.get("usage")
        return usage if usage and "completion_tokens" in usage else None
    return None


def _difference(text: str, wanted: str) -> str:
    place = next((i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), None)
    if place is None:
        return f"{len(text)} characters of {len(wanted)}"
    start = max(0, place - 20)
    return f"{json.dumps(text[start : place + 20])} for {json.dumps(wanted[start : place + 20])}"
