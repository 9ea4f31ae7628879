"""What needs a CUDA device; `make gpu-check` runs these, and those of the Triton kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.gpu_models import NoTokenizer
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.models.batch import Batch, Segment
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy, check, choose_policy
from chatserve.models.llama import Llama
from chatserve.models.loader import build_network
from tests import networks, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMS = {"half": {}, "int8": {"load_8bit": True}, "int4": {"load_4bit": True}}


def build(policy: DevicePolicy, model_type: str = "llama") -> Llama:
    hf_model = tiny.build_hf_model(model_type)
    network = build_network(ModelConfig.from_hf(hf_model.config.to_dict()), policy)
    state = hf_model.state_dict()
    with torch.inference_mode():
        for name, place in network.destinations().items():
            place.target.load_rows(place.start, state[name])
    return network


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_self_test_keeps_every_backend(dtype: str, form: str) -> None:
    if (dtype, form) == ("float32", "int4"):
        pytest.skip("4 bits have no product in float32")
    policy = choose_policy("cuda", dtype, **FORMS[form])
    assert check(policy) == policy
    assert policy.network == ("torch" if dtype == "float32" else "triton")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(("dtype", "tolerance"), [
    ("float32", 1e-3), ("float16", 0.02), ("bfloat16", 0.1),
])  # fmt: skip
@torch.inference_mode()
def test_logits_are_near_transformers(dtype: str, tolerance: float, model_type: str) -> None:
    network = build(choose_policy("cuda", dtype), model_type)
    ids = torch.arange(2, 60)
    expected = tiny.build_hf_model(model_type)(ids[None]).logits[0]
    logits = networks.logits(network, ids)
    error = (logits.float().cpu() - expected).abs().max()
    assert error < tolerance * expected.abs().max()


@pytest.mark.parametrize("form", ["int8", "int4"])
@torch.inference_mode()
def test_compressed_logits_are_near_the_same_codes_dequantised(form: str) -> None:
    policy = choose_policy("cuda", "float16", **FORMS[form])
    reference = dataclasses.replace(policy, network="torch", int8="dequantise")
    ids = torch.arange(2, 60)
    actual, expected = (networks.logits(build(item), ids) for item in (policy, reference))
    assert (actual - expected).abs().max() < 0.02 * expected.abs().max()


@torch.inference_mode()
def test_replayed_graphs_give_the_eager_steps_logits() -> None:
    network = build(choose_policy("cuda", "float16"))
    pool = network.build_kv_pool(128, 32)
    eager = network.build_kv_pool(128, 32)
    for position in range(40):
        for num_rows in (1, 3, 64):
            segments = [Segment(row, 1, position, [row, 64 + row]) for row in range(num_rows)]
            batch = Batch(
                [(position + row) % 200 for row in range(num_rows)],
                [position] * num_rows, segments, range(num_rows),
            )  # fmt: skip
            replayed = network.forward(batch, pool).clone()
            expected = plain_forward(network, batch, eager)
            assert torch.isfinite(replayed).all()
            assert (replayed - expected).abs().max() < 0.02 * expected.abs().max()


def plain_forward(network: Llama, batch: Batch, pool: object) -> torch.Tensor:
    """The same weights through PyTorch's operators."""
    return Llama.forward(network, batch, pool)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_streams_of_all_bucket_sizes_end_and_give_their_blocks_back(form: str) -> None:
    network = build(check(choose_policy("cuda", "float16", **FORMS[form])))
    engine = Engine(network, NoTokenizer(), num_kv_tokens=128 * 64, max_num_seqs=64)
    free = engine.num_free_kv_tokens
    for num_streams in (1, 2, 5, 64):
        lengths: dict[str, int] = {}
        for index in range(num_streams):
            # they end one after the other, so that buckets shrink on the way
            params = SamplingParams(temperature=0, max_tokens=4 + index % 9, ignore_eos=True)
            prompt = [(index * 7 + at) % 200 for at in range(3 + index)]
            engine.add(f"{num_streams}-{index}", prompt, params)
        while engine.has_work:
            for event in engine.step():
                assert event.error is None
                lengths[event.seq_id] = lengths.get(event.seq_id, 0) + len(event.token_ids)
        assert lengths == {f"{num_streams}-{index}": 4 + index % 9 for index in range(num_streams)}
    assert engine.num_free_kv_tokens == free
