"""What needs a CUDA device; `make gpu-check` runs these."""

from __future__ import annotations

import pytest
import torch

from chatserve.models.config import ModelConfig
from chatserve.models.device import check, choose_policy
from chatserve.models.llama import Llama
from tests import networks, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("load_8bit", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_self_test_keeps_every_backend(dtype: str, load_8bit: bool) -> None:
    policy = choose_policy("cuda", dtype, load_8bit=load_8bit)
    assert check(policy) == policy


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "load_8bit", "tolerance"), [
    ("float32", False, 1e-3), ("float16", False, 0.02), ("bfloat16", False, 0.1),
    ("float16", True, 0.1),
])  # fmt: skip
def test_logits_are_near_the_cpus(dtype: str, load_8bit: bool, tolerance: float) -> None:
    hf_model = tiny.build_hf_model()
    policy = choose_policy("cuda", dtype, load_8bit=load_8bit)
    native = Llama(ModelConfig.from_hf(hf_model.config.to_dict()), policy)
    state = hf_model.state_dict()
    for name, place in native.destinations().items():
        place.target.load_rows(place.start, state[name])
    ids = torch.arange(2, 60)
    logits = networks.logits(native, ids)
    expected = hf_model(ids[None]).logits[0]
    error = (logits.float().cpu() - expected).abs().max()
    assert error < tolerance * expected.abs().max()
