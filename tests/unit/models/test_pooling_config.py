"""How an embedding model says that its states are pooled."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import ModelLoadError
from chatserve.models.pooling_config import default_pooling, encoder_pooling, max_tokens


def write(folder: Path, config: Any) -> Path:
    (folder / "1_Pooling").mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "1_Pooling" / "config.json").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        ({"word_embedding_dimension": 8, "include_prompt": True, "pooling_mode_lasttoken": True},
         "last"),
    ],
)  # fmt: skip
def test_modes_that_are_served(config: Any, pooling: str, tmp_path: Path) -> None:
    assert default_pooling(write(tmp_path, config)) == pooling


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_cls_token": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {},
        [1],
    ],
)
def test_others_are_told(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert default_pooling(write(tmp_path, config)) is None
    assert "not served" in caplog.text


def test_a_folder_or_a_file_that_says_nothing(tmp_path: Path) -> None:
    assert default_pooling(tmp_path) is None
    assert default_pooling(tmp_path / "model.gguf") is None


def test_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="download it again"):
        default_pooling(write(tmp_path, "{"))


@pytest.mark.parametrize(
    ("key", "pooling"),
    [("mean_tokens", "mean"), ("lasttoken", "last"), ("cls_token", "cls")],
)
def test_of_an_encoder(key: str, pooling: str, tmp_path: Path) -> None:
    assert encoder_pooling(tmp_path) == "mean"
    assert encoder_pooling(write(tmp_path, {f"pooling_mode_{key}": True})) == pooling


@pytest.mark.parametrize(
    "config",
    [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, {}, [1],
     {"pooling_mode_weightedmean_tokens": True}],
)  # fmt: skip
def test_of_an_encoder_another_is_refused(config: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="which is not served"):
        encoder_pooling(write(tmp_path, config))


@pytest.mark.parametrize(
    ("text", "found"), [('{"max_seq_length": 256}', 256), ('{"max_seq_length": null}', None),
                        ('{"max_seq_length": 0}', None), ("[]", None)],
)  # fmt: skip
def test_the_longest_text(text: str, found: int | None, tmp_path: Path) -> None:
    assert max_tokens(tmp_path) is None
    (tmp_path / "sentence_bert_config.json").write_text(text, "utf-8")
    assert max_tokens(tmp_path) == found
