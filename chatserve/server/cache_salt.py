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
    given = given_key(headers)
    if given is None:
        return {}
    return {HEADER: hmac.digest(_bytes(control_token), given, "sha256").hex()}


def salt_of(headers: Mapping[str, str], control_token: str | None) -> bytes:
    """The salt of a request as a worker sees it; none without a key.

    The header counts only beside the control token: a client cannot choose another one's salt.
    """
    given = given_key(headers)
    if given is None:
        return b""
    if control_token is None or not hmac.compare_digest(given, _bytes(control_token)):
        return hashlib.sha256(given).digest()
    salt = headers.get(HEADER, "")
    return bytes.fromhex(salt) if _FORM.fullmatch(salt) else b""


def given_key(headers: Mapping[str, str]) -> bytes | None:
    """The key that a client sent: of `Authorization: Bearer KEY`, else of Anthropic's `x-api-key`.

    None without either. Headers are read as latin-1.
    """
    given = headers.get("authorization")
    key = headers.get("x-api-key") if given is None else given.partition(" ")[2]
    return None if key is None else key.strip().encode("latin-1")


def _bytes(secret: str) -> bytes:
    return secret.encode("utf-8", "surrogateescape")
