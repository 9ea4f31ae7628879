"""Settings: one field, four sources, one precedence; and what is set for libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve import config as settings
from chatserve.config import ControllerConfig, ServeConfig, build, sources
from chatserve.errors import UsageError


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, "utf-8")
    return path


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "heartbeat_expiry_s = 2")
    fastchat = {"FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION": "9"}
    environ = {"CHATSERVE_HEARTBEAT_EXPIRY_S": "3", **fastchat}

    def expiry_s(flags: dict[str, float], **options: Any) -> float:
        return build(ControllerConfig, flags, **options).heartbeat_expiry_s

    assert expiry_s({}, environ={}) == 10
    assert expiry_s({}, file=file, environ={}) == 2
    assert expiry_s({}, file=file, environ=environ) == 3
    assert expiry_s({"heartbeat_expiry_s": 4}, file=file, environ=environ) == 4
    assert expiry_s({}, environ=fastchat) == 9


def test_every_value_names_its_source(tmp_path: Path) -> None:
    file = write(tmp_path, 'allow_host = ["x", "y"]')
    environ = {"CHATSERVE_INSECURE_NO_AUTH": "yes"}
    found = sources(ControllerConfig, {"host": "b"}, file=file, environ=environ)
    assert found["allow_host"] == (("x", "y"), str(file))
    assert found["insecure_no_auth"] == (True, "CHATSERVE_INSECURE_NO_AUTH")
    assert found["host"] == ("b", "flag")
    assert found["port"] == (8000, "default")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CHATSERVE_SEED": "many"}, "CHATSERVE_SEED: 'many' is not a valid int"),
        ({"CHATSERVE_LOAD_8BIT": "maybe"}, "CHATSERVE_LOAD_8BIT: 'maybe'"),
        ({"CHATSERVE_DEVICE": "c"}, "'c' is not one of auto, cpu"),
    ],
)
def test_a_bad_value_names_its_source(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(ServeConfig, {}, environ=environ)


@pytest.mark.parametrize("text", ["port = ", "port = 'x'", "unknown = 1"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"config\.toml"):
        build(ControllerConfig, {}, file=write(tmp_path, text), environ={})


def test_keys_come_from_file_and_environment_without_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# laptops\nkey-a\n\n key-b \n", "utf-8")
    monkeypatch.setenv("CHATSERVE_API_KEYS", "key-c, key-d,")
    assert set(settings.api_keys(str(file))) == {"key-a", "key-b", "key-c", "key-d"}
    with pytest.raises(UsageError, match="no-such-file"):
        settings.api_keys(str(tmp_path / "no-such-file"))


@pytest.mark.parametrize(("before", "after"), [(None, "10000"), ("7", "7")])
def test_a_worker_limits_spinning_unless_the_user_has(before: str | None, after: str) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    if before is not None:
        environ["GOMP_SPINCOUNT"] = before
    # what the worker does before its engine, and torch with it, comes in
    code = (
        "import os, sys, types\n"
        "fake = types.ModuleType('chatserve.engine.serving')\n"
        "fake.load = lambda config, progress: print(os.environ['GOMP_SPINCOUNT'])\n"
        "sys.modules['chatserve.engine.serving'] = fake\n"
        "from chatserve.server.worker_process import load_engine\n"
        "assert 'torch' not in sys.modules\n"
        "load_engine(None, None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == after
