"""A tiny base, a reward model for it and questions; and `train rl` as a process on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests import tiny

FLAGS = [
    "--device=cpu", "--max-steps=3", "--batch-size=4", "--mini-batch-size=2",
    "--gradient-accumulation=2", "--ppo-epochs=2", "--min-new-tokens=4", "--max-new-tokens=8",
    "--save-steps=1", "--learning-rate=1e-3", "--lora-rank=4",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """base: WEIGHTS; reward: an adapter; data: a prepared folder."""

    base: Path
    reward: Path
    data: Path

    def command(self, out: Path, *flags: str) -> list[str]:
        """Of `chatserve`, from `train` on; later flags win."""
        return [
            "train", "rl", str(self.base), f"--data={self.data}", f"--reward={self.reward}",
            f"--out={out}", *FLAGS, *flags,
        ]  # fmt: skip


def build_task(folder: Path) -> Task:
    """In `folder`, as `chatserve train data` and `train reward` leave it."""
    import pyarrow
    from peft import LoraConfig, get_peft_model
    from pyarrow import parquet

    from chatserve.train.adapter_folder import save_adapter
    from chatserve.train.base import open_base
    from chatserve.train.offline import no_network
    from chatserve.train.recipe import RewardRecipe
    from chatserve.train.run_folder import RunFolder

    path = folder / "base"
    tiny.save_model(path)
    with no_network():
        base = open_base(path, device="cpu", head="score")
        lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj"])
        model = get_peft_model(base.model, lora)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_" in name or "score" in name:
                torch.nn.init.normal_(weight, std=0.2)
        run = RunFolder(folder / "reward")
        run.begin({})
        reward = save_adapter(run, model, base, kind="reward", recipe=RewardRecipe(), steps=1)
    (folder / "data" / "rl").mkdir(parents=True)
    rows = {"question_id": ["1", "2", "3"], "question": ["Why?", "How do I sort?", "x" * 600]}
    parquet.write_table(pyarrow.table(rows), folder / "data" / "rl" / "part-0.parquet")
    return Task(path, reward, folder / "data")
