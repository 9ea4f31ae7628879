"""The rig's processes, started and ended: a controller or `serve`, workers, proxies before them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil

from tests.faults.proxy import FaultProxy
from tests.faults.window import FOLDER, View, look, look_until
from tests.faults.worker import FRONTS

ROOT = Path(__file__).parents[2]
START_S = 60.0
MODEL = "scripted"


class Process:
    """One process of ours with a window, its output in files."""

    def __init__(self, name: str, command: list[str], folder: Path, **environment: str) -> None:
        self.folder = folder
        self._out = folder / f"{name}.{time.monotonic_ns()}.out"
        self._err = self._out.with_suffix(".err")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATSERVE_")}
        variables = {
            "CHATSERVE_HOME": str(folder / "home"), "CHATSERVE_CONTROL_TOKEN": "control",
            FOLDER: str(folder), **environment,
        }  # fmt: skip
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, env={**clean, **variables},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def log(self) -> str:
        return self._err.read_text("utf-8", "replace")

    def wait_for_port(self) -> int:
        """The port in the line that says it is ready."""
        deadline = time.monotonic() + START_S
        while not (line := self._out.read_text("utf-8")).endswith("\n"):
            assert self.popen.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)
        return int(line.split()[1].removesuffix("/v1").rpartition(":")[2])

    def look(self) -> View:
        return look(self.folder, self.pid)

    def children(self) -> list[int]:
        """The workers of `serve`."""
        return [child.pid for child in psutil.Process(self.pid).children()]

    def end(self) -> None:
        """At once; the workers of `serve` end with it."""
        self.popen.kill()
        self.popen.wait()


class House:
    """A controller in front of workers that a test adds; all of it ends with the house."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        self.folder = folder
        self.controller: Process
        self.port = 0
        self._stack = stack

    def start_controller(self, *flags: str, **environment: str) -> Process:
        self.controller = self.start(
            "tests.faults.controller", "--port=0", *flags, **environment
        )  # fmt: skip
        self.port = self.controller.wait_for_port()
        return self.controller

    def serve(self, *flags: str, **environment: str) -> Process:
        """`chatserve serve scripted`, once its worker is ready."""
        self.controller = self.start(
            "tests.faults.serve", "--port=0", *flags, MODEL, **environment
        )  # fmt: skip
        self.port = self.controller.wait_for_port()
        return self.controller

    def start_worker(self, *flags: str, **environment: str) -> Process:
        """One that registers, beside those that `serve` keeps."""
        url = f"--controller=http://127.0.0.1:{self.port}"
        return self.start("tests.faults.worker", url, *flags, MODEL, **environment)

    def wait_for_workers(self, number: int) -> None:
        """So many would get a request."""
        look_until(
            self.folder, self.controller.pid, lambda view: view.num_workers >= number,
            f"{number} workers are not ready", START_S,
        )  # fmt: skip

    def start(self, module: str, *flags: str, **environment: str) -> Process:
        name = module.rpartition(".")[2]
        process = Process(name, [module, *flags], self.folder, **environment)
        self._stack.callback(process.end)
        return process


@contextlib.contextmanager
def house(folder: Path) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        yield House(stack, folder)


class Fronts:
    """A proxy before every worker that is started with `environment`, from its start on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.AsyncExitStack()
        self.proxies: list[FaultProxy] = []
        self.environment = {FRONTS: str(folder)}

    async def serve(self) -> None:
        """Until cancelled."""
        async with self._stack:
            while True:
                for wanted in self._folder.glob("*.wanted"):
                    wanted.unlink()
                    await self._front(int(wanted.stem))
                await asyncio.sleep(0.01)

    async def _front(self, port: int) -> None:
        proxy = await self._stack.enter_async_context(FaultProxy(port))
        self.proxies.append(proxy)
        answer = self._folder / f"{port}.front"
        answer.with_suffix(".new").write_text(str(proxy.port), "ascii")
        answer.with_suffix(".new").rename(answer)


@contextlib.asynccontextmanager
async def fronts(folder: Path) -> AsyncIterator[Fronts]:
    standing = Fronts(folder)
    serving = asyncio.create_task(standing.serve())
    try:
        yield standing
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
