"""The published recipe: its values as the fact sheet has them, each with its source."""

from __future__ import annotations

import dataclasses

import pytest

from chatserve.train.recipe import RewardRecipe, RlRecipe, SftRecipe, recipe_lines
from chatserve.train.texts import QUESTION, TEMPLATE, query_text, training_text


def test_the_defaults_are_the_published_ones() -> None:
    sft, reward, rl = SftRecipe(), RewardRecipe(), RlRecipe()
    assert (sft.lora_rank, sft.lora_alpha, sft.lora_dropout) == (16, 32, 0.05)
    assert (sft.max_length, sft.learning_rate, sft.warmup_steps) == (1024, 1e-5, 100)
    assert (sft.weight_decay, sft.batch_size, sft.max_steps) == (0.05, 16, 5000)
    assert (sft.lr_scheduler, sft.target_modules) == ("cosine", ("q_proj", "v_proj"))
    assert (reward.lora_rank, reward.lora_alpha, reward.lora_dropout) == (8, 32, 0.1)
    assert (reward.max_length, reward.learning_rate, reward.weight_decay) == (512, 2e-5, 0.001)
    assert (reward.num_train_pairs, reward.num_eval_pairs) == (100_000, 50_000)
    assert (reward.num_epochs, reward.batch_size, reward.lr_scheduler) == (1, 4, "linear")
    assert (rl.learning_rate, rl.batch_size, rl.gradient_accumulation) == (1.4e-5, 8, 8)
    assert (rl.mini_batch_size, rl.ppo_epochs, rl.init_kl, rl.target_kl) == (1, 4, 0.2, 6.0)
    assert (rl.gamma, rl.gae_lambda, rl.clip_range, rl.value_coefficient) == (1.0, 0.95, 0.2, 0.1)
    assert (rl.min_new_tokens, rl.max_new_tokens, rl.kl_horizon) == (32, 128, 10_000)


@pytest.mark.parametrize("recipe", [SftRecipe, RewardRecipe, RlRecipe])
def test_every_default_names_its_source(
    recipe: type[SftRecipe] | type[RewardRecipe] | type[RlRecipe],
) -> None:
    for item in dataclasses.fields(recipe):
        assert item.metadata["source"] and item.metadata["source"] in item.metadata["doc"]
    lines = recipe_lines(recipe())
    assert len(lines) == len(dataclasses.fields(recipe)) and all("  # " in line for line in lines)


def test_what_was_changed_is_not_called_published() -> None:
    lines = {line.split(" ")[0]: line for line in recipe_lines(SftRecipe(learning_rate=1e-3))}
    assert lines["learning_rate"].startswith("learning_rate = 0.001 ")
    assert lines["learning_rate"].endswith("# set by you")
    assert "set by you" not in lines["lora_rank"]


def test_texts_are_byte_exact() -> None:
    assert training_text("How do I exit vim?", ":q") == "Question: How do I exit vim?\n\nAnswer: :q"
    assert query_text("a {b}") == "Question: a {b}\n\nAnswer: "
    assert TEMPLATE == QUESTION + "{answer}"
