"""`chatserve history [WORD ...]`: the chats that are kept: list, search, show, export, delete."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chatserve import config
from chatserve.cli.escapes import strip_escapes
from chatserve.cli.export import as_markdown, export, title_of
from chatserve.cli.kept_chat import delete_chat, find_chat, found_rows, row
from chatserve.cli.session_search import Hit, snippet
from chatserve.cli.session_store import Session, SessionInfo, SessionStore
from chatserve.cli.transcript import Transcript
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.private_database import DatabaseFailed
from chatserve.settings import setting

Found = Sequence[tuple[SessionInfo, list[Hit]]]


@dataclass(frozen=True)
class HistoryConfig:
    """Settings of `chatserve history`."""

    show: str | None = setting(None, "print a chat as Markdown", metavar="CHAT")
    output: str | None = setting(
        None, "with --show: write FILE.md (Markdown), FILE.html (a page) or FILE.json (an OpenAI "
        "request) instead", metavar="FILE",
    )  # fmt: skip
    delete: str | None = setting(None, "delete a chat, for good", metavar="CHAT")
    most: int = setting(20, "how many chats are listed", metavar="N", ge=1)
    json: bool = setting(False, "print JSON: what is listed, found or shown")


def main(argv: list[str]) -> int:
    """Raises `UsageError`."""
    parser = CommandParser(
        "chatserve history",
        "List the chats that are kept on this machine, or those in which all WORDs were said "
        "together. CHAT is a name, an id, the beginning of one, or `last`.",
        HistoryConfig,
    )
    parser.add_argument("words", metavar="WORD", nargs="*", help="search for it, in any case")
    flags = parser.flags(argv, intermixed=True)
    words = [part for word in flags.pop("words") for part in word.split()]
    options = config.build(HistoryConfig, flags)
    _check(options, words)
    store = SessionStore.of_user()
    if options.delete is not None:
        session, _ = find_chat(store, options.delete, "--delete")
        print(f"deleted {strip_escapes(delete_chat(store, session))}")
    elif options.show is not None:
        _show(store, options.show, options)
    else:
        _list(store, words, options)
    return 0


def _check(options: HistoryConfig, words: Sequence[str]) -> None:
    deeds = {"--show": options.show, "--delete": options.delete, "a search": words or None}
    asked = [name for name, value in deeds.items() if value is not None]
    if len(asked) > 1:
        raise UsageError(f"{asked[0]} and {asked[1]} are two things; give one of them")
    if options.output is not None and options.show is None:
        raise UsageError("--output is for the chat that --show names")


def _show(store: SessionStore, wanted: str, options: HistoryConfig) -> None:
    session, transcript = find_chat(store, wanted, "--show")
    model = session.model
    if options.output is not None:
        path, has_replaced = export(transcript, options.output, model)
        print(f"{'replaced' if has_replaced else 'exported to'} {path}")
    elif options.json:
        _print_json(_chat(session, transcript))
    else:
        text = as_markdown(transcript, session.name or title_of(transcript), model)
        sys.stdout.write(strip_escapes(text))


def _list(store: SessionStore, words: Sequence[str], options: HistoryConfig) -> None:
    try:
        found: Found = []
        if store.exists():
            found = store.search(words) if words else [(i, []) for i in store.recent(options.most)]
    except DatabaseFailed as error:
        raise UsageError(f"cannot read {store.path} ({error})") from error
    if options.json:
        _print_json([_found(*each, words) for each in found[: options.most]])
    elif found:
        rows = found_rows(found, words, options.most) if words else [row(i) for i, _ in found]
        print("\n".join(rows))
    elif words:
        print("nothing is found", file=sys.stderr)
    else:
        print(f"no chat is kept yet in {store.path}", file=sys.stderr)


def _print_json(value: Any) -> None:
    """In printable ASCII, whatever was said: no terminal obeys it, and each can show it."""
    print(json.dumps(value, indent=1).replace("\x7f", "\\u007f"))


def _found(info: SessionInfo, hits: Sequence[Hit], words: Sequence[str]) -> dict[str, Any]:
    places = [
        {"place": hit.place, "role": hit.role, "snippet": snippet(hit.content, words)}
        for hit in hits
    ]
    return asdict(info) | ({"found": places} if words else {})


def _chat(session: Session, transcript: Transcript) -> dict[str, Any]:
    turns = [asdict(turn) for turn in transcript.turns]
    return {
        "id": session.id,
        "name": session.name,
        "model": session.model,
        "system": transcript.system,
        "turns": turns,
    }
