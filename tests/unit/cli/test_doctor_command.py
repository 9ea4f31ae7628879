"""`chatserve doctor`: all findings as text and JSON, and the exit code."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli.commands import doctor
from chatserve.cli.commands.doctor import main
from chatserve.doctor import machine, setup
from chatserve.doctor.bandwidth import Bandwidth
from chatserve.doctor.finding import Finding
from chatserve.errors import UsageError
from tests import tiny

SECRET = "sk-very-secret"
NAMES = [
    "port", "keys", "control token", "cache", "hub", "software", "kernels", "compiler", "device",
    "load", "operators", "8-bit operators", "memory", "weights", "bandwidth",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a secret, no GPU, no socket, and a bandwidth that takes no time."""
    for name in ("CHATSERVE_KERNELS", "CHATSERVE_CONFIG", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CHATSERVE_API_KEYS", SECRET)
    monkeypatch.setenv("CHATSERVE_CONTROL_TOKEN", SECRET)
    monkeypatch.setenv("CHATSERVE_DEVICE", "cpu")
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(machine, "measure", lambda *args: Bandwidth(1e-6, 1, 1 << 30))
    monkeypatch.setattr(setup, "bind", lambda host, port: socket.socket())

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "home"


def findings(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert main(["--json", *argv]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["status"] == ("fail" if code else answer["status"])
    return {finding["name"]: finding for finding in answer["findings"]}


def test_everything_is_looked_at_without_a_model(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = findings(capsys)
    assert list(found) == NAMES
    assert found["weights"]["text"].startswith("no model was tried")
    assert not home.exists()
    assert all(finding["status"] in ("ok", "warn") for finding in found.values())


def test_a_model_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_model(tmp_path / "m")
    found = findings(capsys, str(tmp_path / "m"), "--load-8bit", "--device", "cpu")
    # without another look at what --load-8bit would run on
    names = [name for name in NAMES if name != "8-bit operators"]
    names.insert(names.index("weights") + 1, "reading")  # random ones make no sense of a text
    assert list(found) == [*names, "speed"]
    assert found["weights"]["facts"]["kernels"] and found["weights"]["facts"]["bytes"]["cpu"] > 0
    assert found["speed"]["facts"]["tokens_per_s"] > 0


def test_the_default_model_is_tried_when_it_is_there(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "x.gguf").write_bytes(b"not the one that was released")
    weights = findings(capsys, code=1)["weights"]
    assert weights["status"] == "fail" and weights["way_out"]


def test_text_has_a_line_and_a_way_out_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "ok    port: 127.0.0.1:8000 is free" in lines
    at = lines.index(f"fail  weights: {tmp_path / 'none'}: no such folder or file")
    assert lines[at + 1] == "      → check the spelling"
    counts = lines[-1].split(", ")
    assert counts[2] == "1 fail"
    assert sum(int(count.split()[0]) for count in counts) == len(NAMES)


def test_no_secret_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json"])
    assert SECRET not in capsys.readouterr().out
    main([])
    assert SECRET not in capsys.readouterr().out


def test_settings_come_from_the_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 8123\nhost = "0.0.0.0"\nload_8bit = true')
    monkeypatch.setenv("CHATSERVE_CONFIG", str(file))
    found = findings(capsys)
    assert found["port"]["facts"] == {"host": "0.0.0.0", "port": 8123}
    assert "8-bit operators" not in found


def test_a_device_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, "--device", "cuda", code=1)
    assert list(found)[-1] == "operators" and found["operators"]["status"] == "fail"


def test_without_torch_the_rest_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from chatserve.doctor import software

    broken = [Finding("software", "fail", "torch missing", "install it")]
    monkeypatch.setattr(software, "check_software", lambda: broken)
    assert list(findings(capsys, code=1)) == [*NAMES[:5], "software"]


def test_the_network_is_off_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def check_hub(*, is_online: bool) -> Finding:
        asked.append(is_online)
        return Finding("hub", "ok", "")

    monkeypatch.setattr(setup, "check_hub", check_hub)
    found = findings(capsys, "org/none", code=1)
    assert "the network is off" in found["weights"]["text"]
    findings(capsys, "--online")
    assert asked == [False, True]
    with pytest.raises(UsageError, match="--online and --offline exclude each other"):
        main(["--online", "--offline"])


def test_names_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._print(Finding("x", "warn", "a\x1b[31m\nb", "c\x1b[0m"))
    assert capsys.readouterr().out == "warn  x: a b\n      → c\n"


def test_help_is_light() -> None:
    code = (
        "import sys, chatserve.cli.commands.doctor as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'tokenizers', 'httpx', 'uvicorn', 'numpy'} & sys.modules.keys()\n"
        "print(heavy or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("light\n")
