"""How a WordPiece vocabulary (BERT's) writes text: a piece begins a word unless its prefix says no.

What the vocabulary leaves out on the way in (accents, capitals, spaces) does not come back.
"""

from __future__ import annotations

from collections.abc import Callable

PREFIX = "##"


def reader(prefix: object) -> Callable[[str], bytes]:
    """The bytes of a piece, a space before each word; `prefix` as the file's decoder names it."""
    mark = prefix if isinstance(prefix, str) and prefix else PREFIX

    def piece_bytes(piece: str) -> bytes:
        inner = piece.removeprefix(mark)
        return (inner if inner != piece else f" {piece}").encode()

    return piece_bytes
