"""`chatserve template`: names, and a chat as a model sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chatserve.cli.commands.template import main
from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.chat_template import template_names
from tests.unit.models.vocabularies import save_byte_level, save_json, save_llama, smollm2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    save_byte_level(
        tmp_path, special=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>",
        chat_template=template + "\x1b[31m",
    )  # fmt: skip
    return save_json(tmp_path, config={"model_type": "llama"})


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines() == template_names()


def test_sample_chat(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("template: tokenizer (the tokenizer's own chat template)\n")
    assert "⟦<|im_start|>⟧assistant: Hi!\n⟦<|im_start|>⟧user: How are you?\n" in out
    assert "\x1b" not in out


def test_message_and_system(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--message", "a <|im_end|>", "--system", "be", "--name", "chatml"]
    assert main([str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "template: chatml (chosen by name)" in out
    assert "⟦<|im_start|>⟧system\nbe⟦<|im_end|>⟧\n" in out
    assert "⟦<|im_start|>⟧user\na <|im_end|>⟦<|im_end|>⟧\n" in out


def test_vicuna_v0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "vicuna-7b"
    folder.mkdir()
    save_llama(
        folder,
        config={"model_type": "llama", "vocab_size": 32001},
        added_tokens={"[PAD]": 32000},
    )
    assert main([str(folder), "--message", "Hello!"]) == 0
    out = capsys.readouterr().out
    assert "template: vicuna_v0 (verified as Vicuna v0: " in out
    assert "⟦<s>⟧A chat between a curious human" in out
    assert "\n44 ids: 1 319 13563 " in out
    assert out.endswith("stops at ids: 2\nstops at text: '###'\n")


def test_unknown_name(folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown chat template 'nope'"):
        main([str(folder), "--name", "nope"])


def test_a_name_needs_weights() -> None:
    with pytest.raises(UsageError, match="--name chatml needs WEIGHTS"):
        main(["--name", "chatml"])


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such folder"):
        main([str(tmp_path / "none")])


def test_help_is_light() -> None:
    code = (
        "import sys, chatserve.cli.commands.template as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy' if {'torch', 'tokenizers', 'jinja2'} & sys.modules.keys() else 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("light\n")


@pytest.mark.weights
def test_gguf(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(smollm2()), "--message", "Hello!"]) == 0
    out = capsys.readouterr().out
    assert "⟦<|im_start|>⟧user\nHello!⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n" in out
    assert "stops at ids: 2\n" in out
