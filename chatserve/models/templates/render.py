"""The process that renders a model's own template: `python -m chatserve.models.templates.render`.

It compiles one template and renders one chat after the other. The bounds of `jinja_sandbox.py` say
what is wrong with a template; where they miss something, the kernel ends this process, native code
included. Imports jinja2 and next to nothing else. Ends with its parent.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatserve import frames
from chatserve.models.templates.jinja_sandbox import BadTemplate, CannotRender, Sandbox

NO_MEMORY = 4
"""The exit code of a process that has got no more."""


def main() -> int:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    try:
        with contextlib.suppress(ConnectionError):  # the parent has gone
            _serve(connection)
    except MemoryError:
        # without it there is no cleaning up, either
        os._exit(NO_MEMORY)
    return 0


def _serve(connection: socket.socket) -> None:
    sandbox = Sandbox()
    while (request := frames.receive(connection)) is not None:
        with _processor_time(request["seconds"]):
            answer = _answer(sandbox, request)
        frames.send(connection, answer)


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """The kernel ends this process after so much of it; what others take does not count."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(sandbox: Sandbox, request: dict[str, Any]) -> dict[str, Any]:
    try:
        if "source" in request:
            _limit_memory(request["compile_bytes"])
            sandbox.compile(request["source"])
            _limit_memory(request["render_bytes"])
            return {}
        return {"text": sandbox.render(request["max_chars"], request["variables"])}
    except (BadTemplate, CannotRender) as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        return {"failure": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # whatever it is, the template's code has raised it
        return {"failure": type(error).__name__}


def _limit_memory(num_bytes: int) -> None:
    """Refuse more than what is there by now and `num_bytes`, where the system can: macOS cannot."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + num_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        # some containers allow none to be set
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))


if __name__ == "__main__":
    raise SystemExit(main())
