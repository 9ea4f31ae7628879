"""`python -m tests.judges NAME URL`: let one client judge the server at URL, and no other host.

Whoever looks up or calls another address than loopback ends the judgement.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")
STRANGERS: list[str] = []


def _is_far(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name in LOOPBACK:
        return False
    STRANGERS.append(str(name))
    return True


def guard() -> None:
    """From here on there is only loopback; what asks for more is noted and fails."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and _is_far(arguments[0]):
            raise OSError(f"there is only loopback, not {arguments[0]!r}")
        if event in ("socket.connect", "socket.sendto"):
            sock, address = arguments[0], arguments[1]
            if sock.family in (socket.AF_INET, socket.AF_INET6) and _is_far(address[0]):
                raise OSError(f"there is only loopback, not {address!r}")

    sys.addaudithook(audit)


def main(name: str, url: str) -> None:
    os.environ.update(
        LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_TELEMETRY="False", DO_NOT_TRACK="1",
        LANGSMITH_TRACING="false", LANGCHAIN_TRACING_V2="false",
    )  # fmt: skip
    guard()
    importlib.import_module(f"tests.judges.{name}").judge(url)
    if STRANGERS:
        raise SystemExit(f"{name} wanted to reach {', '.join(sorted(set(STRANGERS)))}")
    print("judged")


if __name__ == "__main__":
    main(*sys.argv[1:])
