"""Device choices, the self-test that guards them, and what can be known of Metal without a Mac."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chatserve.errors import StartupError, UsageError
from chatserve.models import attention, device, quantize, triton
from chatserve.models.config import ModelConfig
from chatserve.models.device import check, choose_policy, policy_for
from chatserve.models.llama import Llama
from tests import tiny
from tests.networks import CONSECUTIVE, SCATTERED, Solo


def test_auto_says_why() -> None:
    policy = choose_policy(load_8bit=True)
    assert policy.device.type in ("cpu", "cuda", "mps")
    assert policy.device.type in policy.describe() and "int8" in policy.describe()
    assert len(policy.reasons) == 4


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--device {kind}.*--device cpu"):
        choose_policy(kind, load_8bit=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("load_8bit", [False, True])
def test_the_self_test_passes_here(dtype: str, load_8bit: bool) -> None:
    policy = choose_policy("cpu", dtype, load_8bit=load_8bit)
    assert check(policy) == policy


def test_a_wrong_fused_attention_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks_the_future(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
        return attention._plain(q, k, v, None)

    monkeypatch.setitem(attention._BACKENDS, "sdpa", leaks_the_future)  # type: ignore[arg-type]
    policy = check(choose_policy("cpu", "float32", load_8bit=False))
    assert policy.attention == "plain"
    assert "failed its self-test" in policy.reasons[-1]


def test_a_wrong_int8_operator_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda x, codes, scales: quantize.matmul_dequantise(x, codes, scales) * 1.5  # noqa: E731
    monkeypatch.setitem(quantize.MATMULS, "cpu", wrong)  # type: ignore[arg-type]
    assert check(choose_policy("cpu", "bfloat16", load_8bit=True)).int8 == "dequantise"


def test_nan_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = lambda q, k, v, mask: attention._plain(q, k, v, mask) * torch.nan  # noqa: E731
    monkeypatch.setitem(attention._BACKENDS, "sdpa", nan)  # type: ignore[arg-type]
    assert check(choose_policy("cpu", "float32", load_8bit=False)).attention == "plain"


def test_an_operator_that_raises_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_no_kernel(*arguments: Any) -> torch.Tensor:
        raise NotImplementedError("not implemented for this device")

    monkeypatch.setitem(attention._BACKENDS, "sdpa", has_no_kernel)  # type: ignore[arg-type]
    monkeypatch.setitem(quantize.MATMULS, "cpu", has_no_kernel)  # type: ignore[arg-type]
    policy = check(choose_policy("cpu", "bfloat16", load_8bit=True))
    assert (policy.attention, policy.int8) == ("plain", "dequantise")


@pytest.mark.parametrize("num_queries", [1, 45])
def test_a_fused_attention_wrong_in_one_phase_is_replaced(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode hands the group of query heads over as queries: 2 for this test's shapes."""
    wrong_for = 2 if num_queries == 1 else 45

    def wrong(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
        return attention._plain(q, k, v, mask) * (0.5 if q.shape[-2] == wrong_for else 1.0)

    monkeypatch.setitem(attention._BACKENDS, "sdpa", wrong)  # type: ignore[arg-type]
    assert check(choose_policy("cpu", "float32", load_8bit=False)).attention == "plain"


@pytest.mark.parametrize("num_rows", [1, 33])
def test_an_int8_operator_wrong_in_one_phase_is_replaced(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Any, codes: Any, scales: Any) -> torch.Tensor:
        factor = 1.5 if x.shape[0] == num_rows else 1.0
        return quantize.matmul_dequantise(x, codes, scales) * factor

    monkeypatch.setitem(quantize.MATMULS, "cpu", wrong)  # type: ignore[arg-type]
    assert check(choose_policy("cpu", "bfloat16", load_8bit=True)).int8 == "dequantise"


def test_a_device_that_computes_plain_products_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = device.attend

    def wrong(*arguments: torch.Tensor, backend: str) -> torch.Tensor:
        result = real(*arguments, backend=backend)  # type: ignore[arg-type]
        return result + 1 if arguments[0].dtype == torch.bfloat16 else result

    monkeypatch.setattr(device, "attend", wrong)
    with pytest.raises(StartupError, match="--device cpu"):
        check(choose_policy("cpu", "bfloat16", load_8bit=False))


# Metal, as far as it can be checked without a Mac: which operators run, and whether PyTorch's own
# table of operators (it ships inside the package) gives each of them a Metal kernel.


@cache
def operator_table() -> Any:
    import torchgen
    from torchgen.gen import parse_native_yaml

    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    return parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))


def has_metal_kernel(name: str) -> bool:
    """Whether an aten operator ("mm", "add.Tensor") runs on Metal by itself or by composition."""
    from torchgen.model import DispatchKey

    table = operator_table()
    by_name = {str(function.func.name): function for function in table.native_functions}
    function = by_name[name]
    composite = (
        function.has_composite_implicit_autograd_kernel
        or function.has_composite_explicit_autograd_kernel
        or function.has_composite_explicit_autograd_non_functional_kernel
    )
    candidates = [function]
    if function.structured_delegate is not None:
        candidates.append(by_name[str(function.structured_delegate)])
    metal = table.backend_indices[DispatchKey.MPS]
    return composite or any(metal.has_kernel(candidate) for candidate in candidates)


