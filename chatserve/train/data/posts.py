"""Posts.xml of a Stack Exchange dump: one row a line, each read as a document of its own.

So a broken row is one broken row, and reading can go on at any line. A document type is refused:
entities of its making could be bombs, or files of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from xml.parsers import expat

from chatserve.train.data.lines import MAX_LINE_BYTES, Line, lines_from
from chatserve.train.data.records import (
    Answer,
    BadRow,
    BadSource,
    Credit,
    Question,
    Record,
    checked_number,
    checked_text,
)
from chatserve.train.data.rows import Row, named_id

_QUESTION, _ANSWER = 1, 2
_DECLARATION = re.compile(rb"""<\?xml\b[^>]*?(?:encoding=["']([A-Za-z0-9._-]+)["'])?\s*\?>\s*""")
_BOM = b"\xef\xbb\xbf"
_FRAME = (b"<posts>", b"</posts>", b"<posts/>", b"")


def read_posts(
    path: Path, site: str | None, license: str, offset: int = 0, number: int = 0
) -> Iterator[Row]:
    """The rows of a dump from a line on. `site`: its address, for names and attribution.

    Raises `BadSource` for a document type and for what is not in UTF-8.
    """
    pending: list[Line] = []
    has_ended = False
    with path.open("rb") as file:
        for line in lines_from(file, offset, number):
            text = (line.text or b"").removeprefix(_BOM).strip()
            if line.number == 1:
                text = _without_declaration(path, text)
            if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
                raise BadSource(
                    f"{path.name}, line {line.number}: declares a document type, which no dump "
                    "does and which could be a trap; nothing of it was read"
                )
            number = line.number
            if pending and (text.startswith(b"<row") or text in _FRAME[:2]):
                yield _row(pending, site, license)
                pending = []
            if pending:
                pending.append(line)
            elif line.text is not None and text in _FRAME:
                has_ended = has_ended or text in _FRAME[1:3]
                yield Row(line.end, line.number, f"line {line.number}")
                continue
            else:
                pending = [line]
            is_too_long = sum(len(part.text or b"") for part in pending) > MAX_LINE_BYTES
            if text.endswith(b"/>") or line.text is None or is_too_long:
                yield _row(pending, site, license)
                pending = []
        if pending:
            yield _row(pending, site, license)
        if not has_ended:
            yield Row(file.tell(), number, f"after line {number}", (), "the end is missing")


def _without_declaration(path: Path, text: bytes) -> bytes:
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadSource(f"{path.name} is in UTF-16; convert it to UTF-8 first")
    found = _DECLARATION.match(text)
    if found is None:
        return text
    encoding = (found[1] or b"utf-8").decode("ascii")
    if encoding.lower() not in ("utf-8", "us-ascii", "ascii"):
        raise BadSource(f"{path.name} is in {encoding}; convert it to UTF-8 first")
    return text[found.end() :]


def _row(lines: list[Line], site: str | None, license: str) -> Row:
    first, last = lines[0], lines[-1]
    where = f"line {first.number}"
    try:
        if any(line.text is None for line in lines):
            raise BadRow(f"is longer than {MAX_LINE_BYTES >> 20} MiB")
        text = b"".join(line.text or b"" for line in lines).removeprefix(_BOM).strip()
        if first.number == 1 and (found := _DECLARATION.match(text)):
            text = text[found.end() :]
        record = _record(_attributes(text), site, license)
    except BadRow as error:
        return Row(last.end, last.number, where, (), str(error))
    return Row(last.end, last.number, where, () if record is None else (record,))


def _attributes(text: bytes) -> dict[str, str]:
    """The attributes of one `<row …/>`. Raises `BadRow`."""
    found: list[tuple[str, dict[str, str]]] = []
    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler = lambda name, attributes: found.append((name, attributes))
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise BadRow(f"malformed XML: {expat.errors.messages[error.code]}") from None
    if len(found) != 1 or found[0][0] != "row":
        raise BadRow("is no <row …/>")
    return found[0][1]


def _record(row: dict[str, str], site: str | None, license: str) -> Record | None:
    """A question or an answer; None for the other kinds of posts."""
    kind = checked_number(row.get("PostTypeId"), "PostTypeId")
    post_id = checked_number(row.get("Id"), "Id")
    if kind not in (_QUESTION, _ANSWER):
        return None
    text = checked_text(row.get("Body"), "Body")
    user = row.get("OwnerUserId")
    path = f"questions/{post_id}" if kind == _QUESTION else f"a/{post_id}"
    credit = Credit(
        url=f"{site}/{path}" if site else None,
        author=row.get("OwnerDisplayName") or (f"user {user}" if user else None),
        author_url=f"{site}/users/{user}" if site and user else None,
        license=row.get("ContentLicense") or license,
    )
    host = urlsplit(site).hostname if site else None
    if kind == _QUESTION:
        accepted = row.get("AcceptedAnswerId")
        if accepted is not None:
            accepted = str(checked_number(accepted, "AcceptedAnswerId"))
        return Question(named_id(host, post_id), text, accepted, credit)
    parent_id = checked_number(row.get("ParentId"), "ParentId")
    votes = checked_number(row.get("Score"), "Score")
    return Answer(named_id(host, parent_id), str(post_id), text, votes, None, False, credit)
