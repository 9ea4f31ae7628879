"""Answers to learn from, by the serving engine: batched, with its KV cache, the adapter on.

Two forms, told apart because they share different things with the trainer's network:

- `shared`: the engine's network *is* the trainer's. Its fused matrices hold the only copy of the
  base, in the trainer's dtype and on its device; the parameters of transformers' modules become
  rows of them. Nothing is held twice.
- `int8`: the engine has its own copy in 8 bits (on the CPU by the kernels, elsewhere by the
  network of `--load-8bit`), beside the trainer's: one byte a parameter more, and answers are drawn
  from a distribution that is a rounding away from the policy's. How far is measured at each step.

The adapter is run-time LoRA in both, from the trainer's own A and B, anew for each batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import LoadedAdapter, SamplingParams
from chatserve.errors import GenerationFailed, UsageError
from chatserve.models.adapter import Adapter, LoraPair
from chatserve.models.config import ModelConfig, is_native
from chatserve.models.destinations import Destination
from chatserve.models.device import DevicePolicy, choose_policy
from chatserve.models.kernel_limits import misfit
from chatserve.models.linear import Linear, Parameter
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama, thread_counts
from chatserve.models.loader import build_network
from chatserve.train.ppo.policy import ADAPTER

logger = logging.getLogger(__name__)

Form = Literal["shared", "int8"]

_STEP_TOKENS = 512  # of one step of the engine, at most
_BLOCK = 32


@dataclass(frozen=True)
class Request:
    """An answer to draw: to these tokens, at most so many of its own, reproducible by its seed."""

    query_ids: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """An answer. logprobs: of each token, of the distribution that the engine drew it from.
    has_ended: its last token is one that ends answers."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    has_ended: bool


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. The published recipe neither filters nor ends at an end token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    ignores_end: bool = False


class EngineRollout:
    """Draws answers from a causal language model of transformers with an adapter of PEFT."""

    def __init__(
        self,
        network: Any,
        end_ids: Sequence[int],
        form: Form,
        *,
        max_answers: int,
        max_tokens: int,
    ) -> None:
        """`network`: of the Llama family, LoRA's layers inside. `end_ids`: tokens that end an
        answer. `max_answers` of at most `max_tokens` each, questions included, are drawn at once.

        In the form `shared` the network's parameters become views of the engine's.
        Raises `UsageError` where the engine cannot compute this network in that form.
        """
        table = network.config.to_dict()
        if not is_native(table):
            raise UsageError(
                f"answers are drawn by the engine, which knows the Llama family, not "
                f"{table.get('model_type')}; choose another base"
            )
        self.form: Form = form
        self._network = network
        self._config = ModelConfig.from_hf(table)
        weight = network.model.norm.weight
        policy = _policy(weight.device, weight.dtype, form)
        self._model = _build(self._config, policy, form)
        sources = _base_tensors(network)
        if form == "shared":
            _adopt(self._model.destinations(), sources)
        else:
            _fill(self._model.destinations(), sources)
        blocks = max_answers * -(-max_tokens // _BLOCK)
        with torch.inference_mode():
            self._engine = Engine(
                self._model, _Ids(frozenset(end_ids)), num_kv_tokens=blocks * _BLOCK,
                max_num_seqs=max_answers, max_num_batched_tokens=_STEP_TOKENS,
            )  # fmt: skip
        self._num_batches = 0

    def draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Drawn]:
        """An answer to each, in order; with the adapter as it is now.

        Raises `GenerationFailed` where the network computes no numbers.
        """
        self._num_batches += 1
        adapter = self._adapter()
        for index, request in enumerate(requests):
            params = SamplingParams(
                temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
                max_tokens=request.max_tokens, ignore_eos=sampling.ignores_end,
                seed=request.seed, logprobs=0,
            )  # fmt: skip
            self._engine.add(str(index), request.query_ids, params, adapter=adapter)
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        ended = [False] * len(requests)
        while self._engine.has_work:
            for event in self._engine.step():
                if event.error is not None:
                    self._forget(len(requests))
                    raise GenerationFailed(f"no answer could be drawn: {event.error.message}")
                index = int(event.seq_id)
                ids[index] += event.token_ids
                logprobs[index] += (each.logprob for each in event.logprobs)
                ended[index] = event.finish_reason == "stop"
        return [
            Drawn(tuple(each), tuple(theirs), has_ended)
            for each, theirs, has_ended in zip(ids, logprobs, ended, strict=True)
        ]

    def _adapter(self) -> LoadedAdapter:
        """The trainer's adapter as the engine computes it. Its fingerprint is new for each batch:
        keys and values of another batch are another policy's."""
        name = f"batch-{self._num_batches}"
        adapter = Adapter(name, Path(), name, lora_pairs(self._network))
        return LoadedAdapter(name, name, self._model.build_adapter(adapter))

    def _forget(self, count: int) -> None:
        for index in range(count):
            self._engine.abort(str(index))


