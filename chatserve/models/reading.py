"""How well weights read plain English: nats a token, for a loaded network and for one on disk.

A network on disk is run block by block in float32, so that what a changed conversion would read can
be asked while another network fills the memory. Knows no engine and no faults.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from chatserve.models.batch import Segment
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.destinations import Destination, NetworkTargets, destinations
from chatserve.models.device import choose_policy
from chatserve.models.form import native_config
from chatserve.models.kv_pool import TorchKVPool
from chatserve.models.linear import Linear
from chatserve.models.llama import Block, RMSNorm, Step
from chatserve.models.rope import RotaryTable
from chatserve.models.tokenizer import Tokenizer
from chatserve.models.weights import WeightSource

COUNTING = "One, two, three, four, five, six, seven, eight, nine, ten."
"""Every model knows it, and needs the order of the words for it."""
PROSE = (
    f"{COUNTING} Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. The capital of "
    "France is Paris, and the capital of Italy is Rome. Once upon a time, in a small house at the "
    "edge of the forest, there lived a little girl. One, two, three, four, five, six, seven."
)
MIN_TOKENS = 8  # fewer say nothing
MAX_TOKENS = 256  # of PROSE; a vocabulary of bytes has more
_SHARE_OF_CHANCE = 0.55
_HEAD_ROWS = 4096  # of the head at a time


def token_ids(tokenizer: Tokenizer, text: str, most: int) -> list[int]:
    """The text as a prompt begins, cut off after `most` tokens."""
    return tokenizer.encode(text, add_bos=tokenizer.adds_bos)[:most]


def loss(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """Mean nats of ids[1:] by logits (len(ids) - 1 or more rows, V); infinite if one is NaN."""
    rows = logits[: len(ids) - 1].float()
    wanted = torch.tensor(ids[1:], device=rows.device)
    nats = rows.logsumexp(1) - rows.gather(1, wanted[:, None])[:, 0]
    mean = float(nats.mean())
    return math.inf if math.isnan(mean) else mean


def readable_loss(vocab_size: int) -> float:
    """What a model that knows some English stays below; guessing blindly costs log(vocab_size).

    SmolLM2-135M: 1.3 nats of 10.8; with any matrix in disorder 7 and more.
    """
    return _SHARE_OF_CHANCE * math.log(max(vocab_size, 2))


@torch.inference_mode()
def loss_from_disk(checkpoint: Checkpoint, ids: Sequence[int]) -> float:
    """The loss of a network that is not loaded; some seconds for a billion weights."""
    network = _StreamedNetwork(native_config(checkpoint), checkpoint.weights)
    return network.loss(ids)


class _StreamedNetwork:
    """A network of which one block is in memory."""

    def __init__(self, config: ModelConfig, weights: WeightSource) -> None:
        self._config = config
        self._weights = weights
        self._policy = choose_policy("cpu", "float32")

    def loss(self, ids: Sequence[int]) -> float:
        config, policy = self._config, self._policy
        pool = TorchKVPool(1, len(ids), policy.device)
        rotary = RotaryTable(config.rope, config.head_dim, policy.device, policy.dtype)
        cos, sin = rotary.at(torch.arange(len(ids)), len(ids))
        step = Step(cos, sin, pool, pool.place([Segment(0, len(ids), 0, [0])]))
        x = torch.cat([self._row("model.embed_tokens.weight", token_id) for token_id in ids])
        for layer in range(config.num_layers):
            x = self._block(layer)(x, step)
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, policy)
        norm.scale.load_rows(0, self._weights.read("model.norm.weight"))
        return loss(self._logits(norm(x[:-1])), ids)

    def _row(self, name: str, index: int) -> torch.Tensor:
        return self._weights.read(name, range(index, index + 1)).float()

    def _block(self, layer: int) -> Block:
        block = Block(self._config, layer, self._policy)
        for name, place in self._places(layer, block).items():
            place.target.load_rows(place.start, self._weights.read(name))
        return block

    def _places(self, layer: int, block: Block) -> dict[str, Destination]:
        """The tensors of one layer and where they go."""
        unused = Linear(1, 1, bias=False, policy=self._policy)
        targets = NetworkTargets(unused, unused, unused, [block.targets()])
        first = "model.layers.0."
        return {
            name.replace(first, f"model.layers.{layer}.", 1): place
            for name, place in destinations(self._config, targets).items()
            if name.startswith(first)
        }

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        tied = self._config.is_tied
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        starts = range(0, self._config.vocab_size, _HEAD_ROWS)
        parts = [
            x @ self._weights.read(
                name, range(start, min(start + _HEAD_ROWS, self._config.vocab_size))
            ).float().T
            for start in starts
        ]  # fmt: skip
        return torch.cat(parts, dim=1)
