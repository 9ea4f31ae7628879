"""`system_fingerprint`: a short name for all that decides which bits a worker's logits have.

Two workers of the same one continue a text alike, as far as its neighbours let them
(`--deterministic`).
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping
from typing import Any

import torch

import chatserve
from chatserve.models.chat_template import TemplateChoice
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.device import DevicePolicy
from chatserve.models.fingerprint import weights_fingerprint
from chatserve.models.tokenizer import Tokenizer

# pieces of every kind: letters alone, words, digits, spaces, lines, code, other scripts, an emoji
_PROBE = " ".join(string.printable) + (
    "The 3 quick\n\n  foxes are jumping: x = {'é': 0.25}  # Привет, 你好 🙂\t1234567890"
)


def fingerprint(
    checkpoint: Checkpoint,
    policy: DevicePolicy,
    tokenizer: Tokenizer,
    choice: TemplateChoice | None,
    sources: Mapping[str, str],
    *,
    system_message: str | None = None,
    placement: str | None = None,
    block_size: int | None = None,
) -> str:
    """Covers weights (as far as `weights_fingerprint` does), form, backends, tokenizer, template.

    sources: the model's own templates. system_message: what a chat without one gets. placement: of
    layers on several devices. block_size: of prompts that are computed by blocks. choice: None of a
    model without answers, of which it counts how whole texts begin and end.
    """
    kernels = policy.kernels.level if policy.kernels else None
    parts: dict[str, Any] = {
        "version": chatserve.__version__,
        "weights": weights_fingerprint(checkpoint),
        "form": [
            policy.device.type, policy.dtype_name, policy.attention, policy.int8, policy.network,
            str(policy.packing), placement, block_size,
        ],
        "arithmetic": kernels or _arithmetic(policy.device),
        "tokenizer": [
            tokenizer.encode(_PROBE, add_bos=tokenizer.adds_bos), tokenizer.vocab_size,
            sorted(tokenizer.eos_ids), dict(tokenizer.special_ids),
        ],
        "template": (
            [choice.template.name, dict(sources), system_message] if choice else tokenizer.frame
        ),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    return f"fp_{digest.hexdigest()[:16]}"


def _arithmetic(device: torch.device) -> list[str | int]:
    """Whose products they are: the CPU kernels of one level compute alike on any machine, PyTorch's
    operators do not."""
    parts: list[str | int] = [torch.__version__]
    if device.type == "cuda":
        return [*parts, torch.cuda.get_device_name(device)]
    return [*parts, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
