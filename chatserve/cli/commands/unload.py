"""`chatserve unload NAME`: let a running server give the memory of a model back."""

from __future__ import annotations

from chatserve import config
from chatserve.cli.escapes import one_line
from chatserve.cli.operated_server import OperatorOptions, find_server
from chatserve.flags import CommandParser


def main(argv: list[str]) -> int:
    """Returns when its answers have ended, and its process. Raises `ChatserveError`."""
    parser = CommandParser(
        "chatserve unload",
        "Let a running server finish a model's answers and give its memory back.",
        OperatorOptions,
    )
    parser.add_argument("name", metavar="NAME", help="as `chatserve ps` says it")
    flags = parser.flags(argv)
    name = flags.pop("name")
    server = find_server(config.build(OperatorOptions, flags), name)
    try:
        row = server.unload(name)
        print(one_line(f"{row.get('name')} is {row.get('state')}"))
    finally:
        server.close()
    return 0
