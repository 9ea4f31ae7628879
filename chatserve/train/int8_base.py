"""The base in 8 bits by bitsandbytes, for training on CUDA (LLM.int8, arXiv 2208.07339).

The matrices of the blocks become `Linear8bitLt`; the embedding and the heads stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from chatserve.errors import UsageError

_KEPT = ("lm_head", "score", "embed_out")


def pack_linears(model: Any) -> int:
    """Replace the matrices, on the CPU still; moving to CUDA packs them. Returns how many.

    Raises `UsageError` without bitsandbytes.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UsageError(
            "--int8: bitsandbytes is not installed; pip install bitsandbytes, or use --int8 off"
        ) from None
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.rpartition(".")[2] not in _KEPT
    ]
    for name in names:
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, own, _packed(bnb, getattr(module, own)))
    # what PEFT and the trainers ask to find the layers' kind
    model.is_loaded_in_8bit = True
    return len(names)


def _packed(bnb: Any, linear: nn.Linear) -> Any:
    packed = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        has_fp16_weights=False,
    )  # fmt: skip
    packed.weight = bnb.nn.Int8Params(
        linear.weight.data, requires_grad=False, has_fp16_weights=False
    )
    if linear.bias is not None:
        packed.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return packed
