"""llama.cpp: llama-bench and llama-batched-bench in-process, llama-server over HTTP.

Both benches start anew for every figure and warm up by themselves. LLAMA_CPP_BIN names their
folder; see benchmarks/peers.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.peer import NotMeasured, Peer
from benchmarks.peers.server import ServerPeer
from benchmarks.run_model import RunModel
from benchmarks.tasks import Figures, Task

DEFAULT_FORMS = ("q8_0", "bf16")
SLOTS = 16
_THREADS = str(os.cpu_count() or 1)


def peers(mode: str, model: RunModel, forms: Sequence[str], folder: Path) -> list[Peer]:
    """One peer per GGUF form that lies beside the model."""
    there = [form for form in forms if model.gguf(form).exists()]
    if mode == "http":
        return [LlamaServer(model, form, folder) for form in there]
    return [LlamaBench(model, form, folder) for form in there]


class LlamaBench:
    """One process per figure."""

    mode = "in-process"

    def __init__(self, model: RunModel, form: str, folder: Path) -> None:
        self.name = f"llama.cpp {form}"
        self._path = str(model.gguf(form))
        self._folder = folder
        self._peak_bytes = 0

    def measure(self, task: Task, round_: int) -> Figures | None:
        if task.what == "memory":
            return {"peak_rss_bytes": self._peak_bytes}
        if task.what == "prefill":
            (line,) = self._bench("-p", str(task.prompt), "-n", "0")
            return {
                "tokens_per_s": line["avg_ts"],
                "first_token_ms": line["avg_ns"] / 1e6,
            }
        if task.streams == 1:
            (line,) = self._bench("-p", "0", "-n", str(task.tokens), "-d", str(task.prompt))
            return {"tokens_per_s": line["avg_ts"]}
        (line,) = self._batched_bench(task)
        return {"tokens_per_s": line["speed_tg"]}

    def close(self) -> None:
        """Nothing stays running."""

    def _bench(self, *arguments: str) -> list[dict[str, Any]]:
        return self._run("llama-bench", *arguments, "-r", "1", "-o", "jsonl")

    def _batched_bench(self, task: Task) -> list[dict[str, Any]]:
        context = task.streams * (task.prompt + task.tokens)
        return self._run(
            "llama-batched-bench", "-c", str(context), "-npp", str(task.prompt),
            "-ntg", str(task.tokens), "-npl", str(task.streams), "--output-format", "jsonl",
        )  # fmt: skip

    def _run(self, program: str, *arguments: str) -> list[dict[str, Any]]:
        command = [str(self._folder / program), "-m", self._path, "-t", _THREADS, *arguments]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=output, stderr=errors)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self._peak_bytes = max(self._peak_bytes, 1024 * usage.ru_maxrss)
            if process.returncode:
                said = " / ".join(_lines(errors)[-3:])
                raise NotMeasured(f"{program} ended with {process.returncode}: {said}")
            return [json.loads(line) for line in _lines(output) if line.startswith("{")]


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").splitlines()


class LlamaServer(ServerPeer):
    """llama-server with as many slots as there may be streams."""

    def __init__(self, model: RunModel, form: str, folder: Path) -> None:
        super().__init__(f"llama.cpp {form}", model.vocab_size)
        self._path = str(model.gguf(form))
        self._folder = folder

    def commands(self, port: int) -> Sequence[Sequence[str]]:
        return [
            [
                str(self._folder / "llama-server"), "-m", self._path, "-t", _THREADS,
                "-np", str(SLOTS), "-c", str(SLOTS * 1024), "--host", "127.0.0.1",
                "--port", str(port), "--no-webui",
            ]
        ]  # fmt: skip

    def is_ready(self) -> bool:
        return self.get("/health")[0] == 200

    def body(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        return {**super().body(prompt, tokens), "ignore_eos": True}
