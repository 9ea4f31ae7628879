"""A peer that lives in a child process of ours (`benchmarks.agents`) and answers JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import IO, Any

from benchmarks.peers.peer import NotMeasured
from benchmarks.places import ROOT
from benchmarks.processes import memory_bytes, tree
from benchmarks.tasks import Figures, Task, random_prompts


class AgentPeer:
    """Measures in-process; the child stays loaded, and idle, between its turns."""

    mode = "in-process"

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        max_streams: int | None = None,
    ) -> None:
        self.name = name
        self._command = list(command)
        self._environment = {**os.environ, **environment}
        self._max_streams = max_streams
        self._process: subprocess.Popen[str] | None = None
        self._files = ExitStack()
        self._log: IO[bytes] | None = None
        self._vocab_size = 0

    def measure(self, task: Task, round_: int) -> Figures | None:
        if self._max_streams is not None and task.streams > self._max_streams:
            return None
        process = self._started()
        if task.what == "memory":
            return memory_bytes(tree(process.pid))
        prompts = random_prompts(task, self._vocab_size, round_)
        return self.ask(task.what, prompts, task.tokens)

    def ask(self, what: str, prompts: Sequence[Sequence[int]], tokens: int) -> Figures:
        """Decode or prefill with these prompts. Raises `NotMeasured` when the child ends."""
        process = self._started()
        assert process.stdin is not None
        request = {"what": what, "prompts": prompts, "tokens": tokens}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        figures: Figures = self._read()
        return figures

    def close(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process = None
        self._files.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                text=True, env=self._environment, cwd=ROOT,
            )  # fmt: skip
            self._vocab_size = self._read()["vocab_size"]
        return self._process

    def _read(self) -> Any:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        raise NotMeasured(f"{self.name} ended: {' / '.join(lines[-3:])}")
