"""TLS from the user's files: what a server shows, and whom a worker believes.

Knows files and OpenSSL's words for what is wrong with them; no sockets.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from chatserve.errors import UsageError

_CERTFILE, _KEYFILE, _CA_CERTS = "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs"


def server_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    """For TLS 1.2 and 1.3, or None without files: plain HTTP.

    Raises `UsageError` naming the file at fault.
    """
    if not certfile:
        if not keyfile:
            return None
        raise UsageError(f"{_KEYFILE} {keyfile} needs {_CERTFILE}: give the certificate, too")
    _check_readable(_CERTFILE, certfile)
    _check_private(*((_KEYFILE, keyfile) if keyfile else (_CERTFILE, certfile)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # without a callback OpenSSL would ask the terminal for the password of a locked key
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except ssl.SSLError as error:
        raise UsageError(_reason(error, certfile, keyfile)) from error
    return context


def client_context(ca_certs: str | None) -> ssl.SSLContext | None:
    """Believes who can show a certificate of `ca_certs`; None believes the system's authorities.

    Raises `UsageError` naming the file at fault.
    """
    if not ca_certs:
        return None
    _check_readable(_CA_CERTS, ca_certs)
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except ssl.SSLError as error:
        raise UsageError(
            f"{_CA_CERTS} {ca_certs} holds no certificate in PEM form ({_words(error)})"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _check_readable(flag: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"cannot read {flag} {path}: {error.strerror or error}") from error


def _check_private(flag: str, path: str) -> None:
    _check_readable(flag, path)
    if os.name == "posix" and Path(path).stat().st_mode & 0o007:
        raise UsageError(
            f"{flag} {path} holds a private key that every user of this machine can reach; "
            f"run chmod 640 on it"
        )


def _no_password() -> str:
    return ""


def _reason(error: ssl.SSLError, certfile: str, keyfile: str | None) -> str:
    key = f"{_KEYFILE} {keyfile}" if keyfile else f"{_CERTFILE} {certfile} (it has to hold the key)"
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{key} is not the key of the certificate in {certfile}; give the two that belong"
    if _holds(keyfile or certfile, b"ENCRYPTED"):
        return f"{key} is locked with a password; store it without one, readable by its user only"
    if _holds(certfile, b"-----BEGIN CERTIFICATE-----"):
        return f"{key} holds no private key in PEM form ({_words(error)}); is it the right file?"
    return f"{_CERTFILE} {certfile} holds no certificate in PEM form ({_words(error)})"


def _holds(path: str, mark: bytes) -> bool:
    try:
        return mark in Path(path).read_bytes()
    except OSError:
        return False


def _words(error: ssl.SSLError) -> str:
    return (error.reason or "unreadable").lower().replace("_", " ")
