"""`chatserve ps`: the models of the servers that run here: state, bytes, device, requests."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from chatserve import config
from chatserve.cli.escapes import one_line
from chatserve.cli.model_table import model_table
from chatserve.cli.operated_server import OperatorOptions, find_servers
from chatserve.flags import CommandParser
from chatserve.settings import setting


@dataclass(frozen=True)
class PsConfig(OperatorOptions):
    """Settings of `chatserve ps`."""

    json: bool = setting(
        False,
        "print JSON: of each server its url and its models with name, state, weights, bytes, "
        "loaded_bytes, total_bytes, memory_bytes, device, running, idle_s, keep_alive_left_s, "
        "worker_id, error",
    )


def main(argv: list[str]) -> int:
    """Print the table on stdout. Raises `UsageError` where no server runs."""
    parser = CommandParser(
        "chatserve ps",
        "List the models of running servers: state, what they take, memory that their worker "
        "holds, device, requests running, and when an idle one is unloaded.",
        PsConfig,
    )
    options = config.build(PsConfig, parser.flags(argv))
    servers = find_servers(options)
    try:
        tables = [(server.url, server.models()) for server in servers]
    finally:
        for server in servers:
            server.close()
    if options.json:
        print(json.dumps([{"url": url, "models": rows} for url, rows in tables], indent=1))
        return 0
    for url, rows in tables:
        if len(tables) > 1:
            print(one_line(url))
        print("\n".join(model_table(rows)))
        for row in rows:
            if error := row.get("error"):
                print(one_line(f"{row.get('name')}: {error.get('message')}"), file=sys.stderr)
    return 0
