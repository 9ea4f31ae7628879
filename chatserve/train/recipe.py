"""The published recipe of StackLLaMA as settings: every default, and where it comes from.

Sources: the scripts of April 2023 (examples/stack_llama/scripts of TRL, commit d8ae4d08c), their
README's commands, and the article about them (huggingface/blog, stackllama.md). Imports nothing
heavy: `--help` and `--print-recipe` are made of these classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from chatserve.settings import fields_of, setting

SFT_SCRIPT = "supervised_finetuning.py, 2023"
SFT_README = "README's command, 2023"
REWARD_SCRIPT = "reward_modeling.py, 2023"
RL_SCRIPT = "rl_training.py, 2023"
PPO_CONFIG = "TRL's PPOConfig, April 2023"
ARTICLE = "StackLLaMA article"
OURS = "chatserve's choice"


def published(default: Any, doc: str, source: str, **options: Any) -> Any:
    """A `setting` whose default is the recipe's; its help and the printed recipe name `source`."""
    item = setting(default, f"{doc}; {source}", **options)
    return dataclasses.field(default=item.default, metadata={**item.metadata, "source": source})


@dataclass(frozen=True)
class LoraRecipe:
    """What all three steps share: which matrices are trained, and in which precision."""

    target_modules: tuple[str, ...] = published(
        ("q_proj", "v_proj"), "matrices that get an adapter", "adapter_config.json of all three",
        group="recipe",
    )  # fmt: skip
    seed: int = published(
        0, "of the weights that begin at random, dropout and the order", OURS, group="recipe",
        ge=0, le=(1 << 32) - 1,
    )  # fmt: skip
    int8: str = published(
        "auto", "the base in 8 bits by bitsandbytes; auto: where there is CUDA",
        f"{ARTICLE}: 1 byte per parameter", choices=("auto", "on", "off"), group="recipe",
    )  # fmt: skip
    bf16: str = published(
        "auto", "mixed precision; auto: where there is CUDA", "the scripts' --bf16",
        choices=("auto", "on", "off"), group="recipe",
    )  # fmt: skip
    gradient_checkpointing: str = published(
        "auto", "compute activations twice to keep fewer; auto: where there is CUDA",
        f"always on in {SFT_SCRIPT}", choices=("auto", "on", "off"), group="recipe",
    )  # fmt: skip


@dataclass(frozen=True)
class SftRecipe(LoraRecipe):
    """Supervised fine-tuning."""

    lora_rank: int = published(16, "rank of the adapter", SFT_SCRIPT, group="recipe", ge=1)
    lora_alpha: int = published(32, "its scale, times the rank", SFT_SCRIPT, group="recipe", ge=1)
    lora_dropout: float = published(
        0.05, "dropout before it", SFT_SCRIPT, group="recipe", ge=0, le=0.9
    )
    max_length: int = published(
        1024, "tokens of one packed sequence", SFT_SCRIPT, group="recipe", ge=8
    )
    learning_rate: float = published(
        1e-5, "at its highest", f"{SFT_README} (the script's own default: 1e-4)", group="recipe",
        gt=0,
    )  # fmt: skip
    lr_scheduler: str = published(
        "cosine", "how it falls", SFT_SCRIPT, choices=("cosine", "linear", "constant"),
        group="recipe",
    )  # fmt: skip
    warmup_steps: int = published(100, "in which it rises", SFT_SCRIPT, group="recipe", ge=0)
    weight_decay: float = published(0.05, "of AdamW", SFT_SCRIPT, group="recipe", ge=0)
    max_steps: int = published(
        5000, "steps in all", f"{SFT_README} (the script's own default: 10000)", group="recipe",
        ge=1,
    )  # fmt: skip
    batch_size: int = published(
        16, "sequences of a step on each device", SFT_SCRIPT, group="recipe", ge=1,
    )  # fmt: skip
    gradient_accumulation: int = published(1, "batches of a step", SFT_SCRIPT, group="recipe", ge=1)
    num_eval_rows: int = published(
        4000, "first rows that are held out; a tenth of fewer", SFT_SCRIPT, group="recipe", ge=0
    )


@dataclass(frozen=True)
class RewardRecipe(LoraRecipe):
    """The reward model: -log sigmoid(r_chosen - r_rejected), one number for a text."""

    lora_rank: int = published(8, "rank of the adapter", REWARD_SCRIPT, group="recipe", ge=1)
    lora_alpha: int = published(
        32, "its scale, times the rank", REWARD_SCRIPT, group="recipe", ge=1
    )
    lora_dropout: float = published(
        0.1, "dropout before it", REWARD_SCRIPT, group="recipe", ge=0, le=0.9
    )
    max_length: int = published(
        512, "tokens; pairs with a longer side are left out", REWARD_SCRIPT, group="recipe", ge=8
    )
    learning_rate: float = published(2e-5, "at its highest", REWARD_SCRIPT, group="recipe", gt=0)
    lr_scheduler: str = published(
        "linear", "how it falls", REWARD_SCRIPT, choices=("cosine", "linear", "constant"),
        group="recipe",
    )  # fmt: skip
    warmup_steps: int = published(0, "in which it rises", REWARD_SCRIPT, group="recipe", ge=0)
    weight_decay: float = published(0.001, "of AdamW", REWARD_SCRIPT, group="recipe", ge=0)
    num_epochs: int = published(1, "times through the pairs", REWARD_SCRIPT, group="recipe", ge=1)
    max_steps: int | None = published(
        None, "steps in all, instead of whole epochs", OURS, group="recipe", ge=1
    )
    batch_size: int = published(
        4, "pairs of a step on each device", REWARD_SCRIPT, group="recipe", ge=1
    )
    gradient_accumulation: int = published(
        1, "batches of a step", REWARD_SCRIPT, group="recipe", ge=1
    )
    num_train_pairs: int = published(
        100_000, "pairs to train on, at most", REWARD_SCRIPT, group="recipe", ge=1
    )
    num_eval_pairs: int = published(
        50_000, "held-out pairs, at most", REWARD_SCRIPT, group="recipe", ge=0
    )


