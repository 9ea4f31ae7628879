"""One repository on one hub over HTTP: its listing, and its files with resume and patience.

What breaks off goes on where it stopped; what is refused becomes one line that says what to do.
Knows one file on disk at a time, and neither folders nor which files make a model.
"""

from __future__ import annotations

import os
import re
from asyncio import sleep
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from chatserve import __version__
from chatserve.errors import HubError

MAX_STALLS = 5
"""How often in a row a file may be asked for without one more byte of it coming."""

_FIRST_WAIT_S = 1.0
_MAX_WAIT_S = 60.0
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; large ones have a SHA-256, small ones the SHA-1 of git's blob."""

    name: str
    num_bytes: int
    sha256: str | None
    blob_sha1: str | None = None


class HubClient:
    """One model at one revision on one hub; an async context manager.

    `command` is what a user runs again after a refusal.
    """

    def __init__(
        self, endpoint: str, model_id: str, revision: str, *, token: str | None, command: str
    ) -> None:
        self._endpoint = endpoint
        self._shown = str(httpx.URL(endpoint).copy_with(userinfo=b""))  # a mirror's may be secret
        self._model_id, self._revision = model_id, revision
        self._has_token = token is not None
        self._command = command
        headers = {"User-Agent": f"chatserve/{__version__}", "Accept-Encoding": "identity"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        # httpx takes the token out when a redirect leads to another host, as the hub's library does
        self._http = httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, follow_redirects=True)

    async def __aenter__(self) -> HubClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def list_files(self) -> tuple[str, list[RemoteFile]]:
        """The commit of the revision and its files. Raises `HubError`."""
        revision = quote(self._revision, safe="")
        url = f"{self._endpoint}/api/models/{self._model_id}/revision/{revision}"
        for num_tries in range(1, MAX_STALLS + 1):
            try:
                response = await self._http.get(url, params={"blobs": "true"})
                self._check(response)
                break
            except _Busy as busy:
                if num_tries == MAX_STALLS:
                    raise busy.error from busy
                await sleep(busy.wait_s(num_tries))
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
        try:
            return _parse_listing(response.json())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HubError(
                f"{self._shown} does not answer like a model hub; check HF_ENDPOINT"
            ) from error

    async def fetch(
        self, commit: str, file: RemoteFile, part: Path, report: Callable[[int], None]
    ) -> None:
        """Complete `part`, which may hold a beginning; reports its bytes so far.

        Raises `HubError`.
        """
        url = f"{self._endpoint}/{self._model_id}/resolve/{commit}/{quote(file.name)}"
        part.touch()
        if part.stat().st_size > file.num_bytes:
            os.truncate(part, 0)
        num_stalls = 0
        while (before := part.stat().st_size) < file.num_bytes:
            report(before)
            stall = _Busy(self._unreachable(None))
            try:
                await self._append(url, file, part, report)
            except httpx.HTTPError as error:
                stall = _Busy(self._unreachable(error))
            except _Busy as busy:
                stall = busy
            if part.stat().st_size > before:
                num_stalls = 0
                continue
            num_stalls += 1
            if num_stalls == MAX_STALLS:
                raise stall.error from stall
            await sleep(stall.wait_s(num_stalls))
        report(file.num_bytes)

    async def _append(
        self, url: str, file: RemoteFile, part: Path, report: Callable[[int], None]
    ) -> None:
        start = part.stat().st_size
        headers = {"Range": f"bytes={start}-"} if start else {}
        async with self._http.stream("GET", url, headers=headers) as response:
            if response.status_code == 416:  # so what is here cannot be a beginning of it
                os.truncate(part, 0)
                raise _Busy(self._strange(f"has no bytes {start}- of {file.name}"))
            self._check(response, file.name)
            is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if response.status_code == 206 and not is_rest:
                raise _Busy(self._strange(f"sends another part of {file.name} than was asked for"))
            done = start if is_rest else 0
            with open(part, "r+b") as target:
                target.seek(done)
                target.truncate()
                # No chunk size: what httpx gathers for one is lost when the connection breaks.
                async for chunk in response.aiter_bytes():
                    done += len(chunk)
                    if done > file.num_bytes:
                        raise self._strange(
                            f"sends more than the {file.num_bytes} bytes of {file.name}"
                        )
                    target.write(chunk)
                    report(done)

    def _check(self, response: httpx.Response, file: str | None = None) -> None:
        """Raises `HubError`, or `_Busy` for what may be over soon."""
        status, model = response.status_code, f"{self._model_id} (revision {self._revision})"
        if status in (200, 206):
            return
        if status in _BUSY:
            raise _Busy(
                HubError(
                    f"the hub at {self._shown} answers {status} for {model}; try again later, "
                    "what has come is kept"
                ),
                response.headers.get("Retry-After"),
            )
        if not _is_same_origin(response.url, httpx.URL(self._endpoint)):
            raise HubError(
                f"{response.url.host}, where the hub keeps the files of {model}, answers {status}; "
                "try again later, what has come is kept"
            )
        if status in (401, 403):
            raise HubError(self._refusal(response, model))
        if status == 404:
            raise HubError(self._nothing(response, model, file))
        raise HubError(
            f"the hub at {self._shown} answers {status} for {model}; check HF_ENDPOINT, or try "
            "again later"
        )

    def _refusal(self, response: httpx.Response, model: str) -> str:
        login = f"`HF_TOKEN=YOUR_TOKEN {self._command}` (or `hf auth login` once)"
        reason = response.headers.get("X-Error-Message", "")
        if self._has_token and "Invalid credentials" in reason:
            return (
                f"the hub does not know the token that was sent for {model}: HF_TOKEN or the login "
                f"is wrong or has expired; make a new one, then {login}"
            )
        if response.status_code == 403 or response.headers.get("X-Error-Code") == "GatedRepo":
            whose = "of that account" if self._has_token else "of your account"
            return (
                f"{model} is gated, the hub refuses it: accept its licence on its page there, then "
                f"run it with a token {whose}: {login}"
            )
        return (
            f"the hub does not show {model} without a login that may see it: misspelt, private, or "
            f"its licence has to be accepted on its page first; then {login}"
        )

    def _nothing(self, response: httpx.Response, model: str, file: str | None) -> str:
        if file is not None:
            return (
                f"the hub at {self._shown} lists {file} of {model}, but does not have it; the "
                "repository is incomplete, try another revision"
            )
        if response.headers.get("X-Error-Code") == "RevisionNotFound":
            return f"the hub's {self._model_id} has no revision {self._revision!r}; see its page"
        return f"the hub at {self._shown} has no {model}; check the spelling"

    def _strange(self, what: str) -> HubError:
        return HubError(f"{self._shown} {what}; check HF_ENDPOINT or try again later")

    def _unreachable(self, error: httpx.HTTPError | None) -> HubError:
        reason = f"{type(error).__name__}: {error}".rstrip(": ") if error else "no data comes"
        return HubError(
            f"cannot reach the hub at {self._shown} for {self._model_id} ({reason}); check the "
            "connection, set HF_ENDPOINT to a mirror, or pass a local folder"
        )


