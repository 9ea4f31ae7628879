"""The compiled kernels: found, checked and typed for ctypes. Knows pointers, not tensors.

Every function of `src/interface.h` is declared here and called nowhere else than in
`chatserve.models`. ctypes lets go of the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Sequence
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path

from chatserve import environment
from chatserve.errors import UsageError

VERSION = 11
"""Of `src/interface.h`; a library with another one is not used."""
GROUP = 32
"""Columns that share a scale; every width must be a multiple."""
PANEL_ROWS = 32
"""Output rows that are packed together."""
SPAN_ROWS = 16
"""Output rows that an adapter's ranks change together."""
RANK_UNIT = 4
MAX_RANK = 1 << 12
"""Of one matrix in an adapter, all fused parts together."""
BLOCK_SIZE = 32
"""Tokens of a KV block."""
MAX_THREADS = 64
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
PLAIN, GATE, UP = 0, 1, 2
PARTS = (
    "embed", "quantise", "qkv", "rotate", "attend", "output", "gate_up", "down", "head", "sample",
    "wait",
)  # fmt: skip
"""Parts of a step that `cs_network_set_profile` tells apart, in its order."""

LIBRARY = Path(__file__).parent / "lib" / "libchatserve_kernels.so"


class KernelsUnavailable(Exception):
    """Why the kernels cannot be used; PyTorch's operators do the work instead."""


class Shape(Structure):
    """`cs_shape`: sizes of a network."""

    _fields_ = (
        *((name, c_int32) for name in (
            "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn", "num_layers", "vocab",
            "max_rows", "max_positions",
        )),
        ("eps", c_float),
    )  # fmt: skip


class Layer(Structure):
    """`cs_layer`: addresses of one block's matrices (handles), norms and biases."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "qkv", "output", "gate_up", "down", "attention_norm", "mlp_norm", "qkv_bias",
            "output_bias", "gate_up_bias", "down_bias", "query_norm", "key_norm",
        )),
        ("window", c_int32),
    )  # fmt: skip


class Ends(Structure):
    """`cs_ends`: what stands before and after the blocks."""

    _fields_ = (
        ("head", c_void_p),
        ("embedding", c_void_p),
        ("embedding_dtype", c_int32),
        ("norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class LowRank(Structure):
    """`cs_low_rank`: addresses of what an adapter adds to one matrix."""

    _fields_ = (
        *((name, c_void_p) for name in ("a", "b", "scales", "spans")),
        *((name, c_int32) for name in ("rank", "num_b")),
    )  # fmt: skip


class Step(Structure):
    """`cs_step`: addresses of one step's int32 arrays, and of its float32 logits."""

    _fields_ = (
        *((name, c_int32) for name in ("num_rows", "num_segments", "num_outputs")),
        *((name, c_void_p) for name in (
            "tokens", "positions", "segment_starts", "segment_rows", "block_tables",
            "adapters", "output_rows", "logits",
        )),
        ("logits_stride", c_size_t),
        ("sampler", c_void_p),
        ("samplings", c_void_p),
        ("picked", c_void_p),
    )  # fmt: skip


class Sampling(Structure):
    """`cs_sampling`: how one sequence's next token is picked; addresses of int32 and float32."""

    _fields_ = (
        *((name, c_double) for name in ("temperature", "top_p", "min_p_margin")),
        ("stream", c_uint64),
        ("position", c_int64),
        ("masked_until", c_int64),
        *((name, c_void_p) for name in (
            "seen_ids", "offset_ids", "offsets", "masked_ids", "allowed",
        )),
        *((name, c_int32) for name in (
            "num_seen", "num_offsets", "num_masked", "top_k", "is_greedy",
        )),
        ("repetition_penalty", c_float),
    )  # fmt: skip


