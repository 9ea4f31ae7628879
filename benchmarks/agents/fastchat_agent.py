"""Measures FastChat's `generate_stream`, one stream, under the Python that has FastChat.

    FASTCHAT_PYTHON -m benchmarks.agents.fastchat_agent FOLDER fp32|8bit

FastChat takes text: prompts are decoded first, so their length may differ by some tokens.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from fastchat.model.model_adapter import load_model
from fastchat.serve.inference import generate_stream

from benchmarks.agents.loop import serve

CONTEXT_LENGTH = 2048


class GenerateStream:
    """One model on the CPU, greedy."""

    def __init__(self, folder: str, form: str) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        # with any other num_gpus FastChat skips 8 bits on a CPU without a word
        self._model, self._tokenizer = load_model(
            folder, device="cpu", num_gpus=1, load_8bit=form == "8bit"
        )
        self._tokenizer.eos_token = None  # never stop early
        self.vocab_size = int(self._model.config.vocab_size)
        self._times([self.vocab_size // 4] * 8, 4)

    def decode(self, prompts: Sequence[list[int]], tokens: int) -> float:
        (prompt,) = prompts
        times = self._times(prompt, tokens + 1)
        return (len(times) - 2) / (times[-1] - times[1])

    def prefill(self, prompt: list[int]) -> float:
        times = self._times(prompt, 2)
        return times[1] - times[0]

    def _times(self, prompt: list[int], tokens: int) -> list[float]:
        """When it started and when each token came."""
        params: dict[str, Any] = {
            "prompt": self._tokenizer.decode(prompt),
            "temperature": 0.0,
            "max_new_tokens": tokens,
            "echo": False,
        }
        times = [time.perf_counter()]
        with torch.inference_mode():
            for reply in generate_stream(
                self._model, self._tokenizer, params, "cpu", CONTEXT_LENGTH, stream_interval=1
            ):
                if reply["finish_reason"] is None:  # the last reply brings no token
                    times.append(time.perf_counter())
        return times


if __name__ == "__main__":
    serve(lambda: GenerateStream(sys.argv[1], sys.argv[2]))
