"""How much memory a training takes, before anything is loaded: the recipe's rule, and its parts.

The rule is the article's: 1 byte per parameter for a base in 8 bits, and 1.2 to 1.4 GB per billion
parameters for the whole set-up (huggingface/blog, stackllama.md). The parts are added up here, so
that other bases, lengths and batches can be planned, too. Reads a config; allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chatserve.models.adapter_places import adapter_places
from chatserve.models.config import ModelConfig
from chatserve.train.recipe import SftRecipe

Form = Literal["int8", "bfloat16", "float32"]
FORMS: tuple[Form, ...] = ("int8", "bfloat16", "float32")
RULE = (1.2e9, 1.4e9)
"""Bytes for a billion parameters, of the whole set-up with an int8 base."""
ADAPTER_BYTES = 16
"""Of each trained value: itself, its gradient, and Adam's two moments, in float32."""

_BASE_BYTES = {"int8": 1, "bfloat16": 2, "float32": 4}
_HALF, _FULL = 2, 4
_LOGIT_ROWS = 1024  # TRL's head makes logits of so many tokens at once, and their gradients
# Measured: interpreter, PyTorch, trl and datasets. On a GPU the driver's context, estimated.
_PROCESS_BYTES = {"cpu": 750 << 20, "cuda": 500 << 20, "mps": 100 << 20}


@dataclass(frozen=True)
class TrainingPlan:
    """What a training takes on one device, in bytes.

    `rule_bytes`: from and to, by the recipe's rule; it is of an int8 base.
    """

    form: Form
    num_parameters: int
    num_trained: int
    base_bytes: int
    adapter_bytes: int
    activation_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        parts = (self.base_bytes, self.adapter_bytes, self.activation_bytes, self.process_bytes)
        return sum(parts)

    @property
    def rule_bytes(self) -> tuple[int, int]:
        low, high = (int(self.num_parameters * each / 1e9) for each in RULE)
        return low, high

    def fits(self, memory_bytes: int) -> bool:
        return self.total_bytes <= memory_bytes


def plan_training(
    config: ModelConfig, recipe: SftRecipe, form: Form, device: str, *, checkpointing: bool
) -> TrainingPlan:
    """Supervised fine-tuning of a network of `config` by `recipe`, its base held in `form`.

    checkpointing: activations are computed twice and mostly not kept.
    """
    trained = count_trained(config, recipe)
    return TrainingPlan(
        form=form,
        num_parameters=config.num_parameters,
        num_trained=trained,
        base_bytes=_base_bytes(config, form),
        adapter_bytes=ADAPTER_BYTES * trained,
        activation_bytes=_activation_bytes(config, recipe, form, checkpointing),
        process_bytes=_PROCESS_BYTES[device],
    )


def count_trained(config: ModelConfig, recipe: SftRecipe) -> int:
    """Values of the adapter: rank times rows and columns of every matrix that gets one."""
    return sum(
        recipe.lora_rank * (place.rows + place.columns)
        for name, place in adapter_places(config).items()
        if name.rpartition(".")[2] in recipe.target_modules
    )


def _base_bytes(config: ModelConfig, form: Form) -> int:
    """bitsandbytes leaves the embedding and the head in half precision."""
    if form != "int8":
        return config.num_parameters * _BASE_BYTES[form]
    tables = config.vocab_size * config.hidden_size * (1 if config.is_tied else 2)
    return (config.num_parameters - tables) * _BASE_BYTES[form] + tables * _HALF


def _activation_bytes(
    config: ModelConfig, recipe: SftRecipe, form: Form, checkpointing: bool
) -> int:
    rows = recipe.batch_size * recipe.max_length
    size = _FULL if form == "float32" else _HALF
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads_out, kv_out = config.num_heads * dim, 2 * config.num_kv_heads * dim
    # norms and their inputs in float32, what dropout leaves for each adapter, q k v and attention's
    # output, gate and up with their product on the way
    block = rows * (
        size * (4 * hidden + 2 * heads_out + kv_out + 4 * ffn)
        + _FULL * (2 + len(recipe.target_modules)) * hidden
    )
    kept = config.num_layers * rows * hidden * size
    blocks = kept + block if checkpointing else config.num_layers * block
    return blocks + 2 * _FULL * min(rows, _LOGIT_ROWS) * config.vocab_size
