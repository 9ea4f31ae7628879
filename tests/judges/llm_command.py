"""The `llm` command with a private configuration: prompts, streams, a conversation."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

MODEL = """\
- model_id: served
  model_name: tiny
  api_base: {url}/v1
  api_key_name: here
  can_stream: true
"""


def judge(url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLM_USER_PATH"] = folder
        os.environ["LLM_LOAD_PLUGINS"] = ""
        (Path(folder) / "keys.json").write_text(json.dumps({"here": os.environ["OPENAI_API_KEY"]}))
        (Path(folder) / "extra-openai-models.yaml").write_text(MODEL.format(url=url), "utf-8")
        streamed = run("-m", "served", "hi", "-o", "max_tokens", "8", "-o", "seed", "1")
        whole = run("-m", "served", "hi", "--no-stream", "-o", "max_tokens", "8", "-o", "seed", "1")
        assert streamed.strip() and streamed == whole, (streamed, whole)
        assert run("-c", "and then?", "-o", "max_tokens", "8").strip()
        assert "served" in run("models", "list")


def run(*arguments: str) -> str:
    """What the command prints."""
    from llm.cli import cli

    # it reads a prompt from standard input where that is no terminal
    sys.stdin = io.StringIO("")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main(list(arguments), standalone_mode=False)
    return printed.getvalue()
