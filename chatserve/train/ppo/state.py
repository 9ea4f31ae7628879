"""All that a run of PPO goes on from, in a folder: adapter, value head, optimizer, penalty, health.

Numbers are safetensors, the rest is JSON: nothing of a checkpoint is code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from chatserve.errors import ModelLoadError
from chatserve.train.ppo.loop import Ppo

_WEIGHTS = "policy.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "ppo.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(ppo: Ppo, folder: Path) -> None:
    """Write it into the existing `folder`."""
    trained = _trained(ppo)
    save_file({name: _on_host(each) for name, each in trained.items()}, folder / _WEIGHTS)
    moments = {
        f"{name}:{moment}": _on_host(ppo.optimizer.state[parameter][moment])
        for name, parameter in trained.items()
        if parameter in ppo.optimizer.state
        for moment in _MOMENTS
    }
    save_file(moments, folder / _OPTIMIZER)
    table = {"kl_coefficient": ppo.penalty.coefficient, "health": ppo.health.state()}
    (folder / _STATE).write_text(json.dumps(table), "utf-8")


def load_state(ppo: Ppo, folder: Path) -> None:
    """Let `ppo` go on from what `save_state` has written.

    Raises `ModelLoadError` where it is another policy's.
    """
    trained = _trained(ppo)
    weights = load_file(folder / _WEIGHTS)
    shapes = {name: each.shape for name, each in weights.items()}
    if shapes != {name: each.shape for name, each in trained.items()}:
        raise ModelLoadError(
            f"{folder}: holds other matrices than this adapter has; begin anew in another folder"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    for key, value in load_file(folder / _OPTIMIZER).items():
        name, _, moment = key.rpartition(":")
        parameter = trained[name]
        # Adam counts its steps on the host
        ppo.optimizer.state[parameter][moment] = (
            value if moment == "step" else value.to(parameter.device)
        )
    table: Mapping[str, Any] = json.loads((folder / _STATE).read_text("utf-8"))
    ppo.penalty.coefficient = table["kl_coefficient"]
    ppo.health.restore(table["health"])


def _trained(ppo: Ppo) -> dict[str, nn.Parameter]:
    return {name: each for name, each in ppo.policy.named_parameters() if each.requires_grad}


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
