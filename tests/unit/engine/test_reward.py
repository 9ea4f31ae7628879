"""A reward model beside the base: the text that it reads, and what is no reward model of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatserve.engine.adapters import Adapters
from chatserve.engine.reward import DEFAULT_TEMPLATE, Reward, check_template
from chatserve.errors import AdapterConflict, ModelLoadError
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.fingerprint import weights_fingerprint
from chatserve.models.loader import load_model
from chatserve.models.score_head import SCORE_KEY
from tests import adapters, rewards, tiny

SPECIALS = {"<|im_end|>": tiny.EOS_ID}
WEIGHT = np.array([2.0, -1.0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    tiny.save_model(folder, tokenizer=False)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        yield checkpoint


@pytest.fixture(scope="module")
def network(checkpoint: Checkpoint) -> Any:
    return load_model(checkpoint, choose_policy("cpu", "float32"))


@pytest.fixture
def table(checkpoint: Checkpoint, network: Any) -> Adapters:
    return Adapters(checkpoint, network)


def test_the_text_is_that_of_the_recipe() -> None:
    reward = Reward(WEIGHT)
    assert reward.text("Why?", "So.") == "Question: Why?\n\nAnswer: So."
    assert reward.before("Why?") == "Question: Why?\n\nAnswer: " and reward.after == ""
    earlier = reward.before("And?", [("Why?", "So.")])
    assert earlier == "Question: Why?\n\nAnswer: So.\n\nQuestion: And?\n\nAnswer: "


def test_words_of_the_template_in_a_text_are_text() -> None:
    reward = Reward(WEIGHT, "<{question}|{answer}>")
    assert reward.text("{answer}", "{question}") == "<{answer}|{question}>"
    assert reward.before("{question}{answer}") == "<{question}{answer}|"
    assert reward.after == ">"


def test_a_score_is_the_product_with_the_state() -> None:
    assert Reward(WEIGHT).score(np.array([3, 4], np.float32)) == 2.0


@pytest.mark.parametrize(
    "template", ["", "{question}", "{answer} {question}", "{question}{answer}{answer}"]
)
def test_a_template_that_no_pair_fits_into(template: str) -> None:
    with pytest.raises(ModelLoadError, match="must have"):
        check_template(template, "here")
    assert check_template(DEFAULT_TEMPLATE, "here") == DEFAULT_TEMPLATE


def test_loaded_beside_the_base(table: Adapters, tmp_path: Path) -> None:
    rm = table.load_reward("rm", rewards.write(tmp_path / "rm"), SPECIALS)
    assert rm.reward is not None and rm.reward.weight.shape == (64,)
    assert (rm.reward.template, rm.reward.end_ids) == (DEFAULT_TEMPLATE, ())
    assert rm.fingerprint.startswith("rm_") and dict(table.loaded()) == {"rm": rm}
    with pytest.raises(AdapterConflict):
        table.load_reward("rm", tmp_path / "rm", SPECIALS)
    table.unload("rm")
    assert not table.loaded()


def test_the_record_says_what_was_trained_on(
    table: Adapters, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    record = {
        "template": "Q {question} A {answer}", "ends_with": "<|im_end|>",
        "base_fingerprint": weights_fingerprint(checkpoint),
    }  # fmt: skip
    rm = table.load_reward("rm", rewards.write(tmp_path / "rm", record=record), SPECIALS)
    plain = table.load_reward("plain", rewards.write(tmp_path / "plain"), SPECIALS)
    assert rm.reward is not None
    assert (rm.reward.template, rm.reward.end_ids) == (record["template"], (tiny.EOS_ID,))
    assert rm.fingerprint != plain.fingerprint, "scores of other texts are other scores"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"base_fingerprint": "w_other"}, "was trained on the weights w_other"),
        ({"ends_with": "<|nothing|>"}, "no special token of this base; it has <|im_end|>"),
        ({"ends_with": 7}, "no special token"),
        ({"template": "{answer}"}, "must have"),
    ],
)
def test_a_record_of_something_else_is_refused(
    table: Adapters, tmp_path: Path, record: Any, reason: str
) -> None:
    folder = rewards.write(tmp_path / "rm", record=record)
    with pytest.raises(ModelLoadError, match=reason):
        table.load_reward("rm", folder, SPECIALS)
    assert not table.loaded()


def test_what_is_no_reward_model_is_refused(
    table: Adapters, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match="has no score head"):
        table.load_reward("rm", adapters.write(tmp_path / "text"), SPECIALS)
    narrow = adapters.random_pairs({"model.layers.0.self_attn.q_proj": (64, 32)})
    head = {SCORE_KEY: rewards.head()}
    other = adapters.write(
        tmp_path / "other", narrow | head, **rewards.CONFIG, layers_to_transform=[0],
    )  # fmt: skip
    with pytest.raises(ModelLoadError, match="belongs to another base"):
        table.load_reward("rm", other, SPECIALS)
    without = Adapters(checkpoint, None)
    with pytest.raises(ModelLoadError, match="the Llama family"):
        without.load_reward("rm", rewards.write(tmp_path / "rm"), SPECIALS)
    assert not table.loaded()
