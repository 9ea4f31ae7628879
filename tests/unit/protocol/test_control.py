"""Control messages round-trip, and refuse what they do not know."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chatserve.config import MAX_CARDS
from chatserve.errors import InvalidRequest
from chatserve.protocol.control import (
    Heartbeat,
    ModelCard,
    Registration,
    WorkerStatus,
    bearer,
    parse,
    proof_of,
)

CARD: dict[str, Any] = {"name": "m", "created": 1}
STATUS: dict[str, Any] = {"state": "ready", "models": [CARD]}


def registration(**changes: Any) -> bytes:
    return json.dumps({"worker_id": "w1", "port": 8001, "status": STATUS, **changes}).encode()


def test_round_trip() -> None:
    status = WorkerStatus(
        state="loading",
        models=[ModelCard(name="ü m", created=5, context_length=10, description={"a": [1, "b"]})],
        loaded_bytes=3,
        total_bytes=7,
        last_token_age_s=0.5,
    )
    message = Registration(worker_id="w", port=1, status=status)
    assert parse(Registration, message.to_json()) == message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"port": "80"}, "port"),
        ({"port": True}, "port"),
        ({"host": "10.0.0.1"}, "host"),
        ({"url": "http://169.254.169.254/"}, "url"),
        ({"worker_id": "a b"}, "worker_id"),
        ({"worker_id": ""}, "worker_id"),
        ({"worker_id": "x" * 65}, "worker_id"),
        ({"status": None}, "status"),
        ({"status": {**STATUS, "state": "happy"}}, "status.state"),
        ({"status": {**STATUS, "tick": -1}}, "status.tick"),
        ({"status": {**STATUS, "models": []}}, "status.models"),
        ({"status": {**STATUS, "models": [CARD] * (MAX_CARDS + 1)}}, "status.models"),
        ({"status": {**STATUS, "models": [{**CARD, "name": "a\x1b[2J"}]}}, "status.models.0.name"),
        ({"status": {**STATUS, "models": [{**CARD, "name": "a\nb"}]}}, "status.models.0.name"),
        ({"status": {**STATUS, "models": [{**CARD, "name": ""}]}}, "status.models.0.name"),
        ({"status": {**STATUS, "fingerprint": "x" * 501}}, "status.fingerprint"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(Registration, registration(**changes))
    assert caught.value.param == field


def test_no_infinite_age() -> None:
    body = b'{"worker_id":"w","status":{"state":"ready","models":[],"last_token_age_s":1e999}}'
    with pytest.raises(InvalidRequest, match="not JSON"):
        parse(Heartbeat, body)


@pytest.mark.parametrize("body", [b"", b"\x80\x04pickle", b"[]", b"null"])
def test_random_bytes(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(Heartbeat, body)


def test_card_as_openai_lists_it() -> None:
    card = ModelCard(name="m", created=5, context_length=10, description={"device": "cpu"})
    assert card.to_openai() == {
        "id": "m",
        "object": "model",
        "created": 5,
        "owned_by": "chatserve",
        "root": "m",
        "parent": None,
        "chatserve": {"context_length": 10, "device": "cpu"},
    }
    card = ModelCard(name="m:sql", parent="m", created=5)
    assert (card.to_openai()["root"], card.to_openai()["parent"]) == ("m", "m")


def test_proof_depends_on_token_and_nonce() -> None:
    proofs = {proof_of(token, nonce) for token in ("a", "b") for nonce in ("1", "2")}
    assert len(proofs) == 4
    assert proof_of("a", "1") == proof_of("a", "1")
    assert bearer("t") == {"Authorization": "Bearer t"}
