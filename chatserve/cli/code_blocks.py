"""The fenced code of an answer. Knows CommonMark's fences (spec 0.31, §4.5) and nothing else."""

from __future__ import annotations

import re

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)$")


def code_blocks(text: str) -> list[str]:
    """What stands between fences, without them; a block that the text leaves open counts, too."""
    blocks: list[str] = []
    fence, lines = "", list[str]()
    for line in text.split("\n"):
        found = _FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                blocks.append("\n".join(lines))
                fence, lines = "", []
            else:
                lines.append(line)
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            fence = found[1]
    return [*blocks, "\n".join(lines)] if fence and lines else blocks