_FUNCTIONS = {
    "cs_version": (c_int,),
    "cs_levels": (c_char_p,),
    "cs_team_create": (c_void_p, c_int),
    "cs_team_destroy": (None, c_void_p),
    "cs_matrix_create": (c_void_p, c_char_p, c_int, c_int, c_int, c_int, c_int),
    "cs_matrix_destroy": (None, c_void_p),
    "cs_matrix_bytes": (c_size_t, c_void_p),
    "cs_matrix_load": (c_int, c_void_p, c_void_p, c_int, c_int, c_void_p, c_int, c_int),
    "cs_matrix_row": (c_int, c_void_p, c_int, c_void_p),
    "cs_matrix_multiply": (c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p),
    "cs_network_create": (c_void_p, POINTER(Shape), c_char_p, c_void_p),
    "cs_network_destroy": (None, c_void_p),
    "cs_network_set_layer": (c_int, c_void_p, c_int, POINTER(Layer)),
    "cs_network_set_ends": (c_int, c_void_p, POINTER(Ends)),
    "cs_network_set_threads": (c_int, c_void_p, c_int),
    "cs_network_set_prefetch": (c_int, c_void_p, c_size_t, c_size_t),
    "cs_network_set_profile": (c_int, c_void_p, c_void_p),
    "cs_network_forward": (c_int, c_void_p, c_void_p, POINTER(Step)),
    "cs_adapter_create": (c_void_p, POINTER(Shape), POINTER(LowRank)),
    "cs_adapter_destroy": (None, c_void_p),
    "cs_network_rows": (c_int, c_void_p, c_int, c_void_p),
    "cs_pool_create": (c_void_p, POINTER(Shape), c_int),
    "cs_pool_destroy": (None, c_void_p),
    "cs_pool_bytes": (c_size_t, c_void_p),
    "cs_pool_warm": (c_int, c_void_p, c_int),
    "cs_pool_copy_block": (c_int, c_void_p, c_int, c_int),
    "cs_sampler_create": (c_void_p, c_char_p, c_void_p, c_int, c_void_p, c_int),
    "cs_sampler_destroy": (None, c_void_p),
    "cs_sampler_sample": (
        c_int, c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p, c_int, c_void_p,
    ),
    "cs_sampler_logprobs": (
        c_int, c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int,
        c_int, c_void_p, c_void_p,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kernels:
    """The loaded library and the instruction set level to use."""

    functions: ctypes.CDLL
    level: str

    @property
    def level_name(self) -> bytes:
        return self.level.encode()


def load_kernels() -> Kernels:
    """The kernels for this processor; `CHATSERVE_KERNELS` names another level, or `off`.

    Raises `KernelsUnavailable` with the reason, `UsageError` for a level that is not there.
    """
    wanted = environment.kernels()
    if wanted == "off":
        raise KernelsUnavailable("CHATSERVE_KERNELS=off")
    functions = open_library(LIBRARY)
    return Kernels(functions, choose_level(levels_of(functions), wanted))


@functools.cache
def open_library(path: Path) -> ctypes.CDLL:
    """Load and check a library. Raises `KernelsUnavailable`."""
    if not path.is_file():
        raise KernelsUnavailable(
            "they were not compiled when chatserve was installed; with a C++ compiler on the "
            "path, `python -m chatserve.kernels.build` does it"
        )
    try:
        functions = ctypes.CDLL(str(path))
        functions.cs_version.restype = c_int
        version = functions.cs_version()
    except (OSError, AttributeError) as error:
        raise KernelsUnavailable(f"{path.name} cannot be loaded: {error}") from error
    if version != VERSION:
        raise KernelsUnavailable(
            f"{path.name} has version {version}, this chatserve wants {VERSION}; compile it again "
            "with `python -m chatserve.kernels.build`"
        )
    try:
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise KernelsUnavailable(f"{path.name} is not whole: {error}") from error
    return functions


def levels_of(functions: ctypes.CDLL) -> tuple[str, ...]:
    """Instruction set levels that this processor has, best first."""
    names: bytes = functions.cs_levels()
    return tuple(names.decode().split())


def choose_level(levels: Sequence[str], wanted: str | None) -> str:
    """The level `wanted`, or the best. Raises `KernelsUnavailable` or `UsageError`."""
    if not levels:
        raise KernelsUnavailable("this processor is too old for them (x86: AVX2; ARM: dotprod)")
    if wanted is None:
        return levels[0]
    if wanted not in levels:
        raise UsageError(
            f"CHATSERVE_KERNELS={wanted}: this processor has {', '.join(levels)}; `off` uses "
            "PyTorch's operators"
        )
    return wanted


def destroy_with(owner: object, destroy: Callable[[int], None], handle: int) -> None:
    """Call `destroy` with the handle when `owner` is gone, but not when the interpreter ends.

    A thread may be computing with it then, and the system takes all memory back anyway.
    """
    weakref.finalize(owner, destroy, handle).atexit = False
