"""`chatserve load WEIGHTS|NAME`: let a running server load a model."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve import config, hub
from chatserve.byte_bar import ByteBar
from chatserve.cli.escapes import one_line
from chatserve.cli.model_table import memory_text
from chatserve.cli.operated_server import OperatedServer, OperatorOptions, find_server
from chatserve.errors import ChatserveError, StartupError
from chatserve.flags import CommandParser
from chatserve.settings import setting

POLL_S = 0.3


@dataclass(frozen=True)
class LoadConfig(OperatorOptions):
    """Settings of `chatserve load`."""

    name: str | None = setting(None, "its name in the API; default: as the folder or file")


def main(argv: list[str]) -> int:
    """Returns when the model is ready. Raises what its worker ended with."""
    parser = CommandParser(
        "chatserve load",
        "Let a running server load a model that it was started with, or other weights.",
        LoadConfig,
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="its name there, a path, alias or id")
    flags = parser.flags(argv)
    weights = flags.pop("weights")
    options = config.build(LoadConfig, flags)
    server = find_server(options, weights)
    try:
        row = _load(server, _fields(server, weights, options.name))
        print(one_line(f"{row.get('name')} is {row.get('state')} ({memory_text(row)})"))
    finally:
        server.close()
    return 0


def _fields(server: OperatedServer, weights: str, name: str | None) -> dict[str, Any]:
    named = {"name": name} if name else {}
    if name is None and any(row.get("name") == weights for row in server.models()):
        return {"model": weights}
    if server.is_here and hub.is_path(weights):
        hub.check_path(weights)
        weights = str(Path(weights).expanduser().absolute())
    return {"weights": weights, **named}


def _load(server: OperatedServer, fields: dict[str, Any]) -> dict[str, Any]:
    """Ask for it, and show how far it is meanwhile."""
    asking = OperatedServer(server.client.again(), is_here=server.is_here)
    rows: list[dict[str, Any]] = []
    errors: list[ChatserveError] = []
    has_ended = threading.Event()

    def ask() -> None:
        try:
            rows.append(asking.load(fields))
        except ChatserveError as error:
            errors.append(error)
        finally:
            has_ended.set()

    thread = threading.Thread(target=ask, name="load", daemon=True)
    thread.start()
    try:
        with ByteBar(one_line(str(fields.get("model") or fields["weights"])), sys.stderr) as bar:
            while not has_ended.wait(POLL_S):
                for row in server.models():
                    is_it = row.get("name") == fields.get("model") or (
                        row.get("weights") == fields.get("weights", "")
                    )
                    if is_it and row.get("state") == "loading" and row.get("total_bytes"):
                        bar(int(row["loaded_bytes"]), int(row["total_bytes"]))
            if errors:
                raise errors[0]
    except ChatserveError as error:
        raise _as_its_worker(server, error) from error
    finally:
        if not has_ended.is_set():
            asking.client.abort()
        thread.join()
        asking.close()
    return rows[0]


def _as_its_worker(server: OperatedServer, error: ChatserveError) -> ChatserveError:
    """The same words, with the exit code that the worker ended with."""
    kinds = {kind.exit_code: kind for kind in StartupError.__subclasses__() if kind.exit_code > 1}
    try:
        failures = [row["error"] for row in server.models() if row.get("error")]
    except ChatserveError:
        failures = []
    for failure in failures:
        if failure.get("message") == error.message:
            return kinds.get(failure.get("exit_code"), StartupError)(error.message)
    return error
