"""Schemathesis on the OpenAPI document: no server error, no answer that it does not describe."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_schema_conformance", "response_headers_conformance", "unsupported_method",
    "negative_data_rejection", "ignored_auth",
)  # fmt: skip

# where a body is too large nobody looks at its fields
CONFIG = """\
[checks.negative_data_rejection]
expected-statuses = ["4xx"]
"""


def judge(url: str) -> None:
    from schemathesis.cli import schemathesis

    header = f"Authorization: Bearer {os.environ['OPENAI_API_KEY']}"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it keeps what it found where it runs
        file = Path(folder) / "openapi.json"
        file.write_text(json.dumps(document(url)), "utf-8")
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CONFIG, "utf-8")
        arguments: list[Any] = [
            f"--config-file={config}", "run", str(file), f"--url={url}", "-H", header,
            f"--checks={','.join(CHECKS)}",
            "--phases=examples,coverage,fuzzing", "--max-examples=5", "--workers=2", "--no-color",
            "--generation-deterministic",
        ]  # fmt: skip
        try:
            schemathesis.main(arguments, standalone_mode=True)
        except SystemExit as end:
            if end.code:
                sys.exit(f"schemathesis ended with {end.code}")


def document(url: str) -> dict[str, Any]:
    """The server's, but that it names the model that is served (a stranger's is always a 404), and
    no list is long: filling them takes minutes, and their limits have tests of their own."""
    key = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    found: dict[str, Any] = httpx.get(f"{url}/openapi.json", headers=key).json()
    for schema in found["components"]["schemas"].values():
        if "model" in schema.get("properties", {}) and schema.get("additionalProperties") is False:
            schema["properties"]["model"] = {"const": "brief"}
    shorten(found)
    for path in found["paths"].values():
        for operation in path.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if "model" in content["example"]:
                    content["example"]["model"] = "brief"
    return found


def shorten(schema: Any) -> None:
    if isinstance(schema, dict):
        for word in ("maxItems", "maxProperties"):
            if isinstance(schema.get(word), int) and schema[word] > 16:
                del schema[word]
        for each in schema.values():
            shorten(each)
    elif isinstance(schema, list):
        for each in schema:
            shorten(each)
