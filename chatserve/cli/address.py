"""Where a server is and how it is reached: its URL, whose certificates count, its sockets.

Knows addresses; sends nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from urllib.parse import urlsplit

from chatserve.errors import UsageError

# a machine at the other end that is gone without a word is found out in a minute
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def normalised(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid = False
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid:
        raise UsageError(f"{base_url!r} is not a server's URL, such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc:
        raise UsageError("a URL must not hold a secret; put the key into CHATSERVE_API_KEY")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def trust_of(ca_certs: str | None) -> ssl.SSLContext | bool:
    """Whose certificates count: those of the file, else what httpx takes for granted."""
    if ca_certs is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_certs)
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, ssl.SSLError):
            reason = "it holds no certificate in PEM form"
        raise UsageError(f"cannot use --ssl-ca-certs {ca_certs}: {reason}") from error


def keepalive() -> list[tuple[int, int, int]]:
    there = [(name, value) for name, value in _KEEPALIVE.items() if hasattr(socket, name)]
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in there),
    ]
