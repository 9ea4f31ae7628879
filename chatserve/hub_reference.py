"""What of a hub is meant: `ORG/NAME`, `ORG/NAME@REVISION`, `ORG/NAME:GGUF`. Text only.

Also the names of the folders in which it lies in the cache, and of the record in each.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatchcase

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
class Selection:
    """Patterns of file names, as a shell has them; `*` matches a `/`, too.

    `include`: nothing but what one of them matches. `exclude`: without what one of them matches.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def __str__(self) -> str:
        flags = (("--include", self.include), ("--exclude", self.exclude))
        return " ".join(f"{flag} {shlex.quote(glob)}" for flag, globs in flags for glob in globs)

    def names(self, file: str) -> bool:
        """Whether the file is asked for by name."""
        return any(fnmatchcase(file, glob) for glob in self.include)

    def drops(self, file: str) -> bool:
        return any(fnmatchcase(file, glob) for glob in self.exclude)

    def keeps(self, file: str) -> bool:
        return not self.drops(file) and (not self.include or self.names(file))


@dataclass(frozen=True)
class Reference:
    """A repository at a revision; of several GGUF files in it, which one; of its files, which."""

    model_id: str
    revision: str = DEFAULT_REVISION
    gguf: str | None = None
    selection: Selection = Selection()

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        selection = f" {self.selection}" if self.selection else ""
        return f"{self.model_id}{revision}{f':{self.gguf}' if self.gguf else ''}{selection}"

    @property
    def folder_name(self) -> str:
        """Of the whole model; a selection of its files has a folder of its own."""
        if not self.selection:
            return self._plain_name
        digest = hashlib.sha256(str(self.selection).encode()).hexdigest()
        return f"{self._plain_name}+files-{digest[:8]}"

    def gguf_folder_name(self, file: str) -> str:
        """A GGUF file has a folder of its own: beside other weights it would not be looked at."""
        return f"{self._plain_name}+{model_stem(file)}"

    @property
    def gguf_folder_prefix(self) -> str:
        """How the names of the folders begin that hold its GGUF files."""
        return f"{self._plain_name}+"

    @property
    def _plain_name(self) -> str:
        name = self.model_id.replace("/", "--")
        if self.revision == DEFAULT_REVISION:
            return name
        return f"{name}@{self.revision.replace('/', '%2F')}"  # no revision has a % in it


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
