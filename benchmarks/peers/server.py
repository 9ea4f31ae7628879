"""A peer that is a server: started as its users start it, measured over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from benchmarks import load
from benchmarks.peers.peer import NotMeasured
from benchmarks.places import ROOT
from benchmarks.processes import cpu_s, memory_bytes, tree
from benchmarks.tasks import Figures, Task, random_prompts

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
IDLE_S = 5.0
FIRST_TOKEN_REPEATS = 5
_POLL_S = 0.01


class ServerPeer(ABC):
    """Starts its processes at the first task, and anew at every `startup`."""

    mode = "http"

    def __init__(self, name: str, vocab_size: int) -> None:
        self.name = name
        self._vocab_size = vocab_size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._files = contextlib.ExitStack()
        self._logs: list[IO[bytes]] = []
        self.port = 0

    @abstractmethod
    def commands(self, port: int) -> Iterable[Sequence[str]]:
        """The processes to start, in order; the one that clients talk to listens on `port`."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether a request would be answered now."""

    def environment(self) -> Mapping[str, str]:
        return {}

    def body(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """A greedy completion that does not stop early, as far as the server can promise it."""
        return {
            "model": "benchmark", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip

    def roles(self) -> dict[str, tuple[int, bool]]:
        """CPU that is counted per token: role -> (process, only its main thread)."""
        return {}

    def measure(self, task: Task, round_: int) -> Figures | None:
        try:
            return self._measure(task, round_)
        except (load.RequestFailed, OSError, TimeoutError) as error:
            raise NotMeasured(f"{self.name}: {error}") from error

    def _measure(self, task: Task, round_: int) -> Figures | None:
        if task.what == "startup":
            self.close()
            return {"ready_s": self.start()}
        if not self._processes:
            self.start()
        if task.what == "memory":
            return memory_bytes(self.pids())
        if task.what == "idle":
            return self._idle()
        if task.what == "first-token":
            return self._first_token(task, round_)
        prompts = random_prompts(task, self._vocab_size, round_)
        if task.what == "cpu":
            return self._cpu(prompts, task.tokens)
        return load.streams_figures(self._send(prompts, task.tokens))

    def start(self) -> float:
        """Seconds until requests are answered."""
        self.port = free_port()
        start = time.perf_counter()
        environment = {**os.environ, **self.environment()}
        for command in self.commands(self.port):
            log = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            self._logs.append(log)
            self._processes.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
            )
        while not self.is_ready():
            if time.perf_counter() - start > READY_TIMEOUT_S or any(
                process.poll() is not None for process in self._processes
            ):
                said = self._said()
                self.close()
                raise NotMeasured(f"{self.name} did not get ready: {said}")
            time.sleep(_POLL_S)
        elapsed = time.perf_counter() - start
        # the first request warms what is lazy
        self._send([[self._vocab_size // 4] * 8], 2)
        return elapsed

    def close(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._files.close()
        self._processes, self._logs = [], []

    def pids(self) -> list[int]:
        return [pid for process in self._processes for pid in tree(process.pid)]

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; status 0 while nobody listens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                return response.status, response.read()
            except OSError:
                return 0, b""

    def _idle(self) -> Figures:
        pids = self.pids()
        before = [cpu_s(pid) for pid in pids]
        time.sleep(IDLE_S)
        spent = {
            pid: 100 * (cpu_s(pid) - start) / IDLE_S
            for pid, start in zip(pids, before, strict=True)
        }
        figures = {f"{role}_idle_percent": spent[pid] for role, (pid, _) in self.roles().items()}
        return {"idle_percent": sum(spent.values()), **figures}

    def _first_token(self, task: Task, round_: int) -> Figures:
        """One request after the other, each with a prompt of its own."""
        answers = []
        for repeat in range(FIRST_TOKEN_REPEATS):
            number = round_ * FIRST_TOKEN_REPEATS + repeat
            answers += self._send(random_prompts(task, self._vocab_size, number), 2)
        return {"first_token_ms": statistics.median(load.first_token_ms(answers))}

    def _cpu(self, prompts: Sequence[list[int]], tokens: int) -> Figures | None:
        """CPU per token that is streamed, without what a request costs: a long run minus a short
        one."""
        roles = self.roles()
        if not roles:
            return None
        runs = []
        for count in (tokens // 8, tokens):
            before = self._role_s(roles)
            answers = self._send(prompts, count)
            spent = {role: after - before[role] for role, after in self._role_s(roles).items()}
            runs.append((sum(answer.num_tokens for answer in answers), spent))
        (short, short_spent), (long, long_spent) = runs
        return {
            f"{role}_us_per_token": 1e6 * (long_spent[role] - short_spent[role]) / (long - short)
            for role in roles
        }

    def _role_s(self, roles: Mapping[str, tuple[int, bool]]) -> dict[str, float]:
        return {role: cpu_s(pid, main_thread_only=main) for role, (pid, main) in roles.items()}

    def _send(self, prompts: Sequence[list[int]], tokens: int) -> list[load.Answer]:
        bodies = [self.body(prompt, tokens) for prompt in prompts]
        return load.run(self.port, "/v1/completions", bodies)

    def _said(self) -> str:
        lines = []
        for log in self._logs:
            log.seek(0)
            lines += log.read().decode(errors="replace").splitlines()[-3:]
        return " / ".join(lines)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def wait_for_port(port: int) -> None:
    """Raises `NotMeasured` when nobody listens for long."""
    deadline = time.perf_counter() + READY_TIMEOUT_S
    while not is_listening(port):
        if time.perf_counter() > deadline:
            raise NotMeasured(f"nobody listens on port {port}")
        time.sleep(_POLL_S)
