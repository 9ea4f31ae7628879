"""Encoders are refused by name where texts are to be written, before weights are looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.encoders import MODEL_TYPES, SERVED_TYPES, is_encoder, refuse_encoder


@pytest.mark.parametrize("model_type", ["bert", "xlm-roberta", "modernbert"])
def test_a_folder_of_one_is_refused(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type, "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelLoadError, match=f"'{model_type}' is an encoder") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.exit_code == 3


def test_one_that_was_trained_to_write_is_not() -> None:
    refuse_encoder({"model_type": "bert", "is_decoder": True})


def test_none_of_them_is_a_model_that_generates() -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    causal_only = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    assert not MODEL_TYPES & causal_only


@pytest.mark.parametrize("model_type", [["bert"], {"bert": 1}, 1, None])
def test_a_model_type_that_is_no_name(model_type: object) -> None:
    assert not is_encoder({"model_type": model_type})


def test_those_that_are_served_are_known() -> None:
    assert SERVED_TYPES < MODEL_TYPES
