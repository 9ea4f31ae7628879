"""`chatserve list`: what each cached model is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli.commands.list import main
from chatserve.hub_download import RECORD
from chatserve.models.receipt import receipt_of, write_receipt
from chatserve.models.weights_summary import summarise
from tests import receipts, tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save_model(path)
    return path


@pytest.fixture
def models(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of a whole model and a damaged one."""
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    for name in ("a", "b"):
        folder = shutil.copytree(source, tmp_path / "models" / f"org--{name}")
        (folder / RECORD).write_text(json.dumps({"id": f"org/{name}", "revision": "main"}))
    (folder / "model.safetensors").write_bytes(b"half")
    return tmp_path / "models"


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_json_tells_all(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = summarise(models / "org--a")
    whole, damaged = rows(capsys)
    assert whole == {
        "name": "org/a",
        "revision": "main",
        "num_bytes": sum(file.stat().st_size for file in (models / "org--a").iterdir()),
        "path": str(models / "org--a"),
        "kind": "model",
        "architecture": "LlamaForCausalLM",
        "num_parameters": about.num_parameters,
        "dtype": "float32",
        "dtypes": {"float32": 4 * about.num_parameters},
        "fingerprint": about.fingerprint,
        "receipt": None,
        "fault": None,
    }
    assert damaged["name"] == "org/b" and damaged["fingerprint"] is None
    assert "model.safetensors" in damaged["fault"]


def test_a_line_each(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = summarise(models / "org--a")
    receipt = receipts.receipt(about.fingerprint)
    write_receipt(models / "org--a", receipt, "<svg/>")
    assert main([]) == 0
    out, hint = capsys.readouterr()
    whole, damaged, why = out.splitlines()
    assert whole.split()[0] == "org/a" and damaged.split()[0] == "org/b"
    for text in ("float32", "LlamaForCausalLM", about.fingerprint, "  int8 KL 0.0059 "):
        assert text in whole
    assert "?" in damaged and why.startswith("  damaged: ")
    assert whole.index(str(models)) == damaged.index(str(models))
    assert hint == "chat with one: chatserve chat org/a\n"
    assert receipt_of(rows(capsys)[0]["receipt"]) == receipt


def test_a_part_of_a_model_is_not_called_damaged(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what to chat with is a whole model, though it comes later."""
    for name, file in (("a--delta-v0", "config.json"), ("a--sft", "adapter_config.json")):
        (models / name).mkdir()
        (models / name / file).write_text("{}")
        model_id = "lmsys/vicuna-7b-delta-v0" if "delta" in name else "a/sft"
        record = {"id": model_id, "revision": "main"}
        (models / name / RECORD).write_text(json.dumps(record))
    assert main([]) == 0
    out, hint = capsys.readouterr()
    adapter, _, _, why, delta = out.splitlines()
    assert adapter.split()[:5] == ["a/sft", "0.0", "MB", "adapter", "-"]
    assert delta.split()[:5] == ["vicuna-7b-delta-v0", "0.0", "MB", "delta", "-"]
    assert why.startswith("  damaged: ") and out.count("damaged") == 1
    assert hint == "chat with one: chatserve chat org/a\n"
    assert [row["kind"] for row in rows(capsys)] == ["adapter", "model", "model", "delta"]


def test_an_old_receipt_is_called_old(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = summarise(models / "org--a")
    old = receipts.receipt(about.fingerprint, version="0.0.0")
    write_receipt(models / "org--a", old, "<svg/>")
    assert main([]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "  old receipt " in line and "KL" not in line


def test_names_cannot_drive_the_terminal(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((models / "org--a" / "config.json").read_text())
    config["architectures"] = ["\x1b[31mRed"]
    (models / "org--a" / "config.json").write_text(json.dumps(config))
    main([])
    assert "\x1b" not in capsys.readouterr().out


def test_the_hint_is_a_model_that_has_a_template(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base comes first by its name, and nobody knows how to ask it."""
    chat = shutil.copytree(models / "org--a", models.parent / "chat")
    settings = models / "org--a" / "tokenizer_config.json"
    table = json.loads(settings.read_text())
    del table["chat_template"]
    settings.write_text(json.dumps(table))
    assert main([]) == 0
    assert "chat with one" not in capsys.readouterr().err
    (chat / RECORD).write_text(json.dumps({"id": "org/chat", "revision": "v2"}))
    shutil.move(chat, models / "org--chat")
    assert main([]) == 0
    assert capsys.readouterr().err == "chat with one: chatserve chat org/chat --revision v2\n"


def test_names_that_can_be_fetched(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--names"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names[0] == "smollm2-135m" and {"vicuna-7b-v1.5", "stackllama-7b"} <= {*names}
    assert main(["--names", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == names


def test_help_is_light() -> None:
    code = (
        "import sys, chatserve.cli.commands.list as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy' if {'torch', 'tokenizers', 'httpx'} & sys.modules.keys() else 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("light\n")