class _Busy(Exception):
    """An answer after which it is worth to ask again; `error` where it has been asked enough."""

    def __init__(self, error: HubError, retry_after: str | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self._retry_after = retry_after

    def wait_s(self, num_stalls: int) -> float:
        """Seconds until the next try: what the hub asks for, else twice as long each time."""
        asked = self._retry_after or ""
        wait_s = float(asked) if asked.isdecimal() else 0.0
        return min(max(wait_s, _FIRST_WAIT_S * float(1 << (num_stalls - 1))), _MAX_WAIT_S)


def _is_same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


def _parse_listing(answer: Any) -> tuple[str, list[RemoteFile]]:
    commit = answer["sha"]
    if not _COMMIT.fullmatch(commit):
        raise ValueError(commit)
    files: dict[str, RemoteFile] = {}
    for entry in answer["siblings"]:
        name, num_bytes = entry["rfilename"], entry["size"]
        if not isinstance(name, str) or type(num_bytes) is not int or num_bytes < 0:
            raise ValueError(name)
        if name in files:
            raise ValueError(name)
        lfs = entry.get("lfs") or {}
        # of a large file, git knows a note with its SHA-256 only
        blob = None if lfs else entry.get("blobId")
        is_sha1 = isinstance(blob, str) and _COMMIT.fullmatch(blob)
        files[name] = RemoteFile(name, num_bytes, lfs.get("sha256"), blob if is_sha1 else None)
    return commit, list(files.values())
