"""The memory of a training: numbers worked out by hand, and the recipe's rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatserve.cli.commands import plan
from chatserve.errors import DoesNotFit
from chatserve.models.config import ModelConfig
from chatserve.train.memory import count_trained, plan_training
from chatserve.train.recipe import SftRecipe
from tests import tiny

LLAMA_7B = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    }
)  # fmt: skip
ONE = SftRecipe(batch_size=1)


def test_7b_by_hand() -> None:
    assert count_trained(LLAMA_7B, ONE) == 32 * 2 * 16 * (4096 + 4096) == 8_388_608
    made = plan_training(LLAMA_7B, ONE, "int8", "cuda", checkpointing=True)
    assert made.num_parameters == 6_738_415_616
    tables = 2 * 32000 * 4096  # embedding and head, 2 bytes each
    assert made.base_bytes == 6_738_415_616 - tables + 2 * tables == 7_000_559_616
    assert made.adapter_bytes == 16 * 8_388_608
    kept = 32 * 1024 * 4096 * 2
    block = 1024 * (2 * (4 * 4096 + 2 * 4096 + 2 * 4096 + 4 * 11008) + 4 * 4 * 4096)
    assert made.activation_bytes == kept + block + 2 * 4 * 1024 * 32000
    assert made.total_bytes == (
        made.base_bytes + made.adapter_bytes + made.activation_bytes + (500 << 20)
    )


def test_the_parts_are_what_the_rule_says() -> None:
    made = plan_training(LLAMA_7B, ONE, "int8", "cuda", checkpointing=True)
    low, high = made.rule_bytes
    assert (low, high) == (8_086_098_739, 9_433_781_862)
    assert low <= made.total_bytes <= high


def test_forms_and_checkpointing() -> None:
    full = plan_training(LLAMA_7B, ONE, "float32", "cpu", checkpointing=False)
    assert full.base_bytes == 4 * 6_738_415_616
    half = plan_training(LLAMA_7B, ONE, "bfloat16", "cuda", checkpointing=False)
    assert half.base_bytes == 2 * 6_738_415_616 and half.base_bytes < full.base_bytes
    less = plan_training(LLAMA_7B, ONE, "bfloat16", "cuda", checkpointing=True)
    assert less.activation_bytes < half.activation_bytes / 4


def test_the_command_prints_rule_parts_and_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_model(tmp_path)
    assert plan.main([str(tmp_path), "--train", "--device", "cuda", "--memory", "16GB"]) == 0
    out = capsys.readouterr().out
    assert "the recipe's rule, with an int8 base" in out and "16 x 1,024 tokens" in out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["int8", "bfloat16", "float32"]
    with pytest.raises(DoesNotFit, match="lower --batch-size or --max-length"):
        plan.main([str(tmp_path), "--train", "--device", "cpu", "--memory", "100MB"])