def lora_pairs(network: Any, adapter: str = ADAPTER) -> Mapping[str, LoraPair]:
    """What PEFT's adapter adds to each matrix of the base, by the base's tensor's name; float32 on
    the CPU."""
    pairs = {}
    for name, module in network.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            a, b = (each[adapter].weight.detach() for each in (module.lora_A, module.lora_B))
            pairs[f"{name}.weight"] = LoraPair(
                a.to("cpu", torch.float32), b.to("cpu", torch.float32),
                float(module.scaling[adapter]),
            )  # fmt: skip
    return pairs


def choose_form(network: Any, asked: str) -> Form:
    """The form that `--rollout` asks for; with `auto` 8 bits on a CPU whose kernels can hold the
    network, and the trainer's own weights elsewhere.

    Raises `UsageError` where the trainer's weights cannot be shared.
    """
    is_packed = _is_packed(network)
    if asked == "shared" and is_packed:
        raise UsageError(
            "--rollout shared: the base is in 8 bits of bitsandbytes, whose form the engine does "
            "not compute with; leave --rollout out, or load the base in half precision"
        )
    if asked == "shared" or asked == "int8":
        return "shared" if asked == "shared" else "int8"
    if is_packed:
        return "int8"
    weight = network.model.norm.weight
    on_kernels = weight.device.type == "cpu" and _kernels_fit(network)
    return "int8" if on_kernels else "shared"


def _kernels_fit(network: Any) -> bool:
    config = ModelConfig.from_hf(network.config.to_dict())
    policy = choose_policy("cpu", "float32", load_8bit=True)
    return policy.kernels is not None and misfit(config) is None


def _is_packed(network: Any) -> bool:
    return hasattr(_base_tensors(network)["model.layers.0.self_attn.q_proj.weight"], "SCB")


def _policy(device: torch.device, dtype: torch.dtype, form: Form) -> DevicePolicy:
    name = str(dtype).removeprefix("torch.")
    return choose_policy(device.type, name, load_8bit=form == "int8")


def _build(config: ModelConfig, policy: DevicePolicy, form: Form) -> Llama | KernelLlama:
    if policy.kernels is not None and policy.packing is not None and misfit(config) is None:
        return KernelLlama(
            config, policy, policy.kernels, policy.packing,
            max_rows=_STEP_TOKENS, thread_counts=thread_counts(),
        )  # fmt: skip
    return build_network(config, policy)


def _base_tensors(network: Any) -> Mapping[str, torch.nn.Parameter]:
    """The base's parameters by their names in a checkpoint, whatever PEFT has put around them."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in network.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


@torch.no_grad()
def _adopt(
    destinations: Mapping[str, Destination], sources: Mapping[str, torch.nn.Parameter]
) -> None:
    """Move the trainer's numbers into the engine's tensors, and let its parameters be rows there.

    One parameter at a time: the trainer's memory of it is given back at once.
    """
    for name, place in destinations.items():
        source = sources[name]
        assert isinstance(place.target, Linear | Parameter)
        rows = place.target.weight[place.start : place.start + place.shape[0]]
        rows.copy_(source)
        source.data = rows


@torch.inference_mode()
def _fill(
    destinations: Mapping[str, Destination], sources: Mapping[str, torch.nn.Parameter]
) -> None:
    """Pack the trainer's numbers into the engine's own form."""
    for name, place in destinations.items():
        place.target.load_rows(place.start, _plain(sources[name]))


def _plain(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The numbers of a parameter; those of LLM.int8 are codes / 127 times their row's maximum."""
    if parameter.dtype != torch.int8:
        return parameter.detach()
    maxima = getattr(parameter, "SCB", None)
    assert isinstance(maxima, torch.Tensor), "bitsandbytes has moved its scales: build it before"
    return parameter.detach().float() * (maxima[:, None] / 127)


class _Ids:
    """A tokenizer for who wants no text: answers are kept as ids."""

    forbidden_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids

    def token_bytes(self, token_id: int) -> bytes:
        return b""
