"""Every bomb rendered once in a process of its own: what it takes of time and memory.

    python -m tests.template_bombs [OFF]

Prints one JSON line: how many were refused, the most processor time of one, and by how much the
process has grown at its largest. OFF: one bomb, with the bounds on sizes switched off.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from chatserve.engine.prompt import Message
from chatserve.errors import InvalidRequest
from chatserve.models.special_tokens import AddedToken, SpecialTokens
from chatserve.models.templates import jinja_bounds, jinja_sandbox
from chatserve.models.templates.jinja import JinjaTemplate
from tests.hostile_templates import BOMBS, DOUBLING, ENDLESS

FULL_S = jinja_sandbox.MAX_RENDER_S
LARGE = "{% set x = 'a' * 400000000 %}"


def peak_bytes() -> int:
    """Of this program alone: what getrusage says begins with its parent's."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def render(source: str) -> None:
    markers = SpecialTokens((AddedToken("<|end|>", 1, True),))
    JinjaTemplate("own", source, markers, {"bos_token": "<s>"}).render([Message("user", "hi")])


def main() -> None:
    render("{{ messages[0].content }}")  # what rendering imports is not counted
    bombs = [*BOMBS, *DOUBLING, *ENDLESS, LARGE]
    if sys.argv[1:] == ["OFF"]:
        bombs = [LARGE]
        jinja_bounds._spend = lambda _: None  # type: ignore[assignment]
    before, refused, most_s = peak_bytes(), 0, 0.0
    for source in bombs:
        # one to the full limit of time, the others to some of it
        jinja_sandbox.MAX_RENDER_S = 0.1 if source in ENDLESS[1:] else FULL_S
        start_s = time.process_time()
        try:
            render(source)
        except InvalidRequest:
            refused += 1
        most_s = max(most_s, time.process_time() - start_s)
    grown = peak_bytes() - before
    print(json.dumps({"bombs": len(bombs), "refused": refused, "most_s": most_s, "grown": grown}))


if __name__ == "__main__":
    main()
