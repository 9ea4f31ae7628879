"""Where and how a model runs: device, dtype, attention and int8 backend, each with its reason.

The one place that holds device rules. No model here. `check` compares the chosen operators with
float32 on the CPU at start, because some of them have been silently wrong (Metal's fused attention:
pytorch/pytorch issue 195910).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from chatserve.errors import StartupError, UsageError
from chatserve.kernels.library import Kernels
from chatserve.models.attention import AttentionBackend, attend
from chatserve.models.bitsandbytes_linear import multiplies_rightly, require_package
from chatserve.models.form import choose_kernels
from chatserve.models.hardware import multiplies_bfloat16
from chatserve.models.packing import FINE, FOUR_BITS, Packing, choose_packing
from chatserve.models.quantize import (
    MATMULS,
    Int8Backend,
    Int8Matmul,
    matmul_dequantise,
    quantise_rows,
)

logger = logging.getLogger(__name__)

Network = Literal["torch", "triton"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DevicePolicy:
    """The choices for one worker; `packing` is None without compression.

    `kernels` are the CPU's own; `int8` is the operator for packed weights, in networks that they
    cannot hold and on other devices. `network`: a Llama on PyTorch's operators, with `attention`,
    or on our own for CUDA.
    """

    device: torch.device
    dtype: torch.dtype
    attention: AttentionBackend
    int8: Int8Backend | None
    reasons: tuple[str, ...]
    packing: Packing | None = None
    kernels: Kernels | None = None
    network: Network = "torch"

    @property
    def kind(self) -> str:
        return self.device.type

    @property
    def on_kernels(self) -> bool:
        return self.kernels is not None

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of int8 scales: that of the operator's activations."""
        if self.device.type == "cpu":
            return torch.bfloat16
        return self.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def has_steady_rows(self) -> bool:
        """Whether a token's logits do not depend on how many are computed with it.

        Bit for bit on the CPU kernels, in all but near ties in float32. PyTorch's products in half
        precision round differently for one row and for several.
        """
        return self.kernels is not None or (self.dtype == torch.float32 and self.packing is None)

    def describe(self) -> str:
        """One line for the log."""
        int8 = f" int8={self.int8}" if self.int8 else ""
        if self.kernels:
            int8 = f" {self.packing}=kernels ({self.kernels.level})"
        attention = "triton" if self.network == "triton" else self.attention
        return (
            f"device={self.device.type} dtype={self.dtype_name} attention={attention}{int8} "
            f"({'; '.join(self.reasons)})"
        )


def choose_policy(
    device: str = "auto",
    dtype: str = "auto",
    *,
    load_8bit: bool = False,
    load_4bit: bool = False,
    quant_group: str | None = None,
    quant_backend: str = "native",
) -> DevicePolicy:
    """Choose for `--device`, `--dtype` and the compression asked for.

    quant_backend: whose products take compressed weights on CUDA, `native` or `bitsandbytes`.
    Raises `UsageError` when the device is asked for but not there, or cannot compress so.
    """
    kind, device_reason = _choose_device(device)
    packing = choose_packing(kind, load_8bit, load_4bit, quant_group)
    if quant_backend == "bitsandbytes":
        _check_bitsandbytes(packing, kind)
    torch_dtype, dtype_reason = _choose_dtype(kind, dtype)
    attention, attention_reason = _choose_attention(kind)
    network: Network = "torch"
    if kind == "cuda" and quant_backend == "native":
        network, attention_reason = _choose_network(torch_dtype)
    reasons = [device_reason, dtype_reason, attention_reason]
    int8: Int8Backend | None = None
    kernels: Kernels | None = None
    if packing is not None:
        int8, int8_reason = _choose_int8(kind, network)
        if quant_backend == "bitsandbytes":
            int8 = "bitsandbytes"
            int8_reason = "NF4 of bitsandbytes" if packing.bits == 4 else "LLM.int8 of bitsandbytes"
        elif kind == "cpu":
            kernels, kernels_reason = choose_kernels(packing)
            int8_reason = kernels_reason if kernels else f"{kernels_reason}; {int8_reason}"
        elif packing != Packing() and (packing.bits == 8 or network == "torch"):
            raise UsageError(f"{packing} weights have no product on {kind}; use --load-8bit alone")
        reasons.append(int8_reason)
    return DevicePolicy(
        torch.device(kind), torch_dtype, attention, int8, tuple(reasons), packing, kernels, network
    )


