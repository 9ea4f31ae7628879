"""Whether the Triton network computes here what the plain one computes on the CPU: run at start.

Compilers, drivers and cards differ, and a wrong kernel says nothing. No policy is decided here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from chatserve.models.batch import Batch, Segment
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.llama import Llama
from chatserve.models.quantize import (
    matmul_dequantise,
    matmul_int4_dequantise,
    quantise_int4,
    quantise_rows,
)
from chatserve.models.triton.graphs import GraphBackend
from chatserve.models.triton.int4_matmul import matmul_int4
from chatserve.models.triton.int8_matmul import matmul_int8
from chatserve.models.triton.network import TritonLlama

_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256,
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
_BLOCK_SIZE = 32
# a whole prompt long enough for flash attention, a chunk after it, two steps of decode
_COUNTS = (130, 20, 1, 1)
_BLOCK_IDS = (5, 1, 4, 2, 3, 0)


def failure(policy: DevicePolicy, graphs: GraphBackend | None = None) -> str | None:
    """Why the network must not run under `policy`; None when its logits are right.

    Takes seconds where nothing is in Triton's cache yet.
    """
    return _reason(lambda: _agrees(policy, graphs), "its logits differ from the CPU's")


def products_failure(policy: DevicePolicy) -> str | None:
    """Why no product of packed weights must run under `policy`; None when they are right."""
    return _reason(lambda: _products_agree(policy), "they differ from the CPU's")


def _reason(agrees: Callable[[], bool], wrong: str) -> str | None:
    try:
        return None if agrees() else wrong
    # compiler, linker and driver raise classes of their own, and a start must survive them all
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


@torch.inference_mode()
def _agrees(policy: DevicePolicy, graphs: GraphBackend | None) -> bool:
    config = ModelConfig.from_hf(_CONFIG)
    policy = dataclasses.replace(policy, int8=None, packing=None)
    plain = DevicePolicy(torch.device("cpu"), torch.float32, "plain", None, ())
    network, reference = TritonLlama(config, policy, graphs), Llama(config, plain)
    _fill(network, policy.dtype)
    _fill(reference, policy.dtype)
    pools = [model.build_kv_pool(len(_BLOCK_IDS), _BLOCK_SIZE) for model in (network, reference)]
    num_past = 0
    for count in _COUNTS:
        batch = _batch(num_past, count)
        actual = network.forward(batch, pools[0]).float().cpu()
        expected = reference.forward(batch, pools[1])
        # a dozen roundings on the way to a logit, each of them relative to the largest
        allowed = 16 * torch.finfo(policy.dtype).eps * expected.abs().max()
        if not (actual - expected).abs().max() <= allowed:
            return False
        num_past += count
    return True


@torch.inference_mode()
def _products_agree(policy: DevicePolicy) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 1056, generator=generator)
    codes, row_scales = quantise_rows(weight, policy.dtype)
    packed, group_scales = quantise_int4(weight)
    for num_rows in (1, 5, 33):
        x = torch.randn(num_rows, 1056, generator=generator).to(policy.dtype)
        pairs = (
            (matmul_int8, matmul_dequantise, codes, row_scales),
            (matmul_int4, matmul_int4_dequantise, packed, group_scales),
        )
        for multiply, reference, *weights in pairs:
            on_device = [part.to(policy.device) for part in (x, *weights)]
            expected = reference(x.float(), *weights)
            allowed = 8 * torch.finfo(policy.dtype).eps * expected.abs().max()
            if not (multiply(*on_device).float().cpu() - expected).abs().max() <= allowed:
                return False
    return True


def _batch(num_past: int, count: int) -> Batch:
    positions = range(num_past, num_past + count)
    segment = Segment(0, count, num_past, _BLOCK_IDS)
    return Batch([31 * at % 256 for at in positions], positions, [segment], range(count))


def _fill(network: Llama, dtype: torch.dtype) -> None:
    """The same random weights each time, rounded to `dtype` for the reference, too."""
    generator = torch.Generator().manual_seed(0)
    for place in network.destinations().values():
        scale = 1.0 if len(place.shape) == 1 else place.shape[-1] ** -0.5
        rows = torch.randn(place.shape, generator=generator) * scale
        place.target.load_rows(place.start, rows.to(dtype).float())
