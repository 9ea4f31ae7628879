"""32000 rows or 32001: whose config, whose tokenizer, whose head; blank names of special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.tokenizer import load_tokenizer
from chatserve.models.vocabulary_check import refuse_two_vocabularies, warn_of_other_tokenizer
from chatserve.models.weights import TensorInfo
from tests.unit.models.vocabularies import save_byte_level, save_json, save_llama, save_metaspace

PAD = {"[PAD]": 32000}
AGAIN = "chatserve apply-delta BASE DELTA TARGET"


class Headers:
    def __init__(self, rows: Mapping[str, int]) -> None:
        self._infos = {
            name: TensorInfo(name, (count, 8), torch.float16, 16 * count)
            for name, count in rows.items()
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        raise AssertionError("only headers are read")

    def close(self) -> None: ...


def checkpoint(
    embedding: int | None, head: int | None, said: Any, path: Path = Path("m")
) -> Checkpoint:
    rows = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    weights = Headers({name: count for name, count in rows.items() if count is not None})
    return Checkpoint(path, {"model_type": "llama", "vocab_size": said}, {}, weights)


@pytest.mark.parametrize(
    ("embedding", "head", "said", "words", "command"),
    [
        (32001, 32000, 32001, "embedding has 32,001 rows, the head 32,000", AGAIN),
        (32000, 32001, 32001, "the head alone", AGAIN),
        (32000, 32000, 32001, r"config.json says 32,001 rows.*\[PAD\]", AGAIN),
        (32001, 32001, 32000, "config.json says 32,000", "chatserve repair m TARGET"),
        (32000, None, 32001, r"config.json says 32,001 rows", AGAIN),
        (32000, 500, 32000, "different models", "download them again"),
    ],
)
def test_two_vocabularies_are_refused_with_the_command(
    embedding: int, head: int | None, said: int, words: str, command: str
) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        refuse_two_vocabularies(checkpoint(embedding, head, said))
    assert caught.value.message.endswith(command) and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("embedding", "head", "said"),
    [
        (32000, 32000, 32000), (32001, 32001, 32001), (49152, None, 49152), (None, None, 5),
        (32000, 32000, None), (32000, 32000, "32001"), (32064, 32064, 32000),
    ],
)  # fmt: skip
def test_one_vocabulary_passes_and_other_differences_are_the_loaders(
    embedding: int | None, head: int | None, said: Any
) -> None:
    refuse_two_vocabularies(checkpoint(embedding, head, said))


@pytest.mark.parametrize(
    ("rows", "files", "words"),
    [
        (32000, {}, None),
        (32001, {"added_tokens": PAD}, None),
        (32064, {}, None),  # padded to a multiple of 64
        (32001, {}, "put it right: chatserve repair"),
        (32000, {"added_tokens": PAD}, AGAIN),
        (32000, {"added_tokens": {"<|a|>": 32000, "<|b|>": 32001}}, "model's own repository"),
    ],
)
def test_the_tokenizer_of_another_model_is_warned_of(
    rows: int, files: dict[str, Any], words: str | None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tokenizer = load_tokenizer(save_llama(tmp_path, **files))
    warn_of_other_tokenizer(checkpoint(rows, rows, rows, tmp_path), tokenizer)
    assert (words in caplog.text) if words else caplog.text == ""
    assert len(caplog.records) == (words is not None)


# Names of special tokens ----------------------------------------------------------------------

DECAPODA = {"bos_token": "", "eos_token": "", "unk_token": ""}
WRONG_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}


@pytest.mark.parametrize("stem", ["tokenizer_config", "special_tokens_map"])
def test_decapodas_blank_names_come_from_the_vocabulary_and_are_told(
    stem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = DECAPODA if stem == "tokenizer_config" else {
        name: {"content": ""} for name in DECAPODA
    }  # fmt: skip
    folder = save_llama(tmp_path, **{stem: names}, config=WRONG_IDS, generation_config=WRONG_IDS)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.names["bos_token"] == "<s>" and tokenizer.names["eos_token"] == "</s>"
    line = caplog.records[-1].getMessage()
    assert "bos_token and eos_token and unk_token are blank" in line
    assert "bos 1, eos 2" in line and f"chatserve repair {tmp_path} TARGET" in line


def test_names_that_are_absent_or_right_are_no_news(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_llama(
        tmp_path,
        tokenizer_config={**DECAPODA, "pad_token": ""},
        special_tokens_map={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    load_tokenizer(tmp_path)
    save_json(tmp_path, tokenizer_config={}, special_tokens_map={})
    load_tokenizer(tmp_path)
    assert caplog.text == ""


def test_a_blank_end_that_nothing_replaces_is_refused(tmp_path: Path) -> None:
    save_byte_level(tmp_path, special=[])
    load_tokenizer(save_json(tmp_path, tokenizer_config={}))
    save_json(tmp_path, tokenizer_config={"eos_token": ""})
    with pytest.raises(ModelLoadError, match=r"eos_token is blank .* no answer would end"):
        load_tokenizer(tmp_path)


def test_one_name_for_three_tokens_is_not_believed(tmp_path: Path) -> None:
    """Vicuna v0's first special_tokens_map, here beside a tokenizer.json."""
    three = dict.fromkeys(DECAPODA, "</s>")
    save_metaspace(tmp_path, prepend_scheme=None, special=[], **three)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.names["bos_token"] == "<s>"