def _check_bitsandbytes(packing: Packing | None, kind: str) -> None:
    flag = "--quant-backend bitsandbytes"
    if packing is None:
        raise UsageError(f"{flag} is a way to compress; give --load-8bit or --load-4bit")
    if packing == FINE:
        raise UsageError(f"{flag} has no such form as --quant-group; leave one of them out")
    if kind != "cuda":
        way_out = "the CPU has kernels of its own" if kind == "cpu" else "Metal has its own product"
        raise UsageError(f"{flag}: no CUDA device; leave it out: {way_out}")
    require_package()


def policy_for(kind: str, dtype: torch.dtype, *, load_8bit: bool) -> DevicePolicy:
    """The backends of a device kind on whatever device is at hand.

    Lets a machine without Metal or CUDA run their choices on CPU tensors.
    """
    attention, _ = _choose_attention(kind)
    int8 = _choose_int8(kind, "torch")[0] if load_8bit else None
    packing = Packing() if load_8bit else None
    reasons = (f"{kind} policy on cpu",)
    return DevicePolicy(torch.device("cpu"), dtype, attention, int8, reasons, packing)


def check(policy: DevicePolicy) -> DevicePolicy:
    """Run the chosen operators on small inputs against float32 on the CPU.

    Returns the policy, each backend that fails replaced by the reference and the reason added.
    Raises `StartupError` when the reference is wrong on this device too.
    """
    if policy.device.type == "cuda":
        policy = _without_wrong_kernels(policy)
    if policy.attention != "plain" and not _attention_agrees(policy, policy.attention):
        reason = f"{policy.attention} attention failed its self-test, plain instead"
        policy = dataclasses.replace(policy, attention="plain", reasons=(*policy.reasons, reason))
    if policy.kernels is not None and not _kernels_agree(policy.kernels):
        reason = f"kernels for {policy.kernels.level} failed their self-test"
        if policy.packing != Packing():
            raise StartupError(f"{reason}; use --load-8bit alone, which can do without them")
        policy = dataclasses.replace(policy, kernels=None, reasons=(*policy.reasons, reason))
    if policy.int8 == "bitsandbytes" and not _int8_agrees(policy):
        raise StartupError(
            f"bitsandbytes computes wrong products on {policy.device.type}, or none; leave "
            "--quant-backend out"
        )
    if policy.int8 not in (None, "dequantise") and not _int8_agrees(policy):
        reason = f"{policy.int8} failed its self-test, dequantise instead"
        policy = dataclasses.replace(policy, int8="dequantise", reasons=(*policy.reasons, reason))
    if not _attention_agrees(policy, "plain") or not _int8_agrees(policy):
        raise StartupError(
            f"{policy.device.type} computes wrong results in {policy.dtype_name}: plain products "
            "differ from the CPU's; update PyTorch and the driver, or use --device cpu"
        )
    return policy


def _without_wrong_kernels(policy: DevicePolicy) -> DevicePolicy:
    """The policy without those Triton kernels that fail their self-test, and why."""
    if "triton" not in (policy.network, policy.int8):
        return policy
    from chatserve.models.triton import self_test

    if policy.network == "triton" and (failure := self_test.failure(policy)):
        reason = f"Triton kernels failed their self-test ({failure}), PyTorch's instead"
        policy = dataclasses.replace(policy, network="torch", reasons=(*policy.reasons, reason))
    if policy.int8 == "triton" and (failure := self_test.products_failure(policy)):
        reason = f"Triton products failed their self-test ({failure}), dequantise instead"
        policy = dataclasses.replace(policy, int8="dequantise", reasons=(*policy.reasons, reason))
    return policy


def _choose_device(asked: str) -> tuple[str, str]:
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if asked == "auto":
        if has_cuda:
            return "cuda", "auto: CUDA is there"
        if has_mps:
            return "mps", "auto: Metal is there"
        return "cpu", "auto: no CUDA, no Metal"
    if asked == "cuda" and not has_cuda:
        raise UsageError(
            "--device cuda: this PyTorch sees no CUDA device; install a CUDA build and driver, "
            "or use --device cpu"
        )
    if asked == "mps" and not has_mps:
        raise UsageError(
            "--device mps: this PyTorch sees no Metal device (Apple silicon and macOS 14 or newer "
            "are needed); use --device cpu"
        )
    return asked, f"--device {asked}"


