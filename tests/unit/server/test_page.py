"""The page's files: all from memory, open to all who name this host, and nothing else is."""

from __future__ import annotations

import builtins
import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from chatserve.server import page as page_module
from chatserve.server.edge import AccessPolicy, Edge
from chatserve.server.error_response import install_error_handlers
from chatserve.server.page import FOR_EVER, LOOK_AGAIN, Page, read
from tests.asgi import Answer, request

HOST = ("host", "127.0.0.1")
SCRIPT = "/assets/index-Ab3_x-9z.js"
CODE = b"console.log(1)\n" * 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "assets").mkdir()
    for name, data in {
        "index.html": b"<!doctype html><title>chat</title>",
        "status.html": b"<!doctype html><title>status</title>",
        "favicon.svg": b"<svg/>",
        "assets/index-Ab3_x-9z.js": CODE,
        "assets/index-Ab3_x-9z.js.gz": gzip.compress(CODE, mtime=0),
        "assets/small-Ab3_x-9z.css": b"a{}",
        "assets/small-Ab3_x-9z.css.gz": gzip.compress(b"a{}", mtime=0),
        "assets/licences.txt": b"MIT",
        ".hidden.html": b"no",
        "notes.md": b"no",
        "index-Ab3_x-9z.js.map": b"no",
    }.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def edge(folder: Path) -> Edge:
    return site(Page(read(folder)))


def site(page: Page, **options: Any) -> Edge:
    app = FastAPI(redirect_slashes=False, openapi_url=None, docs_url=None, redoc_url=None)
    page.add_to(app)
    install_error_handlers(app)
    policy = AccessPolicy.build("127.0.0.1", api_keys=["k"], **options)
    return Edge(app, policy, open_pages=page.paths)


def get(edge: Edge, path: str, *headers: tuple[str, str], method: str = "GET") -> Answer:
    return request(edge, method, path, headers=[HOST, *headers])


def test_every_file_has_its_path_and_kind(edge: Edge) -> None:
    kinds = {
        "/": "text/html; charset=utf-8", "/status": "text/html; charset=utf-8",
        "/favicon.svg": "image/svg+xml; charset=utf-8", SCRIPT: "text/javascript; charset=utf-8",
        "/assets/small-Ab3_x-9z.css": "text/css; charset=utf-8",
        "/assets/licences.txt": "text/plain; charset=utf-8",
    }  # fmt: skip
    for path, kind in kinds.items():
        answer = get(edge, path)
        assert (answer.status, answer.headers["content-type"]) == (200, kind)
        assert answer.headers["content-length"] == str(len(answer.body))
    assert edge._open_pages == set(kinds)


