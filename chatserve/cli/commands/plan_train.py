"""`chatserve plan --train WEIGHTS`: what fine-tuning would take, by the rule and by its parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatserve.cli.commands.plan_table import Place, in_words
from chatserve.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from chatserve.models.checkpoint import Checkpoint
    from chatserve.train.memory import TrainingPlan


def plan_train(
    checkpoint: Checkpoint,
    places: Sequence[Place],
    *,
    batch_size: int | None,
    max_length: int | None,
    as_json: bool,
) -> None:
    """Print the plan. Raises `DoesNotFit` when no form fits anywhere."""
    from chatserve.models.config import is_native
    from chatserve.models.form import native_config
    from chatserve.train.memory import FORMS, plan_training
    from chatserve.train.recipe import SftRecipe

    if not is_native(checkpoint.config):
        raise UsageError("--train: adapters are trained on networks of the Llama family")
    network = native_config(checkpoint)
    recipe = SftRecipe()
    recipe = replace(
        recipe,
        batch_size=batch_size or recipe.batch_size,
        max_length=max_length or recipe.max_length,
    )
    tables: dict[Place, list[TrainingPlan]] = {}
    for place in places:
        on_gpu = place.kind == "cuda"  # where 8 bits are, and activations are computed twice
        forms = [form for form in FORMS if on_gpu or form != "int8"]
        tables[place] = [
            plan_training(network, recipe, form, place.kind, checkpointing=on_gpu) for form in forms
        ]
    if as_json:
        print(json.dumps(_as_json(checkpoint, recipe, tables), indent=1))
    else:
        _show(checkpoint, recipe, tables)
    if not any(plan.fits(place.memory_bytes) for place in places for plan in tables[place]):
        place = max(places, key=lambda each: each.memory_bytes)
        least = min(tables[place], key=lambda plan: plan.total_bytes)
        raise DoesNotFit(
            f"training {checkpoint.path.name} does not fit: {least.form} needs "
            f"{in_words(least.total_bytes)}, there are {in_words(place.memory_bytes)}; use a lower "
            "--batch-size or --max-length, or a smaller model"
        )


def _show(checkpoint: Checkpoint, recipe: Any, tables: dict[Place, list[TrainingPlan]]) -> None:
    from chatserve.cli.escapes import one_line

    plan = next(iter(tables.values()))[0]
    low, high = plan.rule_bytes
    print(
        f"{one_line(checkpoint.path.name)}: fine-tuning by LoRA, rank {recipe.lora_rank}, "
        f"{recipe.batch_size} x {recipe.max_length:,} tokens, {plan.num_trained:,} values of "
        f"{plan.num_parameters:,} trained"
    )
    print(f"the recipe's rule, with an int8 base: {in_words(low)} to {in_words(high)}")
    for place, plans in tables.items():
        print(f"\n{place.name}")
        print("  base         weights  adapter  activations  process     total")
        for each in plans:
            cells = (
                (each.base_bytes, 8), (each.adapter_bytes, 8), (each.activation_bytes, 12),
                (each.process_bytes, 8), (each.total_bytes, 9),
            )  # fmt: skip
            figures = " ".join(f"{in_words(size):>{width}}" for size, width in cells)
            verdict = "fits" if each.fits(place.memory_bytes) else "does not fit"
            print(f"  {each.form:<10}  {figures}  {verdict}")


def _as_json(
    checkpoint: Checkpoint, recipe: Any, tables: dict[Place, list[TrainingPlan]]
) -> dict[str, Any]:
    return {
        "weights": str(checkpoint.path),
        "batch_size": recipe.batch_size,
        "max_length": recipe.max_length,
        "places": [
            {
                "name": place.name,
                "kind": place.kind,
                "memory_bytes": place.memory_bytes,
                "forms": [
                    {
                        "form": plan.form,
                        "fits": plan.fits(place.memory_bytes),
                        "num_parameters": plan.num_parameters,
                        "num_trained": plan.num_trained,
                        "base_bytes": plan.base_bytes,
                        "adapter_bytes": plan.adapter_bytes,
                        "activation_bytes": plan.activation_bytes,
                        "process_bytes": plan.process_bytes,
                        "total_bytes": plan.total_bytes,
                        "rule_bytes": plan.rule_bytes,
                    }
                    for plan in plans
                ],
            }
            for place, plans in tables.items()
        ],
    }
