"""A stand-in for the model hub on a loopback port: repositories, and every way to misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    """One request as it came."""

    path: str
    range: str | None
    authorization: str | None


@dataclass
class HubStandIn:
    """What the hub holds and how it behaves; tests change the fields between requests."""

    model_id: str
    files: dict[str, bytes]
    others: dict[str, dict[str, bytes]] = field(default_factory=dict)  # further repositories
    commit: str = "a" * 40
    revision: str = "main"
    status: int = 200
    statuses: dict[str, list[int]] = field(default_factory=dict)  # of a file, the next ones first
    headers: dict[str, str] = field(default_factory=dict)  # of an answer that is not 200
    absent: set[str] = field(default_factory=set)  # listed, but not there
    listing: Any = None  # answered instead of the true listing
    wrong_sha256: set[str] = field(default_factory=set)
    extra_bytes: dict[str, bytes] = field(default_factory=dict)
    drop_after: int = 0  # bytes of a file after which the connection breaks
    num_drops: int = 0  # how often it still does so
    hold_after: int = 0  # bytes of large files after which it waits
    held: threading.Event = field(default_factory=threading.Event)  # it does
    release: threading.Event = field(default_factory=threading.Event)  # it goes on
    meet: threading.Barrier | None = None  # weights are sent when as many are asked for at once
    range_status: int = 200  # answered to the rest of a file
    has_ranges: bool = True
    range_shift: int = 0  # by how much it answers another rest than was asked for
    cdn: str | None = None  # where large files are redirected to
    url: str = ""
    requests: list[Request] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Names of the files that were asked for, in order."""
        marker = f"/resolve/{self.commit}/"
        paths = [request.path for request in self.requests]
        return [unquote(path.split(marker)[1]) for path in paths if marker in path]

    def ranges(self, name: str) -> list[str | None]:
        """The Range headers of the requests for one file."""
        return [request.range for request in self.requests if request.path.endswith(f"/{name}")]

    @property
    def repositories(self) -> dict[str, dict[str, bytes]]:
        return {self.model_id: self.files, **self.others}

    def true_listing(self, model_id: str | None = None) -> dict[str, Any]:
        """As the hub answers with `blobs=true`: large files carry their SHA-256."""
        siblings = []
        for name, content in self.repositories[model_id or self.model_id].items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name in self.wrong_sha256:
                entry["blobId"] = "0" * 40
            if name.endswith((".safetensors", ".bin", ".gguf")):
                sha256 = hashlib.sha256(content).hexdigest()
                if name in self.wrong_sha256:
                    sha256 = "0" * 64
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": model_id or self.model_id, "sha": self.commit, "siblings": siblings}


@contextmanager
def serve(hub: HubStandIn) -> Iterator[HubStandIn]:
    """Run the stand-in on a free port; `hub.url` is its endpoint."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the requests are kept instead."""

    def do_GET(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        headers = self.headers
        hub.requests.append(Request(self.path, headers["Range"], headers["Authorization"]))
        path = unquote(url.path)
        model_id = next((each for each in hub.repositories if f"/{each}/re" in path), "")
        resolve = f"/{model_id}/resolve/{hub.commit}/"
        if hub.status != 200:
            self._answer(hub.status, b"no", hub.headers)
        elif path == f"/api/models/{model_id}/revision/{hub.revision}":
            if statuses := hub.statuses.get("listing"):
                self._answer(statuses.pop(0), b"no", hub.headers)
                return
            listing = hub.true_listing(model_id) if hub.listing is None else hub.listing
            self._answer(200, json.dumps(listing).encode())
        elif path.startswith(resolve) and path.removeprefix(resolve) in self._present(model_id):
            self._send_file(model_id, path.removeprefix(resolve))
        else:
            self._answer(404, b"not found", hub.headers)

    def _present(self, model_id: str) -> set[str]:
        return self.hub.repositories[model_id].keys() - self.hub.absent

    def _send_file(self, model_id: str, name: str) -> None:
        hub = self.hub
        statuses = hub.statuses.get(name)
        if statuses and (status := statuses.pop(0)) != 200:
            self._answer(status, b"no", hub.headers)
            return
        if hub.meet is not None and name.endswith(".safetensors"):
            hub.meet.wait(timeout=20)
        if hub.cdn and name.endswith(".safetensors"):
            self._answer(302, b"", {"Location": f"{hub.cdn}{self.path}"})
            return
        content, status, headers = hub.repositories[model_id][name], 200, {}
        content += hub.extra_bytes.get(name, b"")
        asked = self.headers["Range"]
        if asked and hub.range_status != 200:
            self._answer(hub.range_status, b"no")
            return
        if asked and hub.has_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            first = start + hub.range_shift
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self._answer(status, content, headers, is_file=True)

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        is_file: bool = False,
    ) -> None:
        hub = self.hub
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if is_file and hub.num_drops and len(body) > hub.drop_after:
            hub.num_drops -= 1
            body = body[: hub.drop_after]
        with contextlib.suppress(ConnectionError):  # whoever asked had enough
            if is_file and 0 < hub.hold_after < len(body):
                self.wfile.write(body[: hub.hold_after])
                hub.held.set()
                hub.release.wait(timeout=60)
                body = body[hub.hold_after :]
            self.wfile.write(body)
