"""Keys, token, cache and hub as a server would find them; nothing secret is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from chatserve.config import ServeConfig
from chatserve.doctor import setup
from chatserve.doctor.setup import check_cache, check_control_token, check_hub, check_keys
from chatserve.hub_download import RECORD

SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no settings."""
    for name in ("CHATSERVE_API_KEYS", "CHATSERVE_CONTROL_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_no_keys_on_loopback() -> None:
    found = check_keys(ServeConfig())
    assert found.status == "ok" and found.text.startswith("no API keys: whoever reaches 127.0.0.1")


def test_keys_are_counted_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_API_KEYS", f"{SECRET},{SECRET}-2")
    found = check_keys(ServeConfig(host="0.0.0.0"))
    assert (found.status, found.text) == ("ok", "API keys configured: 2 (not shown)")
    assert SECRET not in repr(found)


def test_a_public_address_without_a_key() -> None:
    found = check_keys(ServeConfig(host="0.0.0.0"))
    assert found.status == "fail" and "--host 0.0.0.0 is reachable" in found.text
    assert "--api-key-file" in (found.way_out or "")
    assert check_keys(ServeConfig(host="0.0.0.0", insecure_no_auth=True)).status == "ok"


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    found = check_keys(ServeConfig(api_key_file=str(tmp_path / "none")))
    assert found.status == "fail" and "cannot read --api-key-file" in found.text


@pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o640, "warn"), (0o604, "warn")])
def test_a_key_file_that_others_read(tmp_path: Path, mode: int, status: str) -> None:
    file = tmp_path / "keys"
    file.write_text(SECRET)
    file.chmod(mode)
    found = check_keys(ServeConfig(api_key_file=str(file)))
    assert found.status == status and SECRET not in repr(found)
    assert (found.way_out == f"run chmod 600 on {file}") == (status == "warn")


def test_no_token_yet_and_none_is_made(home: Path) -> None:
    found = check_control_token()
    assert found.status == "ok" and found.text.startswith("none yet")
    assert not home.exists()


def test_a_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_CONTROL_TOKEN", SECRET)
    found = check_control_token()
    assert found.status == "ok" and SECRET not in repr(found)


@pytest.mark.parametrize(
    ("mode", "content", "status", "way_out"),
    [
        (0o600, SECRET, "ok", None),
        (0o644, SECRET, "fail", "run chmod 600 on it"),
        (0o600, "", "fail", "delete it, and the controller makes a new one"),
    ],
)
def test_the_token_file(
    home: Path, mode: int, content: str, status: str, way_out: str | None
) -> None:
    home.mkdir()
    file = home / "control-token"
    file.write_text(content)
    file.chmod(mode)
    found = check_control_token()
    assert (found.status, found.way_out) == (status, way_out)
    assert found.facts["mode"] == oct(mode) and SECRET not in repr(found)


def put_model(home: Path, name: str) -> Path:
    folder = home / "models" / name
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps({"id": "org/a", "revision": "main"}))
    return folder


def test_the_cache_is_summed_up(home: Path) -> None:
    (put_model(home, "org--a") / "model.safetensors").write_bytes(bytes(2_000_000))
    found = check_cache()
    assert found.status == "ok" and found.facts["num_models"] == 1
    assert f"{home / 'models'}: models 1, 2.0 MB; " in found.text
    assert found.facts["num_bytes"] > 2_000_000


def test_a_cache_that_is_not_there_yet(home: Path) -> None:
    found = check_cache()
    assert (found.status, found.facts["num_models"]) == ("ok", 0)
    assert not home.exists()


def test_half_a_download(home: Path) -> None:
    for name in (".partial-org--a", ".chain-vicuna-7b-v0", ".lock-org--b"):
        put_model(home, name)
    found = check_cache()
    assert found.status == "warn" and found.facts["num_partial"] == 2
    assert found.text.endswith("; half downloaded: org--a, vicuna-7b-v0")
    assert "chatserve pull" in (found.way_out or "")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 1_900_000_000))
    found = check_cache()
    assert found.status == "warn" and "1.9 GB free" in found.text
    assert "CHATSERVE_HOME" in (found.way_out or "")


def test_a_cache_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text("a file is in the way")
    found = check_cache()
    assert found.status == "fail" and "cannot be written to" in found.text
    home.unlink()
    monkeypatch.setattr(setup.os, "access", lambda path, mode: False)
    assert check_cache().status == "fail"


def test_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(httpx, "get", refuse)
    found = check_hub(is_online=False)
    assert (found.status, found.text) == ("ok", "not asked (--online does)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = check_hub(is_online=True)
    assert found.status == "ok" and "HF_HUB_OFFLINE" in found.text


def test_an_endpoint_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{SECRET}@hub.example/x?token={SECRET}")
    found = check_hub(is_online=False)
    assert found.text.endswith(", HF_ENDPOINT is https://hub.example/x")
    assert found.facts["endpoint"] == "https://hub.example/x" and SECRET not in repr(found)


@pytest.mark.parametrize("url", ["hub.example", "ftp://hub.example", "https://", "http://[::1"])
def test_an_endpoint_that_is_no_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    found = check_hub(is_online=True)
    assert (found.status, found.text) == ("fail", "HF_ENDPOINT is no URL of a hub")
