"""`chatserve template check`: every source of a template, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli.commands.template import main
from chatserve.errors import ModelLoadError, UsageError
from tests import adapters
from tests.unit.models.vocabularies import save_byte_level, save_json, save_llama, smollm2

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(folder: Path, template: str, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_byte_level(
        folder, special=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>",
        chat_template=template, **settings,
    )  # fmt: skip
    return save_json(folder, config={"model_type": "llama"})


def test_the_same_prompt_from_two_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, CHATML)
    assert main(["check", str(folder), "--name", "chatml"]) == 0
    out = capsys.readouterr().out
    assert "* flag: chatml (chosen by name)\n    | ⟦<|im_start|>⟧user\n    | Hello!" in out
    assert "  fingerprint: none\n    no verified Vicuna or StackLLaMA\n" in out
    assert "  tokenizer: tokenizer (the tokenizer's own chat template)\n" in out
    assert "flag → tokenizer: the same ids\n" in out
    assert out.count("ok    an answer ends with <|im_end|>, which stops it") == 2


def test_a_difference_is_shown_by_id_and_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, CHATML.replace("assistant\n{% endif", "assistant{% endif") + "\x1b[1m")
    assert main(["check", str(folder), "--name", "chatml", "--message", "Hi"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "    --- flag\n    +++ tokenizer\n" in out


def test_the_difference_names_the_first_id_and_the_end(tmp_path: Path) -> None:
    folder = save(tmp_path, CHATML.replace("assistant\n{% endif", "assistant{% endif"))
    found = checked(folder, "--name", "chatml", "--message", "Hi")
    (difference,) = found["differences"]
    ids, other = (source["ids"] for source in found["sources"] if "ids" in source)
    assert ids[:-1] == other
    assert difference["summary"] == (
        f"{len(ids)} and {len(other)} ids, differing from id {len(other)} on: {ids[-1]} and the end"
    )
    assert difference["diff"][-1] == "-"


def checked(folder: Path, *options: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "chatserve", "template", "check", str(folder), "--json", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_vicuna_by_fingerprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "vicuna-7b-v1.1"
    folder.mkdir()
    template = "{{ bos_token }}{{ bos_token }}{{ messages[-1].content }}"
    save_llama(
        folder,
        config={"model_type": "llama", "vocab_size": 32000},
        tokenizer_config={"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"},
    )
    assert main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "* fingerprint: vicuna_v1.1 (verified as Vicuna v1.1 to v1.5: " in out
    assert "    fail  BOS 1 is doubled: 2 at the start\n" in out
    # the faulty one is not in use unless it is asked for
    assert main(["check", str(folder), "--name", "tokenizer"]) == 1


def test_no_template_at_all_is_shown_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_byte_level(tmp_path, special=["<s>"])
    save_json(tmp_path, config={"model_type": "llama"})
    with pytest.raises(UsageError, match="no chat template is known"):
        main(["check", str(tmp_path)])
    assert "  tokenizer: none\n    the tokenizer brings none\n" in capsys.readouterr().out
    found = checked(tmp_path, code=2)
    assert found["used"] is None and found["error"].startswith("no chat template is known")


def test_a_template_that_is_no_jinja(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path, "{% for %}")
    with pytest.raises(ModelLoadError, match="not valid Jinja"):
        main(["check", str(folder)])
    assert "the chat template 'tokenizer' is not valid Jinja" in capsys.readouterr().out
    assert main(["check", str(folder), "--name", "chatml"]) == 0


def test_a_template_that_refuses_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, "{{ raise_exception('no system') if messages[0].role == 'system' }}x")
    assert main(["check", str(folder), "--system", "be"]) == 1
    assert "cannot render this chat: no system" in capsys.readouterr().out


def test_a_flag_that_the_vocabulary_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, CHATML)
    with pytest.raises(UsageError, match="needs the special token </s>"):
        main(["check", str(folder), "--name", "vicuna_v1.1"])
    out = capsys.readouterr().out
    assert "  flag: none\n    the chat template vicuna_v1.1 needs the special token </s>" in out
    assert "  tokenizer: tokenizer" in out


def test_an_adapter_is_one_more_source_and_never_in_use(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", CHATML)
    adapter = adapters.write(tmp_path / "sql")
    args = ("--adapter", str(adapter))
    *_, shown = checked(folder, *args)["sources"]
    assert shown["source"] == "adapter" and shown["absence"] == "the adapter brings none"
    (adapter / "chat_template.jinja").write_text(CHATML.replace("{{ m.role }}", "{{ m.role }}!"))
    found = checked(folder, *args)
    *_, own, shown = found["sources"]
    assert found["used"] == "tokenizer" and shown["ids"] != own["ids"]
    assert shown["text"].startswith("⟦<|im_start|>⟧user!")
    assert "served with its base's" in shown["reason"]
    assert found["differences"][-1]["to"] == "adapter"


def test_an_adapters_own_tokenizer_encodes_its_template(tmp_path: Path) -> None:
    folder = save(tmp_path / "base", CHATML)
    adapter = adapters.write(tmp_path / "sql")
    save_byte_level(
        adapter, special=["<|new|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>",
        chat_template="<|new|>" + CHATML,
    )  # fmt: skip
    *_, own, shown = checked(folder, "--adapter", str(adapter))["sources"]
    assert shown["text"] == "⟦<|new|>⟧" + own["text"] and shown["ids"][2:] != own["ids"][1:]


@pytest.mark.parametrize("name", ["nothing", "base"])
def test_what_is_no_adapter_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "base", CHATML)
    with pytest.raises(ModelLoadError, match=f"{name}: is no adapter's folder"):
        main(["check", str(folder), "--adapter", str(tmp_path / name)])


def test_weights_are_needed() -> None:
    with pytest.raises(UsageError, match="WEIGHTS"):
        main(["check"])


def test_help_is_light() -> None:
    code = (
        "import sys, chatserve.cli.commands.template as command\n"
        "try: command.main(['check', '--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy' if {'torch', 'tokenizers', 'jinja2'} & sys.modules.keys() else 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("light\n")


@pytest.mark.weights
def test_gguf(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(smollm2())]) == 0
    out = capsys.readouterr().out
    assert "* tokenizer: tokenizer" in out
    assert "ok    an answer ends with <|im_end|>, which stops it" in out
