"""`make chat` as in the README, a second time: nothing is installed or fetched any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment
from tests.weights import default_model

REPOSITORY = Path(__file__).parents[2]
STAMP = Path(sys.prefix) / ".runtime"


@pytest.mark.weights
def test_a_second_make_chat_answers_once_without_the_network() -> None:
    default_model()
    sources = [REPOSITORY / name for name in ("pyproject.toml", "requirements/runtime.txt")]
    if not STAMP.exists() or any(s.stat().st_mtime > STAMP.stat().st_mtime for s in sources):
        if os.environ.get("CI"):
            pytest.fail(f"{STAMP} is missing or stale: run the tests by `make test`")
        pytest.skip("this environment was not made by `make`")
    prompt = 'PROMPT=What is 2+2? It\'s $5 "or" so.'
    command = ["make", "--no-print-directory", "chat", prompt, "ARGS=--max-new-tokens 16"]
    result = subprocess.run(
        [*command, f"VENV={sys.prefix}"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
        env=environment(PIP_NO_INDEX="1", MAKEFLAGS="", CHAT_PROMPT=""),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "pip install" not in result.stdout
    # make must not have expanded the dollar sign: the prompt arrives as it was typed
    dry = subprocess.run(
        ["make", "--no-print-directory", "-f", "-", "show"],
        input=f"include {REPOSITORY}/Makefile\nshow:\n\t@printf '%s' \"$$CHAT_PROMPT\"\n",
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60,
        env={**environment(MAKEFLAGS=""), "PROMPT": "costs $5 `x` \"y\""},
    )  # fmt: skip
    assert dry.stdout == 'costs $5 `x` "y"'
