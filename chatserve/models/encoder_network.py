"""An encoder of transformers: token ids in, hidden states out, many texts of any length at once.

Knows no pooling and no queue. Runs transformers' own code, never a model folder's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from chatserve.errors import DoesNotFit, ModelLoadError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.device import DevicePolicy
from chatserve.models.encoders import longest_text, refuse_unserved
from chatserve.models.fallback import plain_hf_config, refusals
from chatserve.models.memory import available_bytes, in_gb
from chatserve.progress import Progress

logger = logging.getLogger(__name__)

_UNUSED = ("pooler.", "position_ids")  # of the bare model: no hidden state depends on them


class EncoderNetwork:
    """`context_length`: tokens that one text may have."""

    def __init__(self, model: Any, policy: DevicePolicy) -> None:
        config = model.config
        self._model = model
        self.policy = policy
        self.vocab_size = int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.context_length = longest_text(config, config.model_type)
        pad_id = config.pad_token_id
        self._pad_id = pad_id if type(pad_id) is int and 0 <= pad_id < self.vocab_size else 0

    def states(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The last layer's (T, hidden) of each text, float32 on the CPU."""
        longest = max(map(len, texts))
        ids = [[*text, *[self._pad_id] * (longest - len(text))] for text in texts]
        mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        device = self.policy.device
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
            )
        states = output.last_hidden_state.float().cpu()
        return [rows[: len(text)] for rows, text in zip(states, texts, strict=True)]


def weights_bytes(checkpoint: Checkpoint, policy: DevicePolicy) -> int:
    """Of all tensors of the files, in the policy's dtype."""
    size = policy.dtype.itemsize
    infos = checkpoint.weights.tensors().values()
    return sum(torch.Size(info.shape).numel() * size for info in infos)


def working_bytes(checkpoint: Checkpoint, policy: DevicePolicy, max_rows: int) -> int:
    """Of a step of `max_rows` tokens; sixteen times the hidden size, a guess."""
    hidden = int(checkpoint.config.get("hidden_size") or checkpoint.config.get("dim") or 1024)
    return 16 * max_rows * hidden * policy.dtype.itemsize


def load_encoder_network(
    checkpoint: Checkpoint,
    policy: DevicePolicy,
    *,
    progress: Progress | None = None,
    max_rows: int = 512,
) -> EncoderNetwork:
    """Load a checkpoint for `policy`.

    Raises `ModelLoadError` for an encoder that is not served and for weights that are not its own,
    `DoesNotFit` before any are read.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
    from transformers.utils import logging as hf_logging

    refuse_unserved(checkpoint.config)
    hf_config = plain_hf_config(checkpoint.config)
    _check_memory(checkpoint, policy, max_rows)
    state = _read(checkpoint, policy, progress or (lambda done, total: None))
    hf_logging.disable_progress_bar()  # the loader draws its own
    with refusals("transformers cannot load this model"):
        model, report = MODEL_MAPPING[type(hf_config)].from_pretrained(
            None,
            config=hf_config,
            state_dict=state,
            dtype=policy.dtype,
            attn_implementation="eager" if policy.attention == "plain" else None,
            output_loading_info=True,
        )
    state.clear()
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(_UNUSED))
    if missing:
        raise ModelLoadError(
            f"{checkpoint.path} lacks {len(missing)} tensors of {type(model).__name__}, first "
            f"{missing[0]}; the download is incomplete or config.json is another model's"
        )
    with refusals("transformers cannot load this model"):
        model.eval().requires_grad_(False).to(policy.device)
        return EncoderNetwork(model, policy)


def _check_memory(checkpoint: Checkpoint, policy: DevicePolicy, max_rows: int) -> None:
    needed = weights_bytes(checkpoint, policy)
    working = working_bytes(checkpoint, policy, max_rows)
    available = available_bytes(policy.device)
    if needed + working > available:
        raise DoesNotFit(
            f"{checkpoint.path} needs {in_gb(needed)} of weights in {policy.dtype_name} and "
            f"{in_gb(working)} to work in, {policy.device.type} has {in_gb(available)} free; use a "
            "smaller model or free some memory"
        )


def _read(
    checkpoint: Checkpoint, policy: DevicePolicy, report: Progress
) -> dict[str, torch.Tensor]:
    infos = checkpoint.weights.tensors().values()
    done, total = 0, sum(info.num_bytes for info in infos)
    state: dict[str, torch.Tensor] = {}
    report(0, total)
    for info in infos:
        dtype = policy.dtype if info.is_real else info.dtype
        state[info.name] = checkpoint.weights.read(info.name).to(dtype)
        done += info.num_bytes
        report(done, total)
    return state