def test_headers_of_every_file(edge: Edge) -> None:
    for path in edge._open_pages:
        headers = get(edge, path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
        assert not any(name.startswith("access-control-") for name in headers)


def test_names_with_a_hash_are_kept_for_ever_and_others_looked_at_again(edge: Edge) -> None:
    kept = {path: get(edge, path).headers["cache-control"] for path in edge._open_pages}
    assert {path for path, how in kept.items() if how == FOR_EVER} == {
        SCRIPT, "/assets/small-Ab3_x-9z.css",
    }  # fmt: skip
    assert {how for how in kept.values()} == {FOR_EVER, LOOK_AGAIN}


@pytest.mark.parametrize(
    ("accepted", "is_packed"),
    [
        ("gzip", True), ("br, gzip;q=0.5", True), ("GZIP", True), ("deflate, gzip, br", True),
        (None, False), ("", False), ("br", False), ("gzip;q=0", False), ("gzip; q=0.000", False),
        ("xgzip", False), ("identity", False),
    ],
)  # fmt: skip
def test_packed_for_those_who_take_it(accepted: str | None, is_packed: bool, edge: Edge) -> None:
    answer = get(edge, SCRIPT, *([] if accepted is None else [("accept-encoding", accepted)]))
    assert answer.headers.get("content-encoding") == ("gzip" if is_packed else None)
    assert answer.headers["vary"] == "Accept-Encoding"
    assert len(answer.body) < 200 if is_packed else answer.body == CODE
    assert (gzip.decompress(answer.body) if is_packed else answer.body) == CODE


def test_what_packing_makes_larger_goes_as_it_is(edge: Edge) -> None:
    answer = get(edge, "/assets/small-Ab3_x-9z.css", ("accept-encoding", "gzip"))
    assert (answer.body, "content-encoding" in answer.headers) == (b"a{}", False)


def test_what_the_browser_has_is_not_sent_again(edge: Edge) -> None:
    gzipped = ("accept-encoding", "gzip")
    tag, packed = get(edge, SCRIPT).headers["etag"], get(edge, SCRIPT, gzipped).headers["etag"]
    assert tag != packed
    for given in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        again = get(edge, SCRIPT, ("if-none-match", given))
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
        assert "content-security-policy" in again.headers
    assert get(edge, SCRIPT, gzipped, ("if-none-match", packed)).status == 304
    # of the other form it has nothing
    assert get(edge, SCRIPT, ("if-none-match", packed)).status == 200
    assert get(edge, SCRIPT, ("if-none-match", tag.strip('"'))).status == 200


def test_head_says_what_get_would(edge: Edge) -> None:
    told = get(edge, SCRIPT, method="HEAD")
    assert (told.status, told.headers["content-length"]) == (200, str(len(CODE)))


NOT_THERE = (
    "/index.html", "/status.html", "/status/", "//", "/assets/", "/assets", "/notes.md",
    "/.hidden.html", "/index-Ab3_x-9z.js.map", "/assets/index-Ab3_x-9z.js.gz", "/assets/other.js",
    "/assets/../../../../etc/passwd", "/../page.py", "/assets/..%2f..%2fpage.py",
    "/assets/index-Ab3_x-9z.js\x00", "/assets/index-Ab3_x-9z.js/", "/ASSETS/index-Ab3_x-9z.js",
    "/etc/passwd", "/assets//etc/passwd", "/page.py", "/web/static/index.html", "/Status",
)  # fmt: skip


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, edge: Edge) -> Iterator[list[str]]:
    """Whatever is opened once the page has been read."""
    seen: list[str] = []
    real = io.open

    def spy(file: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(str(file))
        return real(file, *arguments, **options)

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        seen.append(str(path))
        return real_stat(path, *arguments, **options)

    real_stat = os.stat
    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "open", lambda path, *_, **__: seen.append(str(path)))
    yield seen
    monkeypatch.undo()


def test_no_path_of_a_request_reaches_the_disk(edge: Edge, opened: list[str]) -> None:
    key = ("authorization", "Bearer k")
    answers = {path: (get(edge, path).status, get(edge, path, key).status) for path in NOT_THERE}
    served = [get(edge, path).status for path in edge._open_pages]
    seen = [each for each in opened if each in NOT_THERE or "etc" in each or "page" in each]
    assert seen == []
    # denied by default: what is not the page's needs a key, even to hear that it is not there
    assert set(answers.values()) == {(401, 404)}
    assert set(served) == {200}


def test_only_to_get_it_needs_no_key(edge: Edge) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"):
        for path in edge._open_pages:
            assert get(edge, path, method=method).status == 401, method


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_another_host_gets_nothing(host: str, edge: Edge) -> None:
    for path in edge._open_pages:
        answer = request(edge, "GET", path, headers=[("host", host)])
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")


def test_without_a_build_there_is_one_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_bytes(b"left over")
    for folder in (tmp_path, tmp_path / "missing"):
        edge = site(Page(read(folder)))
        assert edge._open_pages == {"/", "/status"}
        answer = get(edge, "/")
        assert answer.status == 503
        assert b"make page" in answer.body and b"<script" not in answer.body
        assert answer.headers["content-type"].startswith("text/html")
        assert "content-security-policy" in answer.headers


def test_the_package_s_own_files_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    page_module.built.cache_clear()
    calls = []
    monkeypatch.setattr(page_module, "read", lambda folder: calls.append(str(folder)) or {})
    Page(), Page()
    page_module.built.cache_clear()
    (folder,) = calls
    assert folder.endswith("static")
