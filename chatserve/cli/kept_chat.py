"""One chat's place on disk. Losing it never disturbs the chat: it is told once, and the chat goes
on.

Knows the store and sentences; no terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from chatserve.cli.escapes import one_line
from chatserve.cli.session_search import Hit, snippet
from chatserve.cli.session_store import Session, SessionInfo, SessionStore
from chatserve.cli.transcript import Transcript
from chatserve.errors import UsageError
from chatserve.private_database import Damaged, DatabaseFailed, NotPrivate

MOST_LISTED = 10
MOST_PLACES = 3
_MAX_TITLE_LEN = 40


class KeptChat:
    """`tell` gets what the user should know, a line each."""

    def __init__(self, store: SessionStore, tell: Callable[[str], None]) -> None:
        self._store = store
        self._tell = tell
        self._session = Session()
        self._has_warned = False
        self._is_whole = True
        try:
            store.check()
        except DatabaseFailed as error:
            self._fail(error)

    def resume(self, wanted: str, source: str = "--resume") -> Transcript:
        """The chat of that name or id, or the last one; it is gone on with.

        Raises `UsageError`, which names `source`, when there is none, or it cannot be read.
        """
        self._session, transcript = find_chat(self._store, wanted, source)
        return transcript

    def delete(self, wanted: str) -> str:
        """Delete the chat of that name or id; what it was called.

        Raises `UsageError` when there is none, or it is this one, or it cannot be deleted.
        """
        session, _ = find_chat(self._store, wanted, "/sessions delete")
        if session.id == self._session.id:
            raise UsageError("this chat goes on; /clear begins another, then it can be deleted")
        return delete_chat(self._store, session)

    def searched(self, words: str) -> str:
        """The chats in which all of `words` were said together, with the places."""
        try:
            found = self._store.search(words.split()) if self._store.exists() else []
        except DatabaseFailed as error:
            return f"cannot read {self._store.path}: {error}"
        return "\n".join(found_rows(found, words.split())) or "nothing is found"

    def keep(self, transcript: Transcript, model: str) -> None:
        """Save what has changed, if anything has."""
        if not transcript.turns and self._session.writer is None:
            return
        if self._is_whole and transcript.turns == self._session.turns:
            return
        try:
            self._save(transcript, model)
        except DatabaseFailed as error:
            self._fail(error)
            if isinstance(error, Damaged) and not self._has_warned:
                self._save_again(transcript, model)

    def begin_anew(self) -> None:
        """What comes is another chat; the one until now stays as it is."""
        self._session = Session()

    def names(self) -> list[str]:
        """What the newest chats are called; none where nobody can say."""
        try:
            return [info.name or info.id for info in self._recent()]
        except DatabaseFailed:
            return []

    def listed(self) -> str:
        """The newest chats, a line each."""
        try:
            there = self._recent()
        except DatabaseFailed as error:
            return f"cannot read {self._store.path}: {error}"
        return "\n".join(map(row, there)) or "no chat is kept yet"

    def rename(self, name: str) -> str | None:
        """Call this chat `name`; what hinders that, if anything does."""
        if self._session.writer is None:
            return "nothing of this chat is kept yet; ask something first"
        try:
            is_renamed = self._store.rename(self._session, name)
        except DatabaseFailed as error:
            return f"cannot write {self._store.path} ({error})"
        return None if is_renamed else f"another chat is called {one_line(name)}"

    @property
    def name(self) -> str | None:
        """What finds this chat again; None when nothing of it is kept."""
        if self._session.writer is None or not self._session.turns:
            return None
        return self._session.name or self._session.id

    def _recent(self) -> list[SessionInfo]:
        return self._store.recent(MOST_LISTED) if self._store.exists() else []

    def _save(self, transcript: Transcript, model: str) -> None:
        self._is_whole = False
        before = self.name
        is_same = self._store.save(self._session, transcript, model)
        self._is_whole = True
        if not is_same and self.name != before:
            self._tell(f"{before} was gone on with elsewhere: this chat is kept as {self.name}")

    def _save_again(self, transcript: Transcript, model: str) -> None:
        """In the new file."""
        self._session = Session()
        try:
            self._save(transcript, model)
        except DatabaseFailed as error:
            self._warn(error)

    def _fail(self, error: DatabaseFailed) -> None:
        """A damaged file is put aside; what cannot be helped is told once."""
        if not isinstance(error, Damaged):
            self._warn(error)
            return
        try:
            aside = self._store.put_aside()
        except DatabaseFailed as worse:
            self._warn(worse)
            return
        if aside is not None:
            self._tell(
                f"the kept chats were damaged ({error}): they are in {aside} now, "
                f"and a new file is begun"
            )

    def _warn(self, error: DatabaseFailed) -> None:
        if not self._has_warned:
            self._has_warned = True
            way_out = "; chmod 600 it" if isinstance(error, NotPrivate) else ""
            self._tell(f"this chat goes on, but is not kept: {self._store.path}: {error}{way_out}")


def find_chat(store: SessionStore, wanted: str, source: str) -> tuple[Session, Transcript]:
    """Raises `UsageError`, which begins with `source`, when there is none or it cannot be read."""
    path, source = store.path, f"{source} {one_line(wanted)}"
    try:
        found = store.find(wanted) if store.exists() else None
        if found is not None:
            return found
        there = store.recent(MOST_LISTED) if store.exists() else []
    except DatabaseFailed as error:
        raise UsageError(f"{source}: cannot read {path} ({error})") from error
    known = ", ".join(info.name or info.id for info in there)
    hint = f"the newest are {known}" if known else f"{path} holds none yet"
    raise UsageError(f"{source}: no chat has this name or id; {hint}")


def delete_chat(store: SessionStore, session: Session) -> str:
    """What it was called. Raises `UsageError` when it cannot be deleted."""
    try:
        store.delete(session.id)
    except DatabaseFailed as error:
        raise UsageError(f"cannot write {store.path} ({error})") from error
    return session.name or session.id


def found_rows(
    found: Sequence[tuple[SessionInfo, list[Hit]]], words: Sequence[str], most: int = MOST_LISTED
) -> list[str]:
    """A line for each of the newest chats, and for the first places where the words are."""
    rows = []
    for info, hits in found[:most]:
        rows.append(row(info))
        rows += [
            f"    {one_line(hit.role)}: {one_line(snippet(hit.content, words))}"
            for hit in hits[:MOST_PLACES]
        ]
        if len(hits) > MOST_PLACES:
            rows.append(f"    … {len(hits) - MOST_PLACES} more places")
    if len(found) > most:
        rows.append(f"… {len(found) - most} more chats")
    return rows


def row(info: SessionInfo) -> str:
    """`NAME  DATE  how its first question begins`."""
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.changed_at))
    title = one_line(info.title or "")
    if len(title) > _MAX_TITLE_LEN:
        title = title[: _MAX_TITLE_LEN - 1] + "…"
    return f"{one_line(info.name or info.id)}  {day}  {title}"
