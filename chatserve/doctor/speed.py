"""One model, loaded as a worker loads it: bytes of its weights, its speed, and what fell back."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from chatserve.config import WorkerConfig
from chatserve.doctor.bandwidth import Bandwidth
from chatserve.doctor.finding import Finding, refused
from chatserve.doctor.notes import collected
from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.serving import load
from chatserve.errors import StartupError
from chatserve.models.memory import in_gb
from chatserve.models.weight_bytes import WeightBytes, weight_bytes
from chatserve.options import ModelOptions

_CONTEXT = 512  # tokens; enough here, and no model's memory is spent on keys and values
_PROMPT_TOKENS = 16
_MAX_STEPS = 64
_MIN_STEPS = 4
_DECODE_S = 3.0
_LITTLE = 0.3  # share of the bandwidth below which something is in the way


@dataclass(frozen=True)
class Decode:
    """How a loaded model did."""

    weights: WeightBytes
    description: dict[str, Any]
    tokens_per_s: float
    num_steps: int
    load_s: float


def try_model(weights: str, options: ModelOptions) -> tuple[Decode | None, list[Finding]]:
    """Load `weights` and generate some tokens; the findings say what went wrong on the way."""
    chosen = {item.name: getattr(options, item.name) for item in dataclasses.fields(ModelOptions)}
    chosen["context_length"] = min(options.context_length or _CONTEXT, _CONTEXT)
    config = WorkerConfig(weights=weights, max_num_seqs=1, speculation=False, **chosen)
    start = time.perf_counter()
    with collected() as notes:
        try:
            async_engine, served = load(config)
            load_s = time.perf_counter() - start
            tokens_per_s, num_steps = _decode(async_engine.engine, served.vocab_size)
        except (StartupError, OSError) as error:
            return None, [refused("weights", "fail", error)]
    measured = weight_bytes(async_engine.engine.model)
    decode = Decode(measured, dict(served.description), tokens_per_s, num_steps, load_s)
    fallen = [_fallen(note) for note in notes]
    return decode, [check_weights(weights, decode), *fallen]


def _fallen(note: str) -> Finding:
    """A warning of the worker's; that of damaged weights names its own way out."""
    text, _, command = note.rpartition("; look closer: ")
    if text:
        return Finding("reading", "warn", text, command)
    return Finding("fallback", "warn", note, "answers stay right, but may come slower")


def check_weights(weights: str, decode: Decode) -> Finding:
    """Bytes by device, and the form they are computed in."""
    parts = [f"{in_mb(size)} on {device}" for device, size in decode.weights.by_device.items()]
    about = decode.description
    kernels = f" on own CPU kernels ({about['kernels']})" if about["kernels"] else ""
    form = about["packing"] or about["dtype"]
    text = f"{weights}: {', '.join(parts)}, {form}{kernels}, loaded in {decode.load_s:.1f} s"
    facts = {
        "weights": weights, "bytes": dict(decode.weights.by_device),
        "bytes_per_token": decode.weights.read_per_token, "load_s": round(decode.load_s, 2),
        **about,
    }  # fmt: skip
    return Finding("weights", "ok", text, facts=facts)


def check_speed(decode: Decode, bandwidth: Bandwidth | None) -> Finding:
    """Tokens per second against what the memory allows: it has to be read once a token."""
    per_token = decode.weights.read_per_token
    text = f"{decode.tokens_per_s:.1f} tokens/s"
    facts: dict[str, Any] = {
        "tokens_per_s": round(decode.tokens_per_s, 2), "steps": decode.num_steps
    }  # fmt: skip
    if bandwidth is None:
        return Finding("speed", "ok", text, facts=facts)
    ceiling = bandwidth.gb_per_s * 1e9 / per_token
    share = decode.tokens_per_s / ceiling
    facts |= {"ceiling_tokens_per_s": round(ceiling, 2), "share_of_ceiling": round(share, 3)}
    text += (
        f", {share:.0%} of the limit: {in_mb(per_token)} of weights a token at "
        f"{bandwidth.gb_per_s:.1f} GB/s allow {ceiling:.1f}"
    )
    if share > 1:
        text += " (memory was busier when it was measured)"
    if share >= _LITTLE:
        return Finding("speed", "ok", text, facts=facts)
    return Finding("speed", "warn", text, _faster(decode), facts)


def in_mb(num_bytes: int) -> str:
    """Gigabytes where there are some."""
    return in_gb(num_bytes) if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _faster(decode: Decode) -> str:
    if decode.description["device"] == "cpu" and not decode.description["kernels"]:
        return "--load-8bit runs on our own CPU kernels where `kernels` above is ok"
    return "end what else uses the processor or its memory; very small models never come near"


@torch.inference_mode()
def _decode(engine: Engine, vocab_size: int) -> tuple[float, int]:
    """Tokens per second of one sequence by its median step, and the number of steps.

    Raises `ModelLoadError` never: a model that cannot generate has been refused by `load`.
    """
    prompt = [index % vocab_size for index in range(_PROMPT_TOKENS)]
    params = SamplingParams(temperature=0, max_tokens=_MAX_STEPS + 1, ignore_eos=True)
    engine.add("doctor", prompt, params)
    engine.step()
    seconds: list[float] = []
    begin = time.perf_counter()
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= _MIN_STEPS and time.perf_counter() - begin > _DECODE_S:
            engine.abort("doctor")
    return 1 / statistics.median(seconds), len(seconds)
