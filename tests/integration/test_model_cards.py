"""What servers say of their models is what the OpenAPI document says that they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from chatserve.config import WorkerConfig
from chatserve.engine import serving
from chatserve.engine.serving import load
from chatserve.models.receipt import MeasuredForm, Measurement, Receipt, Text
from chatserve.protocol.control import ModelCard
from chatserve.server.model_slot import ModelSlot
from chatserve.server.openapi.document import document
from tests import adapters, rewards, tiny
from tests.encoders import save_encoder

DOCUMENT = document()


def closed(schema: Any) -> Any:
    """Where properties are named, no others are allowed."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(each) for name, each in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in schema else inner


CARD = Draft202012Validator(
    closed({"$ref": "#/components/schemas/Model", "components": DOCUMENT["components"]})
)
DETAILS = DOCUMENT["components"]["schemas"]["ModelDetails"]["properties"]


def config(folder: Path, **options: Any) -> WorkerConfig:
    return WorkerConfig(weights=str(folder), device="cpu", self_check=False, **options)


def cards_of(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """What is found at `/v1/models`, of a worker and behind a controller."""
    slot = ModelSlot.filled(*load(config(folder, **options)))
    heard = [ModelCard.model_validate_json(card.to_json()) for card in slot.cards()]
    assert heard == slot.cards()
    return [json.loads(json.dumps(card.to_openai())) for card in heard]


class Measured(Receipt):
    """A receipt of whatever form is served."""

    def of_form(self, form: MeasuredForm) -> Measurement:
        return Measurement(form, 0.01, 0.2, 0.98, 0.001, 7.5, (0.0, 0.01), ())


TEXT = Text("shipped", "0" * 64, 300, 128)
RECEIPT = Measured("fp", "0.1.0", TEXT, "float32", 7.4, "2026-11-23", ())


def test_they_are_as_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, encoder = tmp_path / "tiny", tmp_path / "encoder"
    tiny.save_model(base)
    save_encoder(encoder)
    poet = f"poet={adapters.write(tmp_path / 'poet')}"
    loading = [card.to_openai() for card in ModelSlot(("tiny",)).cards()]
    whole = cards_of(base, dtype="float32")
    rm = f"rm={rewards.write(tmp_path / 'rm')}"
    packed = cards_of(base, load_4bit=True, adapter=(poet,), reward_adapter=(rm,))
    monkeypatch.setattr(serving, "read_receipt", lambda *_: RECEIPT)
    measured = cards_of(base, load_8bit=True)
    assert [card["parent"] for card in packed] == [None, "tiny", "tiny"]
    assert loading[0]["chatserve"] == {"context_length": None}
    assert measured[0]["chatserve"]["quality"]["top1_agreement"] == 0.98
    shown = {"state", "bytes"}  # a controller's own: tests/integration/test_repertoire.py
    for card in (*loading, *whole, *packed, *measured, *cards_of(encoder)):
        CARD.validate(card)
        shown |= card["chatserve"].keys()
    assert shown == DETAILS.keys(), "nothing is described that no model has"
