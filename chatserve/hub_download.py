"""Download one model folder from the hub: byte progress, resume inside a file, checksums.

Speaks the hub's HTTP API. What came stays in a hidden partial folder, so an interrupted download
goes on where it stopped; the final name appears when every file is there and checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from chatserve import __version__, cache
from chatserve.errors import HubError
from chatserve.progress import Progress

RECORD = "chatserve-hub.json"

_MAX_STALLS = 3
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_SMALL_FILES = frozenset(
    {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "chat_template.json",
    }
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `sha256` is known for large files only."""

    name: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class HubClient:
    """One model at one revision on one hub."""

    http: httpx.Client
    endpoint: str
    model_id: str
    revision: str

    def list_files(self) -> tuple[str, list[RemoteFile]]:
        """The commit of the revision and its files. Raises `HubError`."""
        url = f"{self.endpoint}/api/models/{self.model_id}/revision/{quote(self.revision, safe='')}"
        try:
            response = self.http.get(url, params={"blobs": "true"})
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._check(response)
        try:
            return _parse_listing(response.json())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HubError(
                f"{self.endpoint} does not answer like a model hub; check HF_ENDPOINT"
            ) from error

    def fetch(self, commit: str, file: RemoteFile, part: Path) -> Iterator[int]:
        """Complete `part`, which may hold a beginning; gives its bytes so far again and again.

        Raises `HubError`.
        """
        url = f"{self.endpoint}/{self.model_id}/resolve/{commit}/{quote(file.name)}"
        part.touch()
        if part.stat().st_size > file.num_bytes:
            os.truncate(part, 0)
        num_stalls = 0
        while (before := part.stat().st_size) < file.num_bytes:
            yield before
            try:
                yield from self._append(url, file, part)
                dropped: httpx.HTTPError | None = None
            except httpx.HTTPError as error:
                dropped = error
            num_stalls = 0 if part.stat().st_size > before else num_stalls + 1
            if num_stalls == _MAX_STALLS:
                raise self._unreachable(dropped) from dropped

    def _append(self, url: str, file: RemoteFile, part: Path) -> Iterator[int]:
        start = part.stat().st_size
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self.http.stream("GET", url, headers=headers) as response:
            self._check(response)
            is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            done = start if is_rest else 0
            with open(part, "r+b") as target:
                target.seek(done)
                target.truncate()
                # No chunk size: what httpx gathers for one is lost when the connection breaks.
                for chunk in response.iter_bytes():
                    done += len(chunk)
                    if done > file.num_bytes:
                        raise HubError(
                            f"{self.endpoint} sends more than the {file.num_bytes} bytes of "
                            f"{file.name}; check HF_ENDPOINT or try again later"
                        )
                    target.write(chunk)
                    yield done

    def _check(self, response: httpx.Response) -> None:
        status, model = response.status_code, f"{self.model_id} (revision {self.revision})"
        if status in (200, 206):
            return
        if status == 401:
            raise HubError(
                f"the hub does not show {model} without a login: private, gated or misspelt; check "
                "the name, or log in with `hf auth login` or HF_TOKEN"
            )
        if status == 403:
            raise HubError(
                f"the hub refuses {model} to this account; accept its terms on its page there and "
                "log in with `hf auth login` or HF_TOKEN"
            )
        if status == 404:
            raise HubError(f"the hub at {self.endpoint} has no {model}; check the spelling")
        raise HubError(
            f"the hub at {self.endpoint} answers {status} for {model}; try again later, what has "
            "come is kept"
        )

    def _unreachable(self, error: httpx.HTTPError | None) -> HubError:
        reason = f"{type(error).__name__}: {error}".rstrip(": ") if error else "no data comes"
        return HubError(
            f"cannot reach the hub at {self.endpoint} for {self.model_id} ({reason}); check the "
            "connection, set HF_ENDPOINT to a mirror, or pass a local folder"
        )


