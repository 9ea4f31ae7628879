"""`chatserve config`: where each setting comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatserve.cli.commands.config import main
from chatserve.errors import UsageError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    for name in ("CHATSERVE_CONFIG", "CHATSERVE_DEVICE", "CHATSERVE_TEMPERATURE"):
        monkeypatch.delenv(name, raising=False)


def rows(text: str) -> dict[str, tuple[str, str]]:
    """name -> (value, source)."""
    table = {}
    for line in text.splitlines():
        if line and line[0] not in "[#":
            head, _, source = line.partition("  # ")
            name, _, value = head.partition(" ")
            table[name] = (value.strip(), source)
    return table


def test_values_and_their_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('dtype = "float32"\nport = 9000\nload_8bit = true\nallow_host = ["a", "b"]\n')
    monkeypatch.setenv("CHATSERVE_DEVICE", "cpu")
    assert main(["serve"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# settings file: {file}\n\n[serve]\n")
    table = rows(out)
    assert table["device"] == ("cpu", "CHATSERVE_DEVICE")
    assert table["dtype"] == ("float32", str(file))
    assert table["port"] == ("9000", str(file))
    assert table["load_8bit"] == ("true", str(file))
    assert table["allow_host"] == ("a,b", str(file))
    assert table["host"] == ("127.0.0.1", "default")
    assert table["seed"] == ("-", "default")


def test_all_commands_are_shown_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# settings file: none\n")
    for command in ("chat", "serve", "controller", "worker"):
        assert f"\n[{command}]\n" in out


def test_internal_settings_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert not {"parent_pipe", "worker_id"} & rows(capsys.readouterr().out).keys()


def test_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('allow_host = ["a"]')
    monkeypatch.setenv("CHATSERVE_DEVICE", "cpu")
    main(["serve", "--json"])
    table = json.loads(capsys.readouterr().out)
    assert {*table} == {"file", "serve"} and table["file"] == str(file)
    serve = table["serve"]
    assert serve["device"] == {"value": "cpu", "source": "CHATSERVE_DEVICE"}
    assert serve["allow_host"] == {"value": ["a"], "source": str(file)}
    assert serve["seed"] == {"value": None, "source": "default"}


def test_a_command_without_settings_is_refused() -> None:
    with pytest.raises(UsageError, match="'pull' has no settings; there are chat, serve"):
        main(["pull"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "unknown setting colour; `chatserve config` lists them"),
        ('"load-8bits" = true', "unknown setting load-8bits; did you mean load_8bit[?]"),
        ("port = [", "cannot read the settings file"),
        ('device = "xpu"', "xpu is not supported: there are no kernels for Intel GPUs"),
        ('port = "x"', "is not a valid int"),
    ],
)
def test_a_bad_settings_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        main([])


def test_a_named_settings_file_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHATSERVE_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="CHATSERVE_CONFIG names"):
        main([])


def test_the_users_settings_folder_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CHATSERVE_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "chatserve").mkdir()
    (tmp_path / "chatserve" / "config.toml").write_text("temperature = 0.5")
    main(["chat"])
    assert rows(capsys.readouterr().out)["temperature"][0] == "0.5"
