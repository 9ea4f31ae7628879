"""What a model will take, and what there is: asked of `chatserve plan`, in a process of its own.

Files are read there, by code that may need PyTorch to look at a GPU: neither has a place in a
controller. Headers only; nothing is fetched.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from chatserve import environment
from chatserve.config import split_adapters
from chatserve.options import ModelOptions

logger = logging.getLogger(__name__)

PLAN_COMMAND = (sys.executable, "-P", "-m", "chatserve", "plan")
TIMEOUT_S = 60.0
# a name that is none, and files that are bad, are told by the worker in its own words
_EXIT_DOES_NOT_FIT = 4


@dataclass(frozen=True)
class Estimate:
    """`num_bytes` of a model, with one sequence at its full length; `free_bytes` where it would
    go."""

    num_bytes: int
    free_bytes: int


Measure = Callable[[str], Awaitable[Estimate | None]]
"""Of WEIGHTS; None where nothing can be said."""


class Planned:
    """Measures with what a worker of these options would do."""

    def __init__(self, options: ModelOptions) -> None:
        self._options = options

    async def __call__(self, weights: str) -> Estimate | None:
        try:
            process = await asyncio.create_subprocess_exec(
                *PLAN_COMMAND, *_flags(self._options), "--json", "--", weights,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
                env=environment.child_environment(
                    CHATSERVE_API_KEYS="", CHATSERVE_CONTROL_TOKEN="",
                ),
            )  # fmt: skip
        except OSError as error:
            logger.warning("nobody knows what %s takes: %s", weights, error)
            return None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                said, _ = await process.communicate()
        except TimeoutError:
            return None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode not in (0, _EXIT_DOES_NOT_FIT):
            return None
        try:
            return estimate_of(orjson.loads(said), self._options)
        except (ValueError, KeyError, TypeError, StopIteration):
            return None


def estimate_of(plan: Mapping[str, Any], options: ModelOptions) -> Estimate | None:
    """Of the form that a worker would take on the place that it would take."""
    place = plan["places"][0]
    forms = {form["form"]: form for form in place["forms"] if "total_bytes" in form}
    if options.load_8bit:
        form = forms.get("8-bit")
    elif options.load_4bit:
        form = forms.get("4-bit")
    else:
        form = forms.get("file") or forms.get("half")
    if form is None:
        return None
    num_bytes = int(form["total_bytes"])
    if options.dtype == "float32" and form["held_as"] != "float32":
        num_bytes += int(form["weights_bytes"])  # twice as wide
    return Estimate(num_bytes, int(place["memory_bytes"]))


def _flags(options: ModelOptions) -> list[str]:
    flags = [f"--device={options.device}", f"--revision={options.revision}"]
    if options.context_length is not None:
        flags.append(f"--context-length={options.context_length}")
    if options.num_gpus is not None:
        flags.append(f"--num-gpus={options.num_gpus}")
    if options.max_gpu_memory is not None:
        flags.append(f"--max-gpu-memory={options.max_gpu_memory}")
    if options.cpu_offloading:
        flags.append("--cpu-offloading")
    _, named = split_adapters(options.adapter)
    return [*flags, *(f"--adapter={name}={path}" for name, path in named.items())]
