"""The default model against transformers, loaded from the same GGUF file."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.config import WorkerConfig
from chatserve.engine import serving
from chatserve.engine.engine import Engine
from chatserve.engine.prompt import Message, PromptBuilder
from chatserve.engine.sequence import SamplingParams
from chatserve.models.chat_template import WeightsFacts, choose_template, load_template_sources
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import DevicePolicy, choose_policy
from chatserve.models.fallback import FallbackModel
from chatserve.models.gguf import GGUFFile
from chatserve.models.kernel_matrix import KernelMatrix
from chatserve.models.linear import Int8Linear
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama
from chatserve.models.loader import load_model
from chatserve.models.packing import Packing
from chatserve.models.tokenizer import load_tokenizer
from chatserve.models.weights import file_packing
from tests import networks, tiny
from tests.weights import default_model

pytestmark = pytest.mark.weights

QUESTIONS = (
    "Who are you?",
    "What is the capital of France?",
    "Write a haiku about llamas.",
    "What is 17 + 25?",
    "Explain gravity to a child.",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish.",
    "你好，你是谁？",
    "List three uses of 🧂 salt.",
    "Why is the sky blue? Answer in one sentence.",
)
NUM_TOKENS = 64

FLOAT32 = choose_policy("cpu", "float32")
INT8 = choose_policy("cpu", "float32", load_8bit=True)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    path = default_model()
    with closing(GGUFFile.open(path)) as file:
        metadata = file.metadata
    tokenizer = load_tokenizer(path, metadata)
    sources = load_template_sources(path, metadata)
    choice = choose_template(None, WeightsFacts(path.name), tokenizer, sources)
    builder = PromptBuilder(tokenizer, choice.template, 8192)
    return [builder.chat([Message("user", question)]) for question in QUESTIONS]


def load(policy: DevicePolicy) -> Llama | KernelLlama:
    checkpoint = open_checkpoint(default_model())
    with closing(checkpoint.weights):
        model = load_model(checkpoint, policy)
    assert not isinstance(model, FallbackModel)
    return model


def generate(model: Llama | KernelLlama, prompts: list[list[int]]) -> list[list[int]]:
    """64 greedy tokens of each prompt, all in one batch."""
    tokenizer = load_tokenizer(default_model())
    engine = Engine(model, tokenizer, num_kv_tokens=10_000)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        engine.add(str(index), prompt, params)
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for event in engine.step():
            tokens[int(event.seq_id)] += event.token_ids
    return tokens


def load_judge() -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    path = default_model()
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    ).eval()


@torch.no_grad()
def test_64_greedy_tokens_of_10_prompts_are_those_of_transformers(
    prompts: list[list[int]],
) -> None:
    answers = generate(load(FLOAT32), prompts)
    judge = load_judge()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NUM_TOKENS
        # fed with our tokens, transformers picks each of them too: the texts are identical
        logits = judge(torch.tensor([prompt + answer])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.fixture(scope="module")
def float32_answers(prompts: list[list[int]]) -> list[list[int]]:
    return generate(load(FLOAT32), prompts[:4])


def agreement(
    model: Llama | KernelLlama, prompts: list[list[int]], answers: list[list[int]]
) -> float:
    """Share of the answers' tokens that `model`, fed with them, would have chosen too."""
    matches = total = 0
    for prompt, answer in zip(prompts, answers, strict=False):
        logits = networks.logits(model, prompt + answer)[len(prompt) - 1 : -1]
        matches += sum(a == b for a, b in zip(logits.argmax(-1).tolist(), answer, strict=True))
        total += len(answer)
    return matches / total


@torch.inference_mode()
def test_8_bits_of_pytorch_stay_close_and_take_half(
    prompts: list[list[int]], float32_answers: list[list[int]]
) -> None:
    packed = load(dataclasses.replace(INT8, kernels=None))
    assert isinstance(packed, Llama)
    assert agreement(packed, prompts, float32_answers) > 0.9
    matrices = [packed.head] + [
        matrix
        for block in packed.blocks
        for matrix in (
            block.attention.qkv, block.attention.output, block.mlp.gate_up, block.mlp.down,
        )
    ]  # fmt: skip
    assert all(isinstance(matrix, Int8Linear) for matrix in matrices)
    packed_bytes = sum(m.codes.nbytes + m.scales.nbytes for m in matrices)  # type: ignore[union-attr]
    weights = sum(m.codes.numel() for m in matrices)  # type: ignore[union-attr]
    assert packed_bytes <= 0.53 * 2 * weights
    assert packed.embedding is packed.head


@pytest.mark.skipif(INT8.kernels is None, reason="the kernels were not compiled here")
@pytest.mark.parametrize(
    ("options", "least", "share"),
    [
        ({"load_8bit": True}, 0.9, 0.53),
        ({"load_8bit": True, "quant_group": "32"}, 0.92, 0.55),
        ({"load_4bit": True}, 0.5, 0.35),  # around zero, which these weights are not
    ],
)
def test_kernels_stay_close_and_take_their_share(
    prompts: list[list[int]],
    float32_answers: list[list[int]],
    options: dict[str, Any],
    least: float,
    share: float,
) -> None:
    packed = load(choose_policy("cpu", "float32", **options))
    assert isinstance(packed, KernelLlama)
    assert agreement(packed, prompts, float32_answers) > least
    config = packed.config
    norms = (2 * config.num_layers + 1) * config.hidden_size
    assert packed.num_bytes <= share * 2 * (config.num_parameters - norms)


@pytest.mark.skipif(INT8.kernels is None, reason="the kernels were not compiled here")
@pytest.mark.parametrize(
    ("options", "packing"),
    [
        ({}, "int4/32+min"),
        ({"load_4bit": True}, "int4/32+min"),
        ({"load_8bit": True}, "int8"),
        ({"dtype": "bfloat16"}, None),
    ],
)  # docs/design/013
def test_a_compressed_file_stays_compressed_unless_a_dtype_is_asked_for(
    options: dict[str, Any], packing: str | None
) -> None:
    path = str(default_model())
    _, served = serving.load(WorkerConfig(weights=path, context_length=512, **options))
    assert served.description["packing"] == packing
    assert served.description["weight_bits"] == (int(packing[3]) if packing else None)


def test_a_folder_in_half_precision_stays_so(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, dtype=torch.bfloat16)
    _, served = serving.load(WorkerConfig(weights=str(tmp_path), device="cpu"))
    assert served.description["packing"] is None


@pytest.mark.skipif(INT8.kernels is None, reason="the kernels were not compiled here")
def test_the_files_own_form_holds_its_weights_to_the_bit() -> None:
    """Also the head: the file has Q4_1 in the blocks, and Q8_0 where the kernels have 8 bits."""
    checkpoint = open_checkpoint(default_model())
    with closing(checkpoint.weights):
        packing = file_packing(checkpoint.weights.tensors())
        assert packing == Packing(4, is_grouped=True, has_minima=True)
        network = load_model(checkpoint, dataclasses.replace(INT8, packing=packing))
        for name, place in network.destinations().items():
            if len(place.shape) == 2 and isinstance(place.target, KernelMatrix):
                wanted = checkpoint.weights.read(name, range(0, 8))
                rows = [place.target.row(place.start + index) for index in range(8)]
                assert torch.equal(torch.stack(rows), wanted), name
