"""What a chat's settings put into each request: sampling, the system message, files.

Knows settings and files; no server, no terminal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatserve.cli.asking import ChatOptions
from chatserve.cli.attachments import Attachments, read_attachment
from chatserve.cli.transcript import Transcript
from chatserve.config import ChatConfig
from chatserve.errors import UsageError

MAX_NEW_TOKENS = 512


def transcript_of(config: ChatConfig) -> Transcript:
    return Transcript(system=config.conv_system_msg, template_name=config.conv_template or "")


def options_of(config: ChatConfig, temperature: float) -> ChatOptions:
    """What requests carry: settings that were made, and a default where the API's is another."""
    if config.temperature is not None:
        sampling: dict[str, Any] = {"temperature": config.temperature}
    elif config.use_generation_config:
        sampling = {}
    else:
        sampling = {"temperature": temperature}
    asked = {
        "top_p": config.top_p,
        "repetition_penalty": config.repetition_penalty,
        "max_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    sampling |= {name: value for name, value in asked.items() if value is not None}
    if config.schema is not None:
        sampling["response_format"] = _response_format(config.schema)
    return ChatOptions(
        sampling, wished_max_tokens=MAX_NEW_TOKENS, with_history=not config.no_history
    )


def _response_format(file: str) -> dict[str, Any]:
    """Raises `UsageError` when `file` holds no JSON Schema."""
    try:
        schema = json.loads(Path(file).expanduser().read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read --schema {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema {file} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"--schema {file} holds no JSON object")
    described = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": described}


def files_of(config: ChatConfig) -> Attachments:
    files = Attachments()
    files.add([read_attachment(name, errors=config.input_errors) for name in config.file])
    return files
