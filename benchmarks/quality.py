"""How far each compressed form strays from float32: mean KL divergence and agreement of the top id.

    python -m benchmarks.quality [MODEL] [--forms fp32,bf16,int8,group32,int4] [--step 512]

The reference is transformers in float32 on the CPU, on the same weights. Five kinds of text
(`chatserve/quality/texts`) are read teacher-forced: every position sees the true tokens before it.
One JSON line per form. `--step 1` takes the path of decode, larger steps that of prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.models.sources import default_model_path
from chatserve.models.batch import Batch, Segment
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.special_tokens import Special
from chatserve.models.tokenizer import load_tokenizer
from chatserve.quality.texts import SHIPPED

BLOCK_SIZE = 32
# form -> arguments of choose_policy
FORMS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"load_8bit": True},
    "group32": {"load_8bit": True, "quant_group": "32"},
    "int4": {"load_4bit": True},
}


@dataclass
class Score:
    """Sums over positions. `nll` is of the text's own next tokens."""

    divergences: list[torch.Tensor] = field(default_factory=list)
    agreements: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)

    def add(self, logits: torch.Tensor, reference: torch.Tensor, ids: list[int]) -> None:
        """logits, reference: (T, V) of one text with T token `ids`."""
        ours, theirs = logits.float().log_softmax(-1), reference.log_softmax(-1)
        self.divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
        self.agreements.append(ours.argmax(-1) == theirs.argmax(-1))
        following = torch.tensor(ids[1:])[:, None]
        self.nll.append(-ours[:-1].gather(1, following)[:, 0])

    def figures(self) -> dict[str, float]:
        """Means over all positions, and the standard error of the agreement."""
        divergence, agreement = torch.cat(self.divergences), torch.cat(self.agreements).float()
        return {
            "positions": divergence.numel(),
            "mean_kl": round(float(divergence.mean()), 5),
            "p99_kl": round(float(divergence.quantile(0.99)), 4),
            "top1_percent": round(100 * float(agreement.mean()), 2),
            "top1_error_percent": round(100 * float(agreement.std()) / len(agreement) ** 0.5, 2),
            "nll": round(float(torch.cat(self.nll).mean()), 4),
        }


def reference_logits(checkpoint: Checkpoint, texts: Mapping[str, list[int]]) -> list[torch.Tensor]:
    """transformers' Llama in float32, one text at a time: (T, V) each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {name: value for name, value in checkpoint.config.items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    state = model.state_dict()
    with torch.inference_mode():
        for name in checkpoint.weights.tensors():
            state[name].copy_(checkpoint.weights.read(name))
        return [model(torch.tensor([ids])).logits[0].float() for ids in texts.values()]


def form_logits(model: Any, ids: list[int], step: int) -> torch.Tensor:
    """(T, V) from the engine's own interface, `step` tokens a batch."""
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    pool = model.build_kv_pool(num_blocks, BLOCK_SIZE)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(ids), step):
            rows = range(start, min(start + step, len(ids)))
            segment = Segment(0, len(rows), start, range(num_blocks))
            batch = Batch(ids[rows.start : rows.stop], rows, [segment], range(len(rows)))
            parts.append(model.forward(batch, pool).float().clone())
    return torch.cat(parts)


def read_texts(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and token ids of each text; the chat's markers become special tokens."""
    tokenizer = load_tokenizer(path)
    markers = re.compile("|".join(map(re.escape, tokenizer.special_ids)) or "(?!)")
    for file in sorted(SHIPPED.glob("*.txt")):
        text, parts, end = file.read_text("utf-8").strip(), [], 0
        for marker in markers.finditer(text):
            parts += [text[end : marker.start()], Special(marker.group())]
            end = marker.end()
        yield file.stem, tokenizer.encode([*parts, text[end:]], add_bos=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", type=Path, help="folder or .gguf; default: smollm2-135m"
    )
    parser.add_argument("--forms", default="bf16,int8,group32,int4", help=", ".join(FORMS))
    parser.add_argument("--step", type=int, default=512, help="tokens of one batch")
    arguments = parser.parse_args()
    path: Path = arguments.model or default_model_path()
    name = path.parent.name if path.name == "hf" else path.name
    texts = dict(read_texts(path))
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights):
        references = reference_logits(checkpoint, texts)
        for form in arguments.forms.split(","):
            policy = choose_policy("cpu", **FORMS[form])
            model = load_model(checkpoint, policy)
            score = Score()
            for ids, reference in zip(texts.values(), references, strict=True):
                score.add(form_logits(model, ids, arguments.step), reference, ids)
            line = {
                "benchmark": "quality", **describe(), "model": name, "form": form,
                "policy": policy.describe(), "kernels": os.environ.get("CHATSERVE_KERNELS"),
                "step": arguments.step, "texts": list(texts), **score.figures(),
            }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
