"""Networks with random weights on the GPU, chatserve's and transformers', and how fast they go."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from chatserve.engine.engine import Engine
from chatserve.engine.sequence import SamplingParams
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.llama import Llama
from chatserve.models.loader import build_network

SHORT, LONG = 2, 66  # new tokens; the difference of two runs is decode alone


@dataclass(frozen=True)
class Shape:
    """A network's sizes, and how long the prompts are that it is measured with."""

    name: str
    config: dict[str, Any]
    prompt_len: int = 32
    prefill_lens: tuple[int, ...] = (512, 2048)


def llama_config(
    hidden: int, intermediate: int, layers: int, heads: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip


SEVEN_B = Shape("7B shape", llama_config(4096, 11008, 32, 32, 32000))
TINY = Shape("tiny", llama_config(64, 96, 2, 4, 320), prompt_len=4, prefill_lens=(40,))


class NoTokenizer:
    """Text does not matter here."""

    eos_ids: frozenset[int] = frozenset()
    forbidden_ids: frozenset[int] = frozenset()
    strips_leading_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return b"x"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(shape: Shape, policy: DevicePolicy) -> Llama:
    """A network with random weights, filled tensor by tensor on the device."""
    network = build_network(ModelConfig.from_hf(shape.config), policy)
    assert isinstance(network, Llama)
    with torch.inference_mode():
        for place in network.destinations().values():
            rows = torch.randn(place.shape, device=policy.device, dtype=policy.dtype) * 0.02
            place.target.load_rows(place.start, rows)
    return network


def weight_bytes_per_step(shape: Shape, network: Llama) -> int:
    """Bytes of weights that one decode step reads: all but the embedding's untouched rows."""
    config = network.config
    embedding = config.vocab_size * config.hidden_size
    count = config.num_parameters - (0 if config.is_tied else embedding)
    bits = 8 * network.policy.dtype.itemsize
    if network.policy.packing is not None:
        return int(count * network.policy.packing.bytes_per_weight)
    return count * bits // 8


class Decoder:
    """One engine over a network; graphs are captured once, by the first run of each size."""

    def __init__(self, shape: Shape, network: Llama, *, max_streams: int) -> None:
        self._shape, self._device = shape, network.device
        room = shape.prompt_len + LONG + 32
        self._engine = Engine(
            network, NoTokenizer(),
            num_kv_tokens=max(room * max_streams, 2 * max(shape.prefill_lens) + 64),
            max_num_seqs=max_streams, max_num_batched_tokens=2048,
        )  # fmt: skip
        self._num_runs = 0

    def seconds(self, streams: int, count: int, prompt_len: int) -> float:
        """To answer `streams` prompts, none of them cached, with `count` tokens each."""
        self._num_runs += 1
        params = SamplingParams(temperature=0, max_tokens=count)
        for index in range(streams):
            salt = 64 * self._num_runs + index
            prompt = [(7 * at + salt) % 300 for at in range(prompt_len)]
            self._engine.add(f"{self._num_runs}-{index}", prompt, params, salt=b"%d" % salt)
        synchronise(self._device)
        start = time.perf_counter()
        while self._engine.has_work:
            self._engine.step()
        synchronise(self._device)
        return time.perf_counter() - start

    def decode_tokens_per_s(self, streams: int) -> float:
        length = self._shape.prompt_len
        self.seconds(streams, 4, length)
        elapsed = self.seconds(streams, LONG, length) - self.seconds(streams, SHORT, length)
        return streams * (LONG - SHORT) / elapsed

    def prefill_tokens_per_s(self, prompt_len: int) -> float:
        self.seconds(1, 1, prompt_len)
        return prompt_len / self.seconds(1, 1, prompt_len)


def transformers_runner(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> Callable[[int], float]:
    """Seconds for `generate` of so many tokens by transformers, one stream, greedy."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    content = {key: value for key, value in shape.config.items() if key != "model_type"}
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**content), dtype=dtype).eval()
        ids = torch.arange(3, 3 + shape.prompt_len)[None]
        mask = torch.ones_like(ids)

    def run(count: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=count,
                max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        synchronise(device)
        return time.perf_counter() - start

    return run


def without_triton(policy: DevicePolicy) -> DevicePolicy:
    """The same choices on PyTorch's operators."""
    int8 = "dequantise" if policy.int8 == "triton" else policy.int8
    return dataclasses.replace(policy, network="torch", int8=int8)
