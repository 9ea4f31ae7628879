"""The manual page: of all commands, taken by groff without a word, as fresh as the parsers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from chatserve.cli.main import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "chatserve.1"


def test_every_command_is_there() -> None:
    text = PAGE.read_text("ascii")
    for command in COMMANDS:
        assert ".SS chatserve " + command.replace("-", r"\-") + "\n" in text
    assert r"\fB\-\-stream\-json\fR" in text
    assert "_parser" not in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff here")
def test_groff_has_nothing_to_say() -> None:
    result = subprocess.run(
        ["groff", "-man", "-Tascii", "-ww", "-z", PAGE], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