class Recorder(TorchDispatchMode):
    """Collects the names of all aten operators; implicit composites are taken apart first."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.removeprefix("aten::") + (
            f".{func._overloadname}" if func._overloadname != "default" else ""))  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("load_8bit", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_every_operator_of_the_metal_policy_has_a_metal_kernel(
    model_type: str, load_8bit: bool
) -> None:
    hf_model = tiny.build_hf_model(model_type)
    policy = policy_for("mps", torch.float16, load_8bit=load_8bit)
    # on the CPU the operator wants bfloat16 scales; its Metal kernel takes the activations' dtype
    if load_8bit:
        policy = dataclasses.replace(policy, dtype=torch.bfloat16)
    native = Llama(ModelConfig.from_hf(hf_model.config.to_dict()), policy)
    state = hf_model.state_dict()
    for name, place in native.destinations().items():
        place.target.load_rows(place.start, state[name])
    with torch.no_grad(), Recorder() as recorder:
        for block_ids in (SCATTERED, CONSECUTIVE):  # gathered, and views
            solo = Solo(native, block_ids)
            solo.feed(range(20))
            solo.feed([3])
            solo.pool.copy_block(0, 1)
    assert "_softmax" in recorder.names and ("mm" in recorder.names) != load_8bit
    assert ("_weight_int8pack_mm" in recorder.names) == load_8bit
    without = sorted(name for name in recorder.names if not has_metal_kernel(name))
    assert not without, f"no Metal kernel for {without}"


def test_the_table_knows_an_operator_without_a_metal_kernel() -> None:
    assert not has_metal_kernel("_int_mm")
    assert not has_metal_kernel("_weight_int4pack_mm_for_cpu")
    assert has_metal_kernel("mm") and has_metal_kernel("add.Tensor")


@pytest.mark.mps
def test_metal_agrees_with_the_cpu() -> None:
    if not torch.backends.mps.is_available():
        pytest.skip("needs Apple Metal")
    check(choose_policy("mps", load_8bit=True))


# CUDA, as far as it can be checked without a card: the choices, and a failed self-test's end.


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def has_triton(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if found else None)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("dtype", "found", "network", "int8", "reason"), [
    ("auto", True, "triton", "triton", "own kernels in Triton"),
    ("float16", True, "triton", "triton", "own kernels in Triton"),
    ("float32", True, "torch", "dequantise", "for half precision"),
    ("auto", False, "torch", "dequantise", "triton is not installed"),
])  # fmt: skip
def test_cuda_runs_on_triton_where_it_can(
    dtype: str, found: bool, network: str, int8: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_triton(monkeypatch, found)
    policy = choose_policy("cuda", dtype, load_8bit=True)
    assert (policy.network, policy.int8) == (network, int8)
    assert reason in policy.describe()
    assert ("attention=triton" in policy.describe()) == (network == "triton")


@pytest.mark.usefixtures("cuda")
def test_four_bits_on_cuda_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    has_triton(monkeypatch, True)
    assert choose_policy("cuda", load_4bit=True).int8 == "triton"
    with pytest.raises(UsageError, match=r"int8/32 weights .* use --load-8bit alone"):
        choose_policy("cuda", load_8bit=True, quant_group="32")
    has_triton(monkeypatch, False)
    with pytest.raises(UsageError, match=r"int4/32 weights .* use --load-8bit alone"):
        choose_policy("cuda", load_4bit=True)


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_other_devices_never_choose_triton(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    has_triton(monkeypatch, True)
    policy = choose_policy(kind, load_8bit=True)
    assert policy.network == "torch" and policy.int8 != "triton"


@pytest.mark.usefixtures("cuda")
def test_failed_triton_kernels_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    has_triton(monkeypatch, True)
    policy = choose_policy("cuda", load_8bit=True)
    stand_in = ModuleType("self_test")
    monkeypatch.setattr(triton, "self_test", stand_in, raising=False)
    stand_in.failure = stand_in.products_failure = lambda policy: None  # type: ignore[attr-defined]
    assert device._without_wrong_kernels(policy) == policy
    stand_in.failure = lambda policy: "no C compiler"  # type: ignore[attr-defined]
    stand_in.products_failure = lambda policy: "wrong"  # type: ignore[attr-defined]
    replaced = device._without_wrong_kernels(policy)
    assert (replaced.network, replaced.int8) == ("torch", "dequantise")
    assert replaced.reasons[-2:] == (
        "Triton kernels failed their self-test (no C compiler), PyTorch's instead",
        "Triton products failed their self-test (wrong), dequantise instead",
    )


@pytest.mark.parametrize(
    ("dtype", "load_8bit", "has_kernels", "expected"),
    [
        ("float32", False, False, True), ("bfloat16", False, False, False),
        ("float32", True, False, False), ("bfloat16", True, True, True),
    ],
)  # fmt: skip
def test_only_some_forms_compute_a_row_alike_in_every_batch(
    dtype: str, load_8bit: bool, has_kernels: bool, expected: bool
) -> None:
    policy = choose_policy("cpu", dtype, load_8bit=load_8bit)
    if has_kernels and policy.kernels is None:
        pytest.skip("the kernels were not compiled here")
    if not has_kernels:
        policy = dataclasses.replace(policy, kernels=None)
    assert policy.has_steady_rows is expected
