"""Files for TLS: whatever is wrong with one is said in a line that names it."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from chatserve.errors import UsageError
from chatserve.server.tls import client_context, server_context
from tests.certificates import Certificates, issue


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return issue(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return issue(tmp_path_factory.mktemp("others"))


def test_without_files_there_is_no_tls() -> None:
    assert server_context(None, None) is None
    # how a supervisor takes back what the environment says
    assert server_context("", "") is None
    assert client_context(None) is None


def test_only_modern_versions(files: Certificates) -> None:
    for context in (
        server_context(str(files.cert), str(files.key)),
        server_context(str(files.both), None),
        client_context(str(files.ca)),
    ):
        assert context is not None
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert client_context(str(files.ca)).verify_mode == ssl.CERT_REQUIRED  # type: ignore[union-attr]


def locked(key: Path, folder: Path) -> Path:
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    path = folder / "locked.pem"
    path.touch(mode=0o600)
    path.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    return path


def private(path: Path, content: bytes) -> Path:
    path.touch(mode=0o600)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (lambda f, o, t: (None, f.key), ["--ssl-keyfile", "key.pem", "needs --ssl-certfile"]),
        (lambda f, o, t: (t / "none", f.key), ["cannot read --ssl-certfile", "none", "No such"]),
        (lambda f, o, t: (t, f.key), ["cannot read --ssl-certfile", "Is a directory"]),
        (lambda f, o, t: (f.cert, t / "none"), ["cannot read --ssl-keyfile", "none", "No such"]),
        (lambda f, o, t: (f.cert, o.key), ["key.pem", "is not the key of", "cert.pem"]),
        (lambda f, o, t: (f.cert, None), ["can reach", "cert.pem", "chmod 640"]),
        (lambda f, o, t: (private(t / "c", f.cert.read_bytes()), None), ["no private key", "/c"]),
        (lambda f, o, t: (f.cert, private(t / "k", b"junk")), ["/k", "no private key in PEM form"]),
        (lambda f, o, t: (f.cert, private(t / "k", b"")), ["/k", "no private key in PEM form"]),
        (lambda f, o, t: (private(t / "c", b"junk"), f.key), ["/c", "no certificate in PEM form"]),
        (lambda f, o, t: (f.key, f.key), ["no certificate in PEM form"]),
        (lambda f, o, t: (f.cert, f.cert), ["can reach"]),
        (lambda f, o, t: (f.cert, locked(f.key, t)), ["locked.pem", "locked with a password"]),
    ],
)
def test_what_is_wrong_names_the_file(
    files: Certificates,
    others: Certificates,
    tmp_path: Path,
    choose: Callable[..., tuple[Path | None, Path | None]],
    words: list[str],
) -> None:
    certfile, keyfile = choose(files, others, tmp_path)
    with pytest.raises(UsageError) as caught:
        server_context(certfile and str(certfile), keyfile and str(keyfile))
    message = caught.value.message
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(("mode", "is_fine"), [(0o600, True), (0o640, True), (0o604, False)])
def test_key_that_others_can_read(
    files: Certificates, tmp_path: Path, mode: int, is_fine: bool
) -> None:
    key = private(tmp_path / "key.pem", files.key.read_bytes())
    key.chmod(mode)
    if is_fine:
        assert server_context(str(files.cert), str(key)) is not None
    else:
        with pytest.raises(UsageError, match="chmod 640"):
            server_context(str(files.cert), str(key))


@pytest.mark.parametrize("content", [None, b"", b"junk"])
def test_authorities_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--ssl-ca-certs .*ca\.pem"):
        client_context(str(path))
