"""Download one repository of the hub into a folder: in parallel, resumed, checked file by file.

What came stays in a hidden partial folder, so an interrupted download goes on where it stopped; the
final name appears when every file is there and checked. Knows no HTTP and no format of weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from chatserve import cache
from chatserve.errors import HubError
from chatserve.hub_client import HubClient, RemoteFile
from chatserve.hub_files import Choice, choose_files, shards
from chatserve.hub_reference import RECORD, Reference
from chatserve.progress import Progress

MAX_CONNECTIONS = 4

_MAX_TRIES = 2
_PART_BYTES = 16 << 20


class Download:
    """One repository on its way into a folder below `parent`.

    A context manager that keeps other processes away: `prepare`, then `fetch`. All methods raise
    `HubError` when the hub is unreachable or refuses, a checksum is wrong, the disk is full.
    """

    def __init__(
        self,
        reference: Reference,
        parent: Path,
        *,
        endpoint: str,
        token: str | None,
        command: str | None = None,
    ) -> None:
        self.reference = reference
        self._parent = parent
        self._endpoint, self._token = endpoint, token
        self._command = command or f"chatserve pull {reference}"
        self._locks = contextlib.ExitStack()
        self._commit = ""
        self._files: tuple[RemoteFile, ...] = ()
        self._gguf: str | None = None
        self._target = parent / reference.folder_name

    def __enter__(self) -> Download:
        with cache.writing_to(self._parent):
            self._locks.enter_context(lock(self._parent, self.reference.folder_name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._locks.close()

    @property
    def folder(self) -> Path:
        """Where the files lie while they come; after `prepare` the small ones are there."""
        return self._target.with_name(f".partial-{self._target.name}")

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self._files)

    @property
    def missing_bytes(self) -> int:
        """What has still to come."""
        return self.num_bytes - sum(self._come(file) for file in self._files)

    def prepare(self) -> None:
        """Ask the hub what there is and fetch the small files."""
        with cache.writing_to(self._parent):
            asyncio.run(self._run(self._prepare))

    def fetch(self, progress: Progress) -> Path:
        """Fetch the rest; the finished folder, or the GGUF file in it."""
        with cache.writing_to(self._parent):
            cache.require_free(self._parent, self.missing_bytes)
            asyncio.run(self._run(lambda client: self._fetch(client, self._files, progress)))
            cache.publish(self.folder, self._target)
        return self._target / self._gguf if self._gguf else self._target

    async def _run(self, work: Callable[[HubClient], Awaitable[None]]) -> None:
        reference = self.reference
        async with HubClient(
            self._endpoint, reference.model_id, reference.revision,
            token=self._token, command=self._command,
        ) as client:  # fmt: skip
            await work(client)

    async def _prepare(self, client: HubClient) -> None:
        reference = self.reference
        self._commit, remote = await client.list_files()
        choice = choose_files(remote, reference.model_id, reference.gguf, reference.selection)
        if choice.gguf is not None:
            self._gguf = choice.gguf
            self._target = self._parent / reference.gguf_folder_name(choice.gguf)
        self._adopt()
        await self._fetch(client, choice.small, lambda done, total: None)
        self._files = (*choice.small, *self._weights(choice, remote))

    def _weights(self, choice: Choice, remote: Sequence[RemoteFile]) -> Sequence[RemoteFile]:
        if choice.index is None:
            return choice.weights
        found = shards(self.folder, choice.index, remote, self.reference.model_id)
        return [file for file in found if self.reference.selection.keeps(file.name)]

    def _adopt(self) -> None:
        """Make the partial folder hold what came before of the same commit, and nothing else."""
        if self._target.exists():  # some file was deleted from it: the others are still good
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self._target, self.folder)
        if cache.read_record(self.folder / RECORD).get("commit") != self._commit:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        record = {"id": self.reference.model_id, "revision": self.reference.revision}
        if self._gguf:
            record["gguf"] = self._gguf
        elif self.reference.selection:
            record["selection"] = str(self.reference.selection)
        cache.write_record(self.folder / RECORD, {**record, "commit": self._commit})

    async def _fetch(
        self, client: HubClient, files: Sequence[RemoteFile], progress: Progress
    ) -> None:
        """Complete `files`, a few at a time; the first failure ends the others."""
        come = {file.name: self._come(file) for file in files}
        total = sum(file.num_bytes for file in files)
        connections = asyncio.Semaphore(MAX_CONNECTIONS)

        async def fetch_one(file: RemoteFile) -> None:
            def report(num_bytes: int) -> None:
                come[file.name] = num_bytes
                progress(sum(come.values()), total)

            async with connections:
                await _fetch_checked(client, self._commit, file, self.folder, report)

        progress(sum(come.values()), total)
        missing = [file for file in files if not _is_there(self.folder, file)]
        try:
            async with asyncio.TaskGroup() as group:
                for file in missing:
                    group.create_task(fetch_one(file))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _come(self, file: RemoteFile) -> int:
        """Bytes of the file that are here, checked or not yet."""
        if _is_there(self.folder, file):
            return file.num_bytes
        part = _part(self.folder, file)
        return min(part.stat().st_size, file.num_bytes) if part.exists() else 0


@contextlib.contextmanager
def lock(parent: Path, name: str) -> Iterator[None]:
    """Keep a second process from making the same thing. Raises `HubError` when one does."""
    import fcntl  # POSIX only

    with open(parent / f".lock-{name}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HubError(
                f"another process is downloading {name}; wait until it is done"
            ) from error
        yield


async def _fetch_checked(
    client: HubClient, commit: str, file: RemoteFile, folder: Path, report: Callable[[int], None]
) -> None:
    """Complete one file; what has the wrong checksum is thrown away and fetched once more."""
    part = _part(folder, file)
    for num_tries in range(1, _MAX_TRIES + 1):
        await client.fetch(commit, file, part, report)
        wrong = await _wrong_sum(file, part)
        if wrong is None:
            await asyncio.to_thread(_sync, part)
            os.replace(part, folder / file.name)
            return
        part.unlink()
        if num_tries == _MAX_TRIES:
            raise HubError(f"{file.name} {wrong}, {_MAX_TRIES} times; it was deleted, try later")


async def _wrong_sum(file: RemoteFile, part: Path) -> str | None:
    """What is wrong with the content; None when nothing is, or nothing is known to compare."""
    if file.sha256 is not None:
        digest, name, expected = hashlib.sha256(), "SHA-256", file.sha256
    elif file.blob_sha1 is not None:
        digest, name, expected = hashlib.sha1(usedforsecurity=False), "git SHA-1", file.blob_sha1
        digest.update(b"blob %d\0" % file.num_bytes)
    else:
        return None
    with open(part, "rb") as source:
        # in a thread, so that the other files go on; in parts, so that Ctrl-C need not wait
        while content := await asyncio.to_thread(source.read, _PART_BYTES):
            await asyncio.to_thread(digest.update, content)
    found = digest.hexdigest()
    return None if found == expected else f"came with the {name} {found}, the hub says {expected}"


def _part(folder: Path, file: RemoteFile) -> Path:
    return folder / f"{file.name}.part"


def _is_there(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.num_bytes


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
