"""What the plan says, beside what a worker's own process takes at its peak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.weights import default_model

if not sys.platform.startswith("linux"):
    pytest.skip("peaks are read from /proc", allow_module_level=True)

from benchmarks.memory_plan import measure

MOST_WRONG = 0.1


def assert_agrees(line: dict[str, Any]) -> None:
    assert line["measured_load_bytes"] <= line["measured_bytes"]
    assert line["predicted_bytes"] == pytest.approx(line["measured_bytes"], rel=MOST_WRONG), line


@pytest.mark.weights
@pytest.mark.parametrize("form", ["default", "half", "8-bit"])
def test_the_default_model_takes_what_was_planned(form: str) -> None:
    assert_agrees(measure(str(default_model()), form, 1024, 2))


@pytest.mark.parametrize("form", ["half", "8-bit"])
def test_a_model_with_large_keys_and_values_takes_what_was_planned(
    form: str, tmp_path: Path
) -> None:
    """Few weights, but 2 x 1,024 tokens of 64 kB: a pool that counts for a quarter of the whole."""
    tiny.save_model(
        tmp_path / "tiny", hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=16, head_dim=128,
        max_position_embeddings=1024,
    )  # fmt: skip
    line = measure(str(tmp_path / "tiny"), form, 1024, 2)
    assert line["kv_bytes"] == 2 * 1024 * 65536
    assert_agrees(line)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_the_smallest_models_are_all_slack(model_type: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "tiny", model_type)
    line = measure(str(tmp_path / "tiny"), "8-bit", 512, 1)
    assert line["slack_bytes"] > 0.9 * line["predicted_bytes"]
    assert_agrees(line)
