"""What must hold of every request's history, whatever went wrong: functions from a record to the
sentences that say how it does not. An empty list is a good history.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tests.faults.client import CHAT, Record
from tests.faults.history import Malformed, Reply

Violations = list[str]
SHAPE = {"message", "type", "param", "code"}
COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"
ONCE = ("message_start", "message_stop", "response.created", "response.output_text.done")


def check(
    records: Iterable[Record], *, harmed: Iterable[int] = (), may_be_lost: bool = False
) -> Violations:
    """All invariants on all records. `harmed`: ports of clients whose own connection was spoilt,
    who may have got less than all, but nothing that is wrong. `may_be_lost`: nobody asks a second
    worker when the first dies before it has read a request."""
    spoilt = set(harmed)
    found = []
    for record in records:
        violations = _of(record, record.port in spoilt, may_be_lost)
        found += [f"request {record.number}: {each}" for each in violations]
    return found


def _of(record: Record, is_spoilt: bool, may_be_lost: bool) -> Violations:
    try:
        reply = Reply(record)
        found = [each for invariant in INVARIANTS for each in invariant(reply)]
    except Malformed as error:
        return [str(error)]
    if not is_spoilt:
        found += not_cut_in_silence(reply) + bad_is_refused(reply, may_be_lost=may_be_lost)
    return found


def ends_once(reply: Reply) -> Violations:
    """A request has one end: a whole answer, a refusal, an error, or that the client left."""
    if reply.record.end is None:
        return ["it has no end"]
    ends = sum(frame.is_done or frame.error is not None for frame in reply.frames)
    return [f"it ends {ends} times"] if ends > 1 else []


def nothing_after_the_end(reply: Reply) -> Violations:
    """No frame behind the last one or an error, no text of a choice behind its finish reason."""
    found = []
    finished: set[int] = set()
    for i, frame in enumerate(reply.frames):
        if frame.is_done or frame.error is not None:
            if i != len(reply.frames) - 1:
                found.append(f"{len(reply.frames) - 1 - i} frames behind the end")
            break
        for index, _, reason in frame.choices:
            if index in finished:
                found.append(f"choice {index} goes on behind its end")
            if reason is not None:
                finished.add(index)
    return found


def errors_have_a_shape(reply: Reply) -> Violations:
    """Everything that is not an answer says why, as the clients of its API read it."""
    if (error := reply.error) is None:
        if reply.is_whole and reply.status != 200:
            return [f"status {reply.status} without an error: {reply.body[:200]!r}"]
        return []
    path = reply.record.request.path
    wanted = {"message"} if path == MESSAGES else {"message", "code"}
    if not set(error) >= wanted or not all(error[name] for name in wanted):
        return [f"a bad error: {dict(error)}"]
    if path in (CHAT, COMPLETIONS) and not set(error) >= SHAPE:
        return [f"a bad error: {dict(error)}"]
    return []


def text_is_right(reply: Reply) -> Violations:
    """What was said is the known text, or a beginning of it: nothing lost, doubled or foreign."""
    wanted = reply.record.request.text
    if wanted is None or reply.status != 200 or not (reply.is_stream or reply.is_whole):
        return []
    text = reply.texts.get(0, "")
    if (reply.is_done or not reply.is_stream) and text != wanted:
        return [f"a whole answer is not the text: {_difference(text, wanted)}"]
    if not wanted.startswith(text):
        return [f"it is not the text: {_difference(text, wanted)}"]
    return []


def is_one_answer(reply: Reply) -> Violations:
    """One id, one beginning and one finish reason a choice; numbered events without a gap."""
    chunks = [f.json for f in reply.frames if f.data != "[DONE]" and f.error is None]
    found = []
    if len(ids := {chunk["id"] for chunk in chunks if "choices" in chunk}) > 1:
        found.append(f"it has the ids {ids}")
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    roles = Counter(c["index"] for c in choices if "role" in c.get("delta", {}))
    finishes = Counter(c["index"] for c in choices if c["finish_reason"] is not None)
    found += [f"choice {i} begins {n} times" for i, n in roles.items() if n > 1]
    found += [f"choice {i} finishes {n} times" for i, n in finishes.items() if n > 1]
    if reply.is_done and set(finishes) != {choice["index"] for choice in choices}:
        found.append("it is done and a choice has no finish reason")
    kinds = Counter(chunk.get("type") for chunk in chunks)
    found += [f"{n} events {kind}" for kind, n in kinds.items() if kind in ONCE and n > 1]
    numbers = [f.json["sequence_number"] for f in reply.frames if '"sequence_number"' in f.data]
    if numbers != list(range(len(numbers))):
        found.append(f"its events are numbered {numbers}")
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


def bad_is_refused(reply: Reply, *, may_be_lost: bool = False) -> Violations:
    """A bad request gets a 4xx, a good one never does for what it asks."""
    status, request = reply.status, reply.record.request
    if status is None or reply.record.end == "cancelled":
        return []
    # where nobody is there to read a request, a bad one is none
    unread = (502, 503, 504) if may_be_lost else (503,)
    if request.is_bad and not 400 <= status < 500 and status not in unread:
        return [f"a bad request got {status}"]
    if not request.is_bad and 400 <= status < 500 and status != 429:
        return [f"a good request got {status}: {reply.body[:200]!r}"]
    return []


INVARIANTS: tuple[Callable[[Reply], Violations], ...] = (
    ends_once, nothing_after_the_end, errors_have_a_shape, text_is_right, is_one_answer,
    counters_add_up,
)  # fmt: skip


def outcome(record: Record) -> str:
    """One word, to count by: `done`, `200`, `429`, `cancelled`, the code of an error …"""
    reply = Reply(record)
    if record.end == "cancelled":
        return "cancelled"
    if reply.is_stream:
        if reply.is_done:
            return "done"
        if reply.error is not None:
            return str(reply.error.get("code") or reply.error.get("type"))
        return f"cut ({record.end})"
    return str(reply.status) if reply.is_whole else f"cut ({record.end})"


def _usage(reply: Reply) -> Mapping[str, Any] | None:
    if reply.is_stream:
        usages = [f.json.get("usage") for f in reply.frames if f.data != "[DONE]"]
        usages = [usage for usage in usages if usage and "total_tokens" in usage]
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
