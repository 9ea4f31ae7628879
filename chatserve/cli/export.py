"""A conversation for others to read: Markdown, a page, or the messages of an OpenAI request.

Knows transcripts and text; the files are written by whoever asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from chatserve.cli.transcript import Transcript, path_of, write_file
from chatserve.errors import UsageError


def as_markdown(transcript: Transcript, title: str, model: str) -> str:
    parts = [f"# {' '.join(title.split())}"]
    if model:
        parts.append(f"Model: `{' '.join(model.split())}`")
    if transcript.system:
        parts.append(f"## System\n\n{transcript.system}")
    for turn in transcript.turns:
        name = "Question" if turn.role == "user" else "Answer"
        broke_off = " (broke off)" if turn.is_partial else ""
        parts.append(f"## {name}{broke_off}\n\n{turn.content}".rstrip())
    return "\n\n".join(parts) + "\n"


def as_openai(transcript: Transcript, title: str, model: str) -> str:
    """What can be sent to `/v1/chat/completions` again."""
    table = {"model": model, "messages": transcript.messages()}
    return json.dumps(table, ensure_ascii=False, indent=1) + "\n"


def as_page(transcript: Transcript, title: str, model: str) -> str:
    from chatserve.cli.html_page import page_of  # late: a chat begins without Markdown's parser

    return page_of(transcript, title, model)


FORMATS: Mapping[str, Callable[[Transcript, str, str], str]] = {
    ".md": as_markdown,
    ".html": as_page,
    ".json": as_openai,
}


def export(transcript: Transcript, file: str, model: str) -> tuple[Path, bool]:
    """Write `file` in the form that its end names; where it went, and whether over another file.

    Raises `UsageError`.
    """
    path = path_of(file, "export to")
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise UsageError(
            f"cannot export to {file}: the name must end in .md (Markdown), .html (a page) or "
            ".json (an OpenAI request); /save writes FastChat's form"
        )
    return write_file(path, form(transcript, title_of(transcript), model), "export")


def title_of(transcript: Transcript) -> str:
    """How the first question begins."""
    places = transcript.questions()
    first = transcript.turns[places[0]].content if places else ""
    return " ".join(first.split())[:60] or "Chat"
