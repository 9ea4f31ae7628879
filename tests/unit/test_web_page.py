"""The sources of the web page: their own tests, run by Node."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).parents[2] / "web"


def run(*script: str) -> None:
    npm = shutil.which("npm")
    if npm is None or not (WEB / "node_modules").is_dir():
        pytest.skip("Node's packages are not there: make page")
    done = subprocess.run(
        [npm, "--prefix", str(WEB), "run", "--silent", *script],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_page_passes_its_own_tests() -> None:
    run("test", "--", "--reporter=dot")


def test_the_page_has_types_and_form() -> None:
    run("check")
