"""Where API keys come from, and files that no server should start with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from chatserve import environment
from chatserve.config import ControllerConfig
from chatserve.errors import UsageError
from chatserve.server.controller_process import access_policy


def key_file(tmp_path: Path, content: str = "key\n", mode: int = 0o600) -> str:
    path = tmp_path / "keys"
    path.write_text(content, "utf-8")
    path.chmod(mode)
    return str(path)


def test_keys_of_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_API_KEYS", "a, b,")
    assert environment.api_keys(None) == ("a", "b")
    file = key_file(tmp_path, "# mine\n\n c \nschlüssel\n")
    assert environment.api_keys(file) == ("a", "b", "c", "schlüssel")


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n"])
def test_a_file_without_a_key_opens_no_server(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match="holds no key"):
        environment.api_keys(key_file(tmp_path, content))


def test_a_variable_without_a_key_opens_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_API_KEYS", " , ")
    with pytest.raises(UsageError, match="CHATSERVE_API_KEYS holds no key"):
        environment.api_keys(None)
    # how a supervisor tells its worker that they are none of its business
    monkeypatch.setenv("CHATSERVE_API_KEYS", "")
    assert environment.api_keys(None) == ()


def test_a_file_that_everybody_can_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chmod 600"):
        environment.api_keys(key_file(tmp_path, mode=0o602))


@pytest.mark.parametrize(("mode", "is_told"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_told(
    tmp_path: Path, mode: int, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = key_file(tmp_path, mode=mode)
    with caplog.at_level(logging.WARNING):
        access_policy(ControllerConfig(api_key_file=file), "t")
    assert [each.message for each in caplog.records] == (
        [f"others can read the API keys in {file}; run chmod 600 on it"] if is_told else []
    )


PUBLIC = ("0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "example.com", "localhost.evil", "fe80::1",
          "")  # fmt: skip


@pytest.mark.parametrize("host", PUBLIC)
def test_a_public_address_without_a_key(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match="CHATSERVE_API_KEYS"):
        access_policy(ControllerConfig(host=host), "t")
    with caplog.at_level(logging.WARNING):
        access_policy(ControllerConfig(host=host, insecure_no_auth=True), "t")
    assert [each.message for each in caplog.records] == [
        f"anyone who reaches {host} can use this server without a key"
    ]
