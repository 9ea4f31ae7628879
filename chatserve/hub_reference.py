"""What of a hub is meant: `ORG/NAME`, `ORG/NAME@REVISION`, `ORG/NAME:GGUF`. Text only.

Also the names of the folders in which it lies in the cache, and of the record in each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from chatserve.errors import UsageError
from chatserve.models.gguf_names import model_stem

DEFAULT_REVISION = "main"
RECORD = "chatserve-hub.json"
"""Beside the files of a model: its id, revision and commit, or of which parts it was made."""

_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}"
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_REFERENCE = re.compile(
    rf"(?P<id>{_ID})(?:@(?P<revision>[^:@]*))?(?::(?P<gguf>\w[\w.+-]{{0,199}}))?", re.ASCII
)


@dataclass(frozen=True)
class Reference:
    """A repository at a revision; of several GGUF files in it, which one."""

    model_id: str
    revision: str = DEFAULT_REVISION
    gguf: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{self.model_id}{revision}{f':{self.gguf}' if self.gguf else ''}"

    @property
    def folder_name(self) -> str:
        name = self.model_id.replace("/", "--")
        if self.revision == DEFAULT_REVISION:
            return name
        return f"{name}@{self.revision.replace('/', '%2F')}"  # no revision has a % in it

    def gguf_folder_name(self, file: str) -> str:
        """A GGUF file has a folder of its own: beside other weights it would not be looked at."""
        return f"{self.folder_name}+{model_stem(file)}"


def parse(text: str) -> Reference | None:
    """What `text` names on a hub; None when it is not of that form.

    Raises `UsageError` when only its revision is impossible.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None or "--" in match["id"] or ".." in match["id"]:
        return None
    revision = DEFAULT_REVISION if match["revision"] is None else match["revision"]
    return Reference(match["id"], checked_revision(revision), match["gguf"])


def checked_revision(revision: str) -> str:
    """Raises `UsageError` unless it may be the name of a branch, tag or commit."""
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"{revision!r} is not a revision of a hub repository; see its page there")
    return revision
