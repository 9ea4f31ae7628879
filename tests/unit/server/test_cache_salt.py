"""Prompts of one API key share a cache, those of two do not; nobody chooses another one's salt."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from chatserve.server.cache_salt import HEADER, header_for_worker, salt_of

TOKEN = "control-token"


def relayed(key: str) -> dict[str, str]:
    """What a worker gets when a controller relays the request of whoever has `key`."""
    added = header_for_worker(Headers({"Authorization": f"Bearer {key}"}), TOKEN)
    return {"Authorization": f"Bearer {TOKEN}", **added}


def salt(headers: dict[str, str], token: str | None = TOKEN) -> bytes:
    return salt_of(Headers(headers), token)


def test_each_key_has_a_salt_of_its_own_behind_a_controller() -> None:
    assert salt(relayed("a")) == salt(relayed("a")) != salt(relayed("b"))
    assert len(salt(relayed("a"))) == 32


def test_the_key_itself_does_not_go_to_the_worker() -> None:
    assert "secret" not in str(relayed("secret"))
    other = header_for_worker(Headers({"Authorization": "Bearer secret"}), "another token")
    assert other[HEADER] != relayed("secret")[HEADER]


def test_who_has_no_key_has_no_salt() -> None:
    assert header_for_worker(Headers({}), TOKEN) == {}
    assert salt({}) == salt({"Authorization": f"Bearer {TOKEN}"}) == b""


def test_a_worker_on_its_own_tells_its_clients_keys_apart() -> None:
    first, second = ({"Authorization": f"Bearer {key}"} for key in "ab")
    assert salt(first, None) == salt(first, None) != salt(second, None)


def test_the_header_counts_only_beside_the_control_token() -> None:
    stolen = {HEADER: relayed("victim")[HEADER]}
    for own in ({}, {"Authorization": "Bearer mine"}, {"Authorization": f"Bearer {TOKEN}x"}):
        for token in (TOKEN, None):
            assert salt(own | stolen, token) == salt(own, token) != salt(relayed("victim"))


@pytest.mark.parametrize("value", ["", "00", "g" * 64, "0" * 65, "0" * 64 + "\n", "é" * 64])
def test_a_header_of_another_form_is_no_salt(value: str) -> None:
    assert salt({"Authorization": f"Bearer {TOKEN}", HEADER: value}) == b""


def test_a_key_may_hold_any_byte() -> None:
    assert salt({"Authorization": "Bearer \xe9\xff"}, "\udce9") != b""
