"""What conversions of a Llama-family checkpoint get wrong, and the checkpoint with it put right.

A fault changes which rows or tensors stand where, never a value, so undoing it is exact. Knows no
text and no decision: `self_check` asks which of them a network has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.form import native_config
from chatserve.models.rotary_layout import Layout, put_right, row_orders
from chatserve.models.weights import TensorInfo, WeightSource

MAX_FACTOR = 64  # by which positions were ever stretched, and far more
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Fault(Protocol):
    """One mistake."""

    @property
    def what(self) -> str:
        """The mistake as a clause: `its … are …`."""

    def mended(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as it should have been; its weights read from the same files."""


@dataclasses.dataclass(frozen=True)
class RotaryRows:
    """Rows of queries or keys in another order than Hugging Face's."""

    queries: Layout
    keys: Layout

    @property
    def what(self) -> str:
        meanings = {
            "halves": "",
            "neighbours": "in pairs of neighbours, as in Meta's own files (never moved)",
            "twice": "moved once too often",
        }
        if self.queries == self.keys:
            return f"the query and key rows for the rotary embedding are {meanings[self.keys]}"
        parts = (("query", self.queries), ("key", self.keys))
        wrong = [f"the {name} rows are {meanings[lay]}" for name, lay in parts if meanings[lay]]
        return f"for the rotary embedding {' and '.join(wrong)}"

    def mended(self, checkpoint: Checkpoint) -> Checkpoint:
        weights = _RotaryMended(checkpoint.weights, native_config(checkpoint), self)
        return dataclasses.replace(checkpoint, weights=weights)


@dataclasses.dataclass(frozen=True)
class SwappedGateUp:
    """gate_proj under the name of up_proj and the other way round."""

    what: str = "gate_proj and up_proj are exchanged"

    def mended(self, checkpoint: Checkpoint) -> Checkpoint:
        names = {
            name: name.replace("gate_proj", "up_proj")
            if "gate_proj" in name
            else name.replace("up_proj", "gate_proj")
            for name in checkpoint.weights.tensors()
        }
        return dataclasses.replace(checkpoint, weights=_Renamed(checkpoint.weights, names))


@dataclasses.dataclass(frozen=True)
class WrongHead:
    """`tie_word_embeddings` says the opposite of what the weights were trained with."""

    is_tied: bool

    @property
    def what(self) -> str:
        said, meant = ("true", "its own lm_head") if self.is_tied else ("false", "its embedding")
        return f"config.json says tie_word_embeddings {said}, but {meant} is the head"

    def mended(self, checkpoint: Checkpoint) -> Checkpoint:
        config: dict[str, Any] = {**checkpoint.config, "tie_word_embeddings": not self.is_tied}
        names = {name: name for name in checkpoint.weights.tensors()}
        if not self.is_tied:
            del names[_HEAD]
        return dataclasses.replace(
            checkpoint, config=config, weights=_Renamed(checkpoint.weights, names)
        )


@dataclasses.dataclass(frozen=True)
class MissingScaling:
    """No `rope_scaling` in a config whose `max_sequence_length` is a multiple of the positions.

    Vicuna v1.5-16k with that entry lost: its positions run `factor` times too fast.
    """

    factor: int

    @property
    def what(self) -> str:
        return (
            f"config.json lacks the rope_scaling that its max_sequence_length asks for "
            f"({{'type': 'linear', 'factor': {self.factor:.1f}}})"
        )

    def mended(self, checkpoint: Checkpoint) -> Checkpoint:
        config = dict(checkpoint.config)
        scaling = {"rope_type": "linear", "factor": float(self.factor)}
        table = config.get("rope_parameters")  # where transformers 5 has it, beside the base
        if isinstance(table, dict):
            config["rope_parameters"] = {**table, **scaling}
        else:
            config["rope_scaling"] = scaling
        return dataclasses.replace(checkpoint, config=config)


def suspected_scaling(checkpoint: Checkpoint) -> MissingScaling | None:
    """Scaling that config.json itself misses; looks at no weight."""
    config = native_config(checkpoint)
    whole = checkpoint.config.get("max_sequence_length")
    if config.rope.kind != "default" or isinstance(whole, bool) or not isinstance(whole, int):
        return None
    factor, rest = divmod(whole, config.context_length)
    return MissingScaling(factor) if factor > 1 and not rest and factor <= MAX_FACTOR else None


def suspected_rows(checkpoint: Checkpoint) -> RotaryRows | None:
    """A wrong order of rows, if the weights look like it; cheap enough for every start."""
    orders = row_orders(checkpoint.weights, native_config(checkpoint))
    rows = RotaryRows(*(order.layout for order in orders))
    return None if rows == RotaryRows("halves", "halves") else rows


def other_faults(checkpoint: Checkpoint) -> list[Fault]:
    """What else could be wrong with weights that read no English; none for random ones."""
    config = native_config(checkpoint)
    if not all(order.is_trained for order in row_orders(checkpoint.weights, config)):
        return []
    faults: list[Fault] = [SwappedGateUp()]
    if _HEAD in checkpoint.weights.tensors():
        faults.append(WrongHead(config.is_tied))
    return faults


class _Renamed:
    """A checkpoint's tensors under other names; a `WeightSource` that does not own the files."""

    def __init__(self, weights: WeightSource, names: Mapping[str, str]) -> None:
        """`names`: by new name, the old one."""
        self._weights = weights
        self._names = names
        infos = weights.tensors()
        self._tensors = {new: infos[old]._replace(name=new) for new, old in names.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        return self._weights.read(self._names[name], rows)

    def close(self) -> None:
        self._weights.close()


class _RotaryMended:
    """A checkpoint whose query and key rows come in halves; likewise."""

    def __init__(self, weights: WeightSource, config: ModelConfig, fault: RotaryRows) -> None:
        self._weights = weights
        self._dim = config.head_dim
        self._layouts: dict[str, Layout] = {"q_proj": fault.queries, "k_proj": fault.keys}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._weights.tensors()

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        module = name.rpartition(".")[0].rpartition(".")[2]
        layout = self._layouts.get(module, "halves")
        if layout == "halves":
            return self._weights.read(name, rows)
        wanted = rows or range(self._weights.tensors()[name].shape[0])
        heads = range(
            wanted.start // self._dim * self._dim, -(-wanted.stop // self._dim) * self._dim
        )
        tensor = put_right(self._weights.read(name, heads), self._dim, layout)
        return tensor[wanted.start - heads.start : wanted.stop - heads.start]

    def close(self) -> None:
        self._weights.close()