@dataclass(frozen=True)
class RlRecipe(LoraRecipe):
    """Reinforcement learning by PPO against the reward model, close to the frozen start."""

    lora_rank: int = published(16, "rank of the adapter", RL_SCRIPT, group="recipe", ge=1)
    lora_alpha: int = published(32, "its scale, times the rank", RL_SCRIPT, group="recipe", ge=1)
    lora_dropout: float = published(
        0.05, "dropout before it", RL_SCRIPT, group="recipe", ge=0, le=0.9
    )
    learning_rate: float = published(
        1.4e-5, "of Adam, constant", f"{ARTICLE} (the script's own default: 1.41e-5)",
        group="recipe", gt=0,
    )  # fmt: skip
    batch_size: int = published(8, "answers of a step", ARTICLE, group="recipe", ge=1)
    mini_batch_size: int = published(
        1, "answers of a forward pass in training", RL_SCRIPT, group="recipe", ge=1
    )
    gradient_accumulation: int = published(
        8, "forward passes of an update", ARTICLE, group="recipe", ge=1
    )
    ppo_epochs: int = published(
        4, "times that a step's answers are learnt from", RL_SCRIPT, group="recipe", ge=1
    )
    max_steps: int = published(
        1000, "steps in all", f"{ARTICLE}: the reward levels off near there", group="recipe", ge=1
    )
    min_new_tokens: int = published(32, "of an answer, at least", RL_SCRIPT, group="recipe", ge=1)
    max_new_tokens: int = published(
        128, "of an answer; lengths are drawn below it", RL_SCRIPT, group="recipe", ge=1
    )
    top_k: int = published(0, "of sampling; 0: all tokens", RL_SCRIPT, group="recipe", ge=0)
    top_p: float = published(1.0, "of sampling", RL_SCRIPT, group="recipe", gt=0, le=1)
    temperature: float = published(
        1.0, "of sampling", "transformers' default, 2023", group="recipe", gt=0
    )
    max_length: int = published(
        512, "tokens of a question; longer ones are left out", RL_SCRIPT, group="recipe", ge=8
    )
    num_questions: int = published(
        100_000, "questions to draw from, at most", RL_SCRIPT, group="recipe", ge=1
    )
    reward_baseline: float = published(0.0, "taken from each reward", RL_SCRIPT, group="recipe")
    kl_controller: str = published(
        "adaptive", "how the penalty's weight moves", PPO_CONFIG, choices=("adaptive", "fixed"),
        group="recipe",
    )  # fmt: skip
    init_kl: float = published(
        0.2, "the penalty's weight at the start", PPO_CONFIG, group="recipe", ge=0
    )
    target_kl: float = published(
        6.0, "nats of an answer that the adaptive weight aims at", PPO_CONFIG, group="recipe", gt=0
    )
    kl_horizon: int = published(
        10_000, "answers in which the weight adapts", PPO_CONFIG, group="recipe", ge=1
    )
    early_stopping_kl: float = published(
        0.1, "nats of a token; a step ends above 1.5 times that; 0: never", RL_SCRIPT,
        group="recipe", ge=0,
    )  # fmt: skip
    gamma: float = published(1.0, "discount", PPO_CONFIG, group="recipe", gt=0, le=1)
    gae_lambda: float = published(0.95, "of GAE", PPO_CONFIG, group="recipe", ge=0, le=1)
    clip_range: float = published(0.2, "of the policy's ratio", PPO_CONFIG, group="recipe", gt=0)
    clip_range_value: float = published(0.2, "of the value", PPO_CONFIG, group="recipe", gt=0)
    value_coefficient: float = published(
        0.1, "weight of the value's loss", PPO_CONFIG, group="recipe", ge=0
    )


def recipe_lines(recipe: object) -> list[str]:
    """`name = value` of every published setting, with its source behind it."""
    items = [item for item in fields_of(type(recipe)) if "source" in item.metadata]
    rows = [(item.name, getattr(recipe, item.name), item) for item in items]
    cells = [(name, _shown(value), value, item) for name, value, item in rows]
    width = max(len(f"{name} = {text}") for name, text, _, _ in cells)
    lines = []
    for name, text, value, item in cells:
        source = item.metadata["source"] if value == item.default else "set by you"
        lines.append(f"{f'{name} = {text}':<{width}}  # {source}")
    return lines


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
