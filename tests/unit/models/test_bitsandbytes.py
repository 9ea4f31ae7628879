"""LLM.int8 and NF4: the package's own products over rows that are filled slice by slice."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.errors import ModelLoadError, StartupError, UsageError
from chatserve.models import bitsandbytes_linear, device
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy, check, choose_policy, policy_for
from chatserve.models.device_map import DeviceMap, Part
from chatserve.models.linear import BitsAndBytesLinear, build_matrix
from chatserve.models.loader import load_model
from chatserve.models.memory_plan import plan_memory
from chatserve.models.packing import Packing
from chatserve.models.weight_bytes import weight_bytes
from tests import tiny
from tests.networks import logits

INT4 = Packing(bits=4, is_grouped=True)
FORMS = {"LLM.int8": Packing(), "NF4": INT4}

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("needs bitsandbytes", allow_module_level=True)


def policy_of(form: str, dtype: torch.dtype = torch.float32) -> DevicePolicy:
    """What CUDA would have, on this machine's CPU."""
    plain = policy_for("cuda", dtype, load_8bit=True)
    return dataclasses.replace(plain, int8="bitsandbytes", packing=FORMS[form])


def filled(weight: torch.Tensor, form: str, step: int) -> BitsAndBytesLinear:
    matrix = build_matrix(*weight.shape, bias=True, policy=policy_of(form))
    assert isinstance(matrix, BitsAndBytesLinear) and matrix.bias is not None
    for start in range(0, len(weight), step):
        matrix.load_rows(start, weight[start : start + step])
    matrix.bias.load_rows(0, torch.arange(len(weight)))
    return matrix


def theirs(weight: torch.Tensor, form: str, x: torch.Tensor) -> torch.Tensor:
    """The product by the package alone, from the whole matrix."""
    bnb = bitsandbytes_linear.package()
    bias = torch.arange(len(weight))
    if form == "NF4":
        packed = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return x @ bnb.functional.dequantize_4bit(*packed).T + bias
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    layer.bias = torch.nn.Parameter(bias.float(), requires_grad=False)
    product: torch.Tensor = layer.to("cpu").eval()(x)
    return product


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [1, 33])
def test_products_are_those_of_the_package_whatever_the_slices(form: str, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    x = torch.randn(num_rows, 128, generator=generator)
    x[0, 7] = 30  # an outlier
    with torch.inference_mode():
        expected = theirs(weight, form, x)
        for step in (96, 7):
            torch.testing.assert_close(filled(weight, form, step)(x), expected)


@pytest.mark.parametrize(("form", "most"), [("LLM.int8", 0.01), ("NF4", 0.1)])
def test_rows_are_looked_up(form: str, most: float) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, 95, 5])
    found = filled(weight, form, 40).embed(ids, torch.float32)
    assert (found - weight[ids]).norm() < most * weight[ids].norm()
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_network_is_loaded_and_about_as_exact_as_in_our_own_form(
    form: str, model_type: str, tmp_path: Path
) -> None:
    tiny.save_model(
        tmp_path / "tiny", model_type, intermediate_size=128,
        tie_word_embeddings=model_type == "qwen2",
    )  # fmt: skip
    ids = torch.arange(40)
    checkpoint = open_checkpoint(tmp_path / "tiny")
    with closing(checkpoint.weights), torch.inference_mode():
        expected = logits(load_model(checkpoint, choose_policy("cpu", "float32")), ids)
        policy = policy_of(form)
        model = load_model(checkpoint, policy)
        found = logits(model, ids)
        own = dataclasses.replace(policy, int8="dequantise")
        own_error = (logits(load_model(checkpoint, own), ids) - expected).norm()
        assert (found - expected).norm() < 1.6 * own_error
        plan = plan_memory(checkpoint, policy)
        assert weight_bytes(model).total == pytest.approx(plan.weights_bytes, rel=0.03)
        offloaded = Part("cpu", "cpu:1")
        apart = DeviceMap(Part("cpu", "cpu"), (offloaded, offloaded), Part("cpu", "cpu"))
        placed = load_model(checkpoint, policy, device_map=apart, offload_folder=tmp_path)
        assert torch.equal(logits(placed, ids), found)