def _choose_dtype(kind: str, asked: str) -> tuple[torch.dtype, str]:
    if asked != "auto":
        return _DTYPES[asked], f"--dtype {asked}"
    if kind == "mps":
        return torch.float16, "float16: bfloat16 is emulated on M1 and M2"
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16: supported by this GPU"
        return torch.float16, "float16: this GPU has no bfloat16"
    if multiplies_bfloat16():
        return torch.bfloat16, "bfloat16: this CPU multiplies it in hardware"
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.float32, f"float32: no bfloat16 products on this CPU ({capability})"


def _choose_attention(kind: str) -> tuple[AttentionBackend, str]:
    if kind == "mps":
        return "plain", "plain attention: Metal's fused kernels have been silently wrong"
    return "sdpa", "PyTorch's fused attention"


def _choose_network(dtype: torch.dtype) -> tuple[Network, str]:
    """On CUDA."""
    if dtype == torch.float32:
        return "torch", "PyTorch's operators: our kernels are for half precision"
    if importlib.util.find_spec("triton") is None:
        return "torch", "PyTorch's operators: triton is not installed"
    return "triton", "own kernels in Triton, flash attention for long prompts"


def _choose_int8(kind: str, network: Network) -> tuple[Int8Backend, str]:
    if kind == "cpu":
        return "cpu", "int8: packed operator for few rows, sliced dequantisation for many"
    if kind == "mps":
        return "int8pack", "int8: PyTorch's Metal kernel"
    if network == "triton":
        return "triton", "packed weights: own products in Triton"
    return "dequantise", "int8: sliced dequantisation on CUDA"


def _attention_agrees(policy: DevicePolicy, backend: AttentionBackend) -> bool:
    """Prefill of 45 tokens and one decode step, 4 query heads on 2 key/value heads.

    An operator that raises (no kernel for this device or dtype) does not agree either.
    """
    try:
        return _attention_is_close(policy, backend)
    except RuntimeError:  # NotImplementedError is one, too
        return False


def _attention_is_close(policy: DevicePolicy, backend: AttentionBackend) -> bool:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 45, 64, generator=generator)
    for num_queries in (45, 1):
        queries = torch.randn(4, num_queries, 64, generator=generator)
        expected = attend(queries, keys, values, backend="plain")
        inputs = (part.to(policy.device, policy.dtype) for part in (queries, keys, values))
        actual = attend(*inputs, backend=backend)
        if not _is_close(actual, expected, policy.dtype):
            return False
    return True


def _int8_agrees(policy: DevicePolicy) -> bool:
    if policy.int8 is None:
        return True
    try:
        if policy.int8 == "bitsandbytes":
            return multiplies_rightly(policy.packing or Packing(), policy.device, policy.dtype)
        return _int8_is_close(policy, MATMULS[policy.int8])
    except RuntimeError:
        return False


def _int8_is_close(policy: DevicePolicy, matmul: Int8Matmul) -> bool:
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantise_rows(torch.randn(96, 128, generator=generator), policy.scale_dtype)
    for num_rows in (1, 33):
        x = torch.randn(num_rows, 128, generator=generator)
        expected = matmul_dequantise(x, codes, scales)
        actual = matmul(
            x.to(policy.device, policy.dtype), codes.to(policy.device), scales.to(policy.device)
        )
        if not _is_close(actual, expected, policy.scale_dtype):
            return False
    return True


def _kernels_agree(kernels: Kernels) -> bool:
    """A product of 1 and of 33 rows in each form of packing, and their rows bit-equal."""
    from chatserve.models.kernel_matrix import KernelMatrix, Team

    generator = torch.Generator().manual_seed(0)
    team = Team(kernels, 1)
    for packing in (Packing(), FINE, FOUR_BITS):
        matrix = KernelMatrix(kernels, team, 96, 128, packing)
        matrix.load_rows(0, torch.randn(96, 128, generator=generator))
        weight = torch.stack([matrix.row(index) for index in range(96)])
        x = torch.randn(33, 128, generator=generator)
        actual, expected = matrix.multiply(x), x @ weight.T
        # activations have 8 bits, too: a two-hundredth of the largest, here and there
        if not (actual - expected).abs().max() <= 0.02 * expected.abs().max():
            return False
        if not torch.equal(matrix.multiply(x[:1]), actual[:1]):
            return False
    return True


def _is_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within eight units of the dtype's rounding, relative to the largest value; NaN never is."""
    error = (actual.float().cpu() - expected).abs().max()
    return bool(error <= 8 * torch.finfo(dtype).eps * expected.abs().max())
