"""A trained reward model on a base that is in memory already: `TrainedReward`.

Its LoRA pairs are added where a forward pass meets their matrices, only while it scores; adapters
that PEFT has put into the same network rest meanwhile. So policy, reference and reward share one
copy of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatserve.models.adapter import LoraPair
from chatserve.models.score_head import load_reward_adapter
from chatserve.train.adapter_folder import check_adapter_base
from chatserve.train.base import TrainingBase


class TrainedReward:
    """Scores texts as `chatserve train reward` has learnt it."""

    def __init__(self, base: TrainingBase, adapter_folder: Path) -> None:
        """Raises `ModelLoadError` for an adapter without a score head, or of another base."""
        check_adapter_base(adapter_folder, base)
        adapter, self.head = load_reward_adapter(adapter_folder, base.network)
        self._base = base
        self._network: nn.Module = base.model.base_model
        self._pairs = {
            name.removeprefix("model.").removesuffix(".weight"): LoraPair(
                pair.a.to(base.device), pair.b.to(base.device), pair.scale
            )
            for name, pair in adapter.pairs.items()
        }

    def score(self, texts: Sequence[str], *, batch_size: int = 8) -> list[float]:
        """One number for each whole text (`texts.training_text`); higher is better."""
        encode = self._base.processing.encode_text
        return self.score_ids([encode(text) for text in texts], batch_size=batch_size)

    def score_ids(self, ids: Sequence[Sequence[int]], *, batch_size: int = 8) -> list[float]:
        """The same of token ids, BOS included where the base has that custom, none empty."""
        scores: list[float] = []
        was_training = self._network.training
        self._network.eval()
        try:
            with torch.no_grad(), self._attached():
                for start in range(0, len(ids), batch_size):
                    scores += self._batch(ids[start : start + batch_size])
        finally:
            self._network.train(was_training)
        return scores

    def _batch(self, ids: Sequence[Sequence[int]]) -> list[float]:
        device = self._base.device
        longest = max(map(len, ids))
        padded = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for row, each in enumerate(ids):
            padded[row, : len(each)] = torch.tensor(each)
            mask[row, : len(each)] = 1
        states = self._network(
            input_ids=padded.to(device), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state
        last = torch.tensor([len(each) - 1 for each in ids], device=device)
        rows = states[torch.arange(len(ids), device=device), last]  # (B, hidden)
        scores: list[float] = self.head.score(rows).tolist()
        return scores

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            module: Any
            for module in self._network.modules():
                # PEFT's own layers, whatever adapters are active in them
                if hasattr(module, "base_layer") and hasattr(module, "enable_adapters"):
                    active = not module.disable_adapters
                    trained = [each for each in module.parameters() if each.requires_grad]
                    module.enable_adapters(False)
                    stack.callback(_wake, module, active, trained)
            for name, pair in self._pairs.items():
                place: Any = self._network.get_submodule(name)
                place = getattr(place, "base_layer", place)  # of PEFT's layers the base's own
                stack.callback(place.register_forward_hook(_adds(pair)).remove)
            yield


def _wake(module: Any, active: bool, trained: list[nn.Parameter]) -> None:
    module.enable_adapters(active)
    for parameter in trained:  # PEFT freezes what it disables
        parameter.requires_grad_(True)


def _adds(pair: LoraPair) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def add(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        change = (inputs[0].float() @ pair.a.T) @ pair.b.T * pair.scale
        adapted: torch.Tensor = output + change.to(output.dtype)
        return adapted

    return add
