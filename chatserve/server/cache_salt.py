"""Whose prompts may share what is cached of them: those that come with the same API key.

Who measures times could otherwise learn what another one's prompt begins with. A worker behind a
controller sees the control token only, so the controller says whose request it is, in a header.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping

HEADER = "X-Chatserve-Cache-Salt"

_FORM = re.compile("[0-9a-f]{64}")


def header_for_worker(headers: Mapping[str, str], control_token: str) -> dict[str, str]:
    """What a controller adds to a client's request; nothing for a client without a key."""
    given = headers.get("authorization")
    if given is None:
        return {}
    return {HEADER: hmac.digest(_bytes(control_token), _key(given), "sha256").hex()}


def salt_of(headers: Mapping[str, str], control_token: str | None) -> bytes:
    """The salt of a request as a worker sees it; none without a key.

    The header counts only beside the control token: a client cannot choose another one's salt.
    """
    given = headers.get("authorization")
    if given is None:
        return b""
    if control_token is None or not hmac.compare_digest(_key(given), _bytes(control_token)):
        return hashlib.sha256(_key(given)).digest()
    salt = headers.get(HEADER, "")
    return bytes.fromhex(salt) if _FORM.fullmatch(salt) else b""


def _key(authorization: str) -> bytes:
    """The bytes of `Bearer KEY` behind the first word; headers are read as latin-1."""
    return authorization.partition(" ")[2].strip().encode("latin-1")


def _bytes(secret: str) -> bytes:
    return secret.encode("utf-8", "surrogateescape")
