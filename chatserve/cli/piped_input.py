"""What is piped in, read to its end within a limit, as text.

Knows the standard input; no server, no terminal.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import TextIO

from chatserve.cli.attachments import decoded
from chatserve.errors import UsageError

MAX_BYTES = 16 * 1024 * 1024
HINT_S = 1.0


def read_piped(source: TextIO | None, tell: Callable[[str], None], *, errors: str) -> str:
    """All of `source`; "" where there is none. `tell` hears that it is still waited for.

    `errors`: `replace` puts U+FFFD for what is no UTF-8. Raises `UsageError` for what is too much,
    or no text.
    """
    if source is None:
        return ""
    if not select.select([source], [], [], HINT_S)[0]:
        tell("reading the prompt from standard input; its end is Ctrl-D")
    data = source.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UsageError(
            f"standard input is over {MAX_BYTES:,} bytes; no model reads so much at once"
        )
    try:
        return decoded(data, errors).strip("\n")
    except ValueError as error:
        way_out = (
            "convert it (iconv -f LATIN1 -t UTF-8), or let --input-errors replace put \ufffd there"
        )
        hint = f"; {way_out}" if "UTF-8" in str(error) else ""
        raise UsageError(f"standard input is {error}{hint}") from error
