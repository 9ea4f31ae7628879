"""The page at `/`: the files that `make page` has built, from memory.

All of them are read once, by name, out of the package: nothing that a request says reaches the file
system. They are the same for everybody, so they are open where all else wants a key. Knows no
conversation and no model.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

PAGES = {"index.html": "/", "status.html": "/status"}
"""Files with a path of their own; every other one is found by its name."""
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "font-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # no text becomes elements but through the sanitizer
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Origin-Agent-Cluster": "?1",
    "Permissions-Policy": (
        "accelerometer=(), camera=(), display-capture=(), geolocation=(), "
        "gyroscope=(), hid=(), magnetometer=(), microphone=(), midi=(), payment=(), serial=(), "
        "usb=()"
    ),
    "Vary": "Accept-Encoding",
}
# what has its own hash in its name never changes
_HASHED = re.compile(r"/assets/.+-[A-Za-z0-9_-]{8}\.[a-z0-9]+")
FOR_EVER = "public, max-age=31536000, immutable"
LOOK_AGAIN = "no-cache"
_PACKED = ".gz"
_NOT_BUILT = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>chatserve</title>
<h1>chatserve</h1>
<p>The server runs, and its API is at <code>/v1</code>. This page was not built:
run <code>make page</code> in the source folder (it needs Node), then start the server again.
"""


@dataclass(frozen=True)
class Body:
    """What goes over the wire, and the tag by which it is known again."""

    data: bytes
    tag: str

    @classmethod
    def of(cls, data: bytes) -> Body:
        return cls(data, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


@dataclass(frozen=True)
class StaticFile:
    """`packed`: the same in gzip, where there is something to gain."""

    kind: str
    plain: Body
    packed: Body | None
    cached: str
    status: int = 200

    def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "Cache-Control": self.cached}
        body = self.plain
        if self.packed is not None and _takes_gzip(request.headers.getlist("accept-encoding")):
            body = self.packed
            headers["Content-Encoding"] = "gzip"
        headers["ETag"] = body.tag
        if _has(request.headers.getlist("if-none-match"), body.tag):
            headers.pop("Content-Encoding", None)
            return Response(status_code=304, headers=headers)
        return Response(body.data, self.status, headers, media_type=self.kind)


Files = Mapping[str, StaticFile]
"""By path."""


class Page:
    """Serves `files`; those of the package unless told otherwise."""

    def __init__(self, files: Files | None = None) -> None:
        self._files = built() if files is None else files

    @property
    def paths(self) -> frozenset[str]:
        """Every one there is: whoever asks for another gets nothing without a key."""
        return frozenset(self._files)

    def add_to(self, app: FastAPI) -> None:
        # no part of the API: /openapi.json says nothing of it
        for path in self._files:
            app.add_route(path, self._answer, methods=["GET"])

    async def _answer(self, request: Request) -> Response:
        return self._files[request.scope["path"]].answer(request)


@functools.cache
def built() -> Files:
    """What `make page` has left in the package, or one page that says so."""
    return read(resources.files("chatserve") / "web" / "static")


def read(folder: Traversable) -> Files:
    """The files of `folder`, with what is packed beside them."""
    found = dict(_walk(folder)) if folder.is_dir() else {}
    if "index.html" not in found:
        body = Body.of(_NOT_BUILT.encode())
        missing = StaticFile(KINDS[".html"], body, None, LOOK_AGAIN, status=503)
        return dict.fromkeys(PAGES.values(), missing)
    return {
        PAGES.get(name, f"/{name}"): _file(name, found) for name in found if _suffix(name) in KINDS
    }


def _walk(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name, entry.read_bytes()


def _file(name: str, found: Mapping[str, bytes]) -> StaticFile:
    packed = found.get(name + _PACKED)
    is_hashed = _HASHED.fullmatch(f"/{name}") is not None
    return StaticFile(
        KINDS[_suffix(name)],
        Body.of(found[name]),
        Body.of(packed) if packed is not None and len(packed) < len(found[name]) else None,
        FOR_EVER if is_hashed else LOOK_AGAIN,
    )


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]


def _takes_gzip(values: list[str]) -> bool:
    for each in ",".join(values).split(","):
        coding, _, weight = each.partition(";")
        if coding.strip().lower() == "gzip":
            return not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight)
    return False


def _has(values: list[str], tag: str) -> bool:
    """Whether `If-None-Match` names the tag; a proxy may have made it a weak one."""
    given = [each.strip().removeprefix("W/") for each in ",".join(values).split(",")]
    return "*" in given or tag in given