def download(
    model_id: str,
    revision: str,
    target: Path,
    *,
    endpoint: str,
    token: str | None,
    progress: Progress,
) -> None:
    """Download the model into the folder `target`, which is absent or incomplete.

    Raises `HubError` when the hub is unreachable or refuses, a checksum is wrong, the disk is full.
    """
    headers = {"User-Agent": f"chatserve/{__version__}", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    partial = target.with_name(f".partial-{target.name}")
    with (
        httpx.Client(headers=headers, timeout=_TIMEOUT, follow_redirects=True) as http,
        cache.writing_to(target.parent),
        _lock(target),
    ):
        client = HubClient(http, endpoint, model_id, revision)
        commit, remote = client.list_files()
        files = choose_files(remote, model_id)
        _adopt(target, partial, commit)
        cache.write_record(
            partial / RECORD, {"id": model_id, "revision": revision, "commit": commit}
        )
        _fetch_all(client, commit, files, partial, progress)
        cache.publish(partial, target)


def choose_files(files: Sequence[RemoteFile], model_id: str) -> list[RemoteFile]:
    """Config, tokenizer and one set of weights: safetensors, else `.bin`; never code.

    Raises `HubError` when there are no weights that chatserve reads.
    """
    by_name = {file.name: file for file in files}
    small = [file for file in files if file.name in _SMALL_FILES]
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = f"{stem}.{suffix}", f"{stem}.{suffix}.index.json"
        if single in by_name:
            return [*small, by_name[single]]
        if index in by_name:
            shard = re.compile(rf"{stem}-\d+-of-\d+\.{suffix}")
            return [*small, by_name[index], *(f for f in files if shard.fullmatch(f.name))]
    if any(name.endswith(".gguf") for name in by_name):
        raise HubError(
            f"{model_id} holds GGUF files; download one of them yourself and pass its path"
        )
    if "adapter_config.json" in by_name:
        raise HubError(f"{model_id} is an adapter, not a whole model; name its base model instead")
    raise HubError(f"{model_id} holds no safetensors or .bin weights; name another model")


def _parse_listing(answer: Any) -> tuple[str, list[RemoteFile]]:
    commit = answer["sha"]
    if not _COMMIT.fullmatch(commit):
        raise ValueError(commit)
    files = []
    for entry in answer["siblings"]:
        name, num_bytes = entry["rfilename"], entry["size"]
        sha256 = (entry.get("lfs") or {}).get("sha256")
        if not isinstance(name, str) or type(num_bytes) is not int or num_bytes < 0:
            raise ValueError(name)
        files.append(RemoteFile(name, num_bytes, sha256))
    return commit, files


def _adopt(target: Path, partial: Path, commit: str) -> None:
    """Make `partial` hold what came before of the same commit, and nothing else."""
    if target.exists():  # some file was deleted from it: the others are still good
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(target, partial)
    if cache.read_record(partial / RECORD).get("commit") != commit:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(exist_ok=True)


def _fetch_all(
    client: HubClient, commit: str, files: Sequence[RemoteFile], folder: Path, progress: Progress
) -> None:
    missing = [file for file in files if not _is_there(folder / file.name, file.num_bytes)]
    total = sum(file.num_bytes for file in files)
    finished = total - sum(file.num_bytes for file in missing)
    parts = {file: folder / f"{file.name}.part" for file in missing}
    came = sum(part.stat().st_size for part in parts.values() if part.exists())
    cache.require_free(folder, total - finished - came)
    progress(finished, total)
    for file, part in parts.items():
        for done in client.fetch(commit, file, part):
            progress(finished + done, total)
        _check_sum(file, part)
        os.replace(part, folder / file.name)
        finished += file.num_bytes
        progress(finished, total)


def _is_there(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _check_sum(file: RemoteFile, part: Path) -> None:
    if file.sha256 is None:
        return
    with open(part, "rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    if digest != file.sha256:
        part.unlink()
        raise HubError(
            f"{file.name} came with the SHA-256 {digest}, the hub says {file.sha256}; it was "
            "deleted, try again"
        )


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Keep a second process from writing the same files."""
    import fcntl

    path = target.with_name(f".lock-{target.name}")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HubError(
                f"another process is downloading {target.name}; wait until it is done"
            ) from error
        yield