@pytest.mark.parametrize("form", FORMS)
def test_other_families_are_packed_so_too(form: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "neox", "gpt_neox", intermediate_size=128)
    checkpoint = open_checkpoint(tmp_path / "neox")
    ids = torch.arange(40)
    with closing(checkpoint.weights), torch.inference_mode():
        expected = logits(load_model(checkpoint, choose_policy("cpu", "float32")), ids)
        model = load_model(checkpoint, policy_of(form))
        assert type(model._model.gpt_neox.layers[0].mlp.dense_h_to_4h._packed).__name__ == (
            "BitsAndBytesLinear"
        )
        most = 0.05 if form == "LLM.int8" else 0.5
        assert (logits(model, ids) - expected).norm() < most * expected.norm()


def test_no_matrix_is_whole_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is quantised at a time is a slice, whatever the matrix is."""
    from chatserve.models import row_stream

    monkeypatch.setattr(row_stream, "SLICE_VALUES", 1024)
    tiny.save_model(tmp_path / "tiny", intermediate_size=128)
    largest = 0
    real = bitsandbytes_linear.NF4.load_rows

    def load_rows(matrix: Any, start: int, rows: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, rows.numel())
        real(matrix, start, rows)

    monkeypatch.setattr(bitsandbytes_linear.NF4, "load_rows", load_rows)
    checkpoint = open_checkpoint(tmp_path / "tiny")
    with closing(checkpoint.weights):
        load_model(checkpoint, policy_of("NF4"))
    assert largest == 1024


def test_rows_that_are_no_whole_groups_are_refused(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "tiny", intermediate_size=96)
    checkpoint = open_checkpoint(tmp_path / "tiny")
    with closing(checkpoint.weights):
        assert load_model(checkpoint, policy_of("LLM.int8"))
        with pytest.raises(ModelLoadError, match="groups of 64, which 96 columns"):
            load_model(checkpoint, policy_of("NF4"))


@pytest.mark.parametrize("form", FORMS)
def test_its_products_are_tried_before_weights_are_loaded(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert check(policy_of(form, dtype)).int8 == "bitsandbytes"
    kind = bitsandbytes_linear.NF4 if form == "NF4" else bitsandbytes_linear.LLMInt8
    right = kind.multiply
    monkeypatch.setattr(kind, "multiply", lambda matrix, x: right(matrix, x) * 1.2)
    with pytest.raises(StartupError, match="wrong products on cpu, or none; leave --quant-backend"):
        check(policy_of(form))
    monkeypatch.setattr(kind, "multiply", no_library)
    with pytest.raises(StartupError, match="wrong products on cpu, or none"):
        check(policy_of(form))


def no_library(matrix: object, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("Attempted to use bitsandbytes native library functionality")


def test_the_flag_asks_for_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(kind: str = "cpu", **options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            choose_policy(kind, quant_backend="bitsandbytes", **options)
        return caught.value.message

    assert "is a way to compress; give --load-8bit or --load-4bit" in refusal()
    assert refusal(load_8bit=True) == (
        "--quant-backend bitsandbytes: no CUDA device; leave it out: the CPU has kernels of its own"
    )
    monkeypatch.setattr(device, "_choose_device", lambda asked: (asked, ""))
    assert "Metal has its own product" in refusal("mps", load_8bit=True)
    assert "--quant-group" in refusal("cuda", load_8bit=True, quant_group="32")
    monkeypatch.setattr(bitsandbytes_linear.importlib.util, "find_spec", lambda name: None)
    assert "`pip install bitsandbytes`, or leave the flag out" in refusal("cuda", load_4bit=True)


@pytest.mark.parametrize(("load", "bits"), [("load_8bit", 8), ("load_4bit", 4)])
def test_on_cuda_the_flag_chooses_the_network_that_takes_it(
    load: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_choose_device", lambda asked: (asked, ""))
    options: dict[str, Any] = {load: True, "quant_backend": "bitsandbytes"}
    policy = choose_policy("cuda", "float16", **options)
    assert (policy.int8, policy.network) == ("bitsandbytes", "torch")
    assert policy.packing is not None and policy.packing.bits == bits
    assert policy.describe().count("of bitsandbytes") == 1


def test_the_package_fetches_no_kernels_and_warns_of_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On some processors it would download and run code as soon as it is imported."""
    code = (
        "import sys, types\n"
        "hub = sys.modules['kernels'] = types.ModuleType('kernels')\n"
        "hub.get_kernel = lambda *_, **__: sys.exit('fetched')\n"
        "from chatserve.models.bitsandbytes_linear import package\n"
        "package()\n"
        "assert sys.modules['kernels'] is hub\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with caplog.at_level(logging.DEBUG), torch.inference_mode():
        filled(torch.ones(32, 64), "LLM.int8", 32)(torch.ones(1, 64))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
