"""Bad input ends with one line that says what, where and what to do, and the right exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve import environment
from chatserve.default_model import SMOLLM2_135M
from tests import tiny
from tests.processes import run_chatserve
from tests.unit.models.test_torch_bin_hostile import archive, opcodes


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save_model(folder, max_shard_size="100KB")
    return folder


def copy(model: Path, folder: Path) -> Path:
    target = folder / "tiny"
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def remove_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def truncate_shard(folder: Path) -> None:
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 100)


def wrong_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=128)


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["FooForCausalLM"], model_type="foo")


def delta(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = {name: weight * 0.01 for name, weight in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})


def adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "llama"}', "utf-8")
    (folder / "adapter_model.bin").write_bytes(b"")


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def foreign_pickle(folder: Path) -> None:
    for shard in folder.glob("model*"):
        shard.unlink()
    torch.save({"lm_head.weight": Command("touch /tmp/chatserve-was-here")},
               folder / "pytorch_model.bin")  # fmt: skip


class Command:
    """Unpickled carelessly, it runs a command."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        return os.system, (self.text,)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def claims_70b(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=8192, num_hidden_layers=80, vocab_size=320,
              intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8)  # fmt: skip


def no_template(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("spoil", "exit_code", "words"),
    [
        (empty, 3, "config.json"),
        (remove_shard, 3, "model-00001-of-"),
        (truncate_shard, 3, "model-00001-of-"),
        (wrong_shape, 3, "shape"),
        (unknown_architecture, 3, "FooForCausalLM"),
        (delta, 3, "delta"),
        (adapter, 3, "adapter"),
        (foreign_pickle, 3, "system"),
        (no_tokenizer, 3, "tokenizer"),
        (claims_70b, 4, "GB"),
        (no_template, 2, "--conv-template"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_spoilt_weights_end_the_worker_with_one_line(
    tiny_model: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    exit_code: int,
    words: str,
) -> None:
    folder = copy(tiny_model, tmp_path)
    spoil(folder)
    result = run_chatserve("worker", folder, "--no-register", CHATSERVE_HOME=str(tmp_path))
    assert_one_line(result, exit_code, words)
    assert not Path("/tmp/chatserve-was-here").exists()


@pytest.mark.parametrize("case", ["GLOBAL and REDUCE", "SETITEM on a list", "wrong storage size"])
def test_a_hostile_pickle_ends_with_one_line(tiny_model: Path, tmp_path: Path, case: str) -> None:
    folder, marker = copy(tiny_model, tmp_path), tmp_path / "marker"
    for shard in folder.glob("model*"):
        shard.unlink()
    archive(folder / "pytorch_model.bin", opcodes(str(marker))[case])
    result = run_chatserve("worker", folder, "--no-register", CHATSERVE_HOME=str(tmp_path))
    assert_one_line(result, 3, "pytorch_model.bin")
    assert not marker.exists()


@pytest.mark.weights
def test_a_damaged_default_model_ends_with_one_line(tmp_path: Path) -> None:
    """One byte of it flipped: it does not have the SHA-256 that is pinned."""
    name = SMOLLM2_135M.path.relative_to(environment.home())
    if not SMOLLM2_135M.path.exists():
        pytest.skip("the default model is not in the cache; `make chat` fetches it")
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    shutil.copyfile(SMOLLM2_135M.path, path)
    with path.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    result = run_chatserve("chat", "-p", "hi", "--offline", CHATSERVE_HOME=str(tmp_path))
    assert_one_line(result, 3, "chatserve pull smollm2-135m")


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_the_whole_chain_passes_the_code_and_the_line_on(
    tiny_model: Path, tmp_path: Path, command: str
) -> None:
    folder = copy(tiny_model, tmp_path)
    truncate_shard(folder)
    flags = ("-p", "hi") if command == "chat" else ("--port", "0")
    result = run_chatserve(command, folder, *flags, CHATSERVE_HOME=str(tmp_path))
    assert_one_line(result, 3, "model-00001-of-")


def spoilt_gguf(data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "model.gguf"),
        (b"GGML" + bytes(100), "no GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "model.gguf"),
        (b"GGUF\x03\0\0\0" + bytes(7) + b"\x01" + bytes(8), "model.gguf"),
    ],
)
def test_a_corrupt_gguf_ends_with_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    path = spoilt_gguf(data)(tmp_path)
    result = run_chatserve("worker", path, "--no-register", CHATSERVE_HOME=str(tmp_path))
    assert_one_line(result, 3, words)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["chat", "/no/such/folder", "-p", "hi"], 3, "/no/such/folder"),
        (["chat", "no-such-alias", "-p", "hi"], 2, "no-such-alias"),
        (["chat", "--no-such-flag"], 2, "--no-such-flag"),
        (["chat", "--gptq-wbits", "4"], 2, "--gptq-wbits"),
        (["chat", "--api-keys", "hunter2"], 2, "--api-keys"),
        (["serve", "--host", "0.0.0.0"], 2, "CHATSERVE_API_KEYS"),
        (["no-such-command"], 2, "no-such-command"),
        (["chat", "-p", "hi", "--base-url", "http://127.0.0.1:9/v1"], 1, "127.0.0.1:9"),
        (["chat", "some/model", "-p", "hi", "--offline"], 1, "--offline"),
        (["chat", "--offline", "-p", "hi"], 1, "the network is off"),
    ],
)
def test_bad_usage_ends_with_one_line(
    tmp_path: Path, arguments: list[str], exit_code: int, words: str
) -> None:
    result = run_chatserve(*arguments, CHATSERVE_HOME=str(tmp_path))
    assert_one_line(result, exit_code, words)
    assert "hunter2" not in result.stderr


def test_an_unreachable_hub_ends_with_one_line(tmp_path: Path) -> None:
    result = run_chatserve(
        "chat", "some/model", "-p", "hi", CHATSERVE_HOME=str(tmp_path), HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert_one_line(result, 1, "127.0.0.1:9")


def test_a_port_in_use_is_found_before_anything_loads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_chatserve("serve", "--port", str(port), CHATSERVE_HOME=str(tmp_path))
    assert_one_line(result, 5, str(port))


def test_an_unknown_template_lists_the_names(tiny_model: Path, tmp_path: Path) -> None:
    result = run_chatserve("worker", tiny_model, "--no-register", "--conv-template", "no-such",
                           CHATSERVE_HOME=str(tmp_path))  # fmt: skip
    assert_one_line(result, 2, "vicuna_v1.1")


def assert_one_line(result: Any, exit_code: int, words: str) -> None:
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    # log lines start with a time; what is left is the message
    lines = [line for line in result.stderr.splitlines() if not line[:2].isdigit()]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]
