"""Who is let in where: the secrets that an operator's commands send."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatserve.cli.operated_server import OperatorOptions, find_server


@pytest.mark.parametrize(
    ("url", "api_key", "sent"),
    [
        ("http://127.0.0.1:9", None, "Bearer the-token"),
        ("https://localhost:9/v1", None, "Bearer the-token"),
        ("http://127.0.0.1:9", "the-key", "Bearer the-key"),
        ("https://chat.example.com", "the-key", "Bearer the-key"),
        ("https://chat.example.com", None, None),
        ("http://127.0.0.1.example.com", None, None),
    ],
)
def test_the_control_token_stays_on_this_machine(
    url: str,
    api_key: str | None,
    sent: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("CHATSERVE_API_KEY", raising=False)
    monkeypatch.setenv("CHATSERVE_CONTROL_TOKEN", "the-token")
    if api_key is not None:
        monkeypatch.setenv("CHATSERVE_API_KEY", api_key)
    server = find_server(OperatorOptions(base_url=url))
    assert server.client._headers.get("authorization") == sent
    server.close()
