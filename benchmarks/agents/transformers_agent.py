"""Measures transformers' `generate` (static batches) on a Hugging Face folder.

    python -m benchmarks.agents.transformers_agent FOLDER DTYPE

Decode speed is the difference of a long and a short run: `generate` does not say when the first
token came.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from benchmarks.agents.loop import serve


class Generate:
    """One model, greedy, never stopping early."""

    def __init__(self, folder: str, dtype: str) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model.eval()
        self.vocab_size = int(self._model.config.vocab_size)
        self._seconds([[self.vocab_size // 4] * 8], 4)

    def decode(self, prompts: Sequence[list[int]], tokens: int) -> float:
        elapsed = self._seconds(prompts, tokens + 1) - self._seconds(prompts, 1)
        return len(prompts) * tokens / elapsed

    def prefill(self, prompt: list[int]) -> float:
        return self._seconds([prompt], 1)

    def _seconds(self, prompts: Sequence[list[int]], tokens: int) -> float:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(lambda: Generate(*sys.argv[1:3]))
