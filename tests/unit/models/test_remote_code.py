"""Code that lies in a model's folder: never opened, compiled or imported, and said so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chatserve.models.adapter import load_adapter
from chatserve.models.chat_template import load_template_sources
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.delta import apply_delta
from chatserve.models.device import choose_policy
from chatserve.models.encoder_network import load_encoder_network
from chatserve.models.loader import load_model
from chatserve.models.tokenizer import load_tokenizer
from tests import adapters, deltas, encoders, tiny

NAMES = ("configuration_evil", "tokenization_evil", "modeling_evil", "setup", "__init__", "torch")
_seen: list[tuple[str, str]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in ("open", "import", "compile", "exec"):
        _seen.append((event, str(arguments[:2])))


sys.addaudithook(_audit)  # cannot be removed, so it does nothing unless it is asked to


def plant(folder: Path, config: str = "config.json") -> None:
    """Code for each of the classes that transformers would look for, and names it might fall for.

    `config` is where it would be told of them.
    """
    for name in NAMES:
        marker = folder / f"ran-{name}"
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n", "utf-8")
    classes = {
        "AutoConfig": "configuration_evil.Config", "AutoTokenizer": ["tokenization_evil.T", None],
        "AutoModel": "modeling_evil.Model", "AutoModelForCausalLM": "modeling_evil.Model",
    }  # fmt: skip
    for name in (config, "tokenizer_config.json"):
        path = folder / name
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        known |= {"auto_map": classes, "trust_remote_code": True, "custom_pipelines": classes}
        path.write_text(json.dumps(known), "utf-8")


def use_native(folder: Path) -> None:
    tiny.save_model(folder)
    plant(folder)
    use_model(folder)


def use_fallback(folder: Path) -> None:
    tiny.save_model(folder, "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=512)
    plant(folder)
    use_model(folder)


def use_model(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        load_model(checkpoint, choose_policy("cpu", "float32"))
    load_tokenizer(folder)
    assert load_template_sources(folder)


def use_encoder(folder: Path) -> None:
    encoders.save_encoder(folder)
    plant(folder)
    checkpoint = open_checkpoint(folder, may_be_encoder=True)
    with closing(checkpoint.weights):
        load_encoder_network(checkpoint, choose_policy("cpu", "float32"))
    load_tokenizer(folder)


def use_delta(folder: Path) -> None:
    folder.rmdir()
    deltas.write_folder(folder, deltas.delta_tensors())
    plant(folder)
    base = deltas.write_folder(folder.parent / "base", deltas.base_tensors())
    plant(base)
    target = folder.parent / "target"
    apply_delta(base, folder, target)
    assert not list(target.glob("*.py"))
    assert "auto_map" not in (target / "config.json").read_text("utf-8")


def use_adapter(folder: Path) -> None:
    adapters.write(folder)
    plant(folder, "adapter_config.json")
    load_adapter(folder, ModelConfig.from_hf(tiny.sizes()))


USES = (use_native, use_fallback, use_encoder, use_delta, use_adapter)


@pytest.mark.parametrize("use", USES)
def test_code_in_a_folder_is_never_touched(
    use: Callable[[Path], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    global _seen
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    real_plant = plant

    def planted(place: Path, config: str = "config.json") -> None:
        global _seen
        real_plant(place, config)
        _seen = []  # what is written before does not count

    monkeypatch.setattr(sys.modules[__name__], "plant", planted)
    path = list(sys.path)
    try:
        use(folder)
        seen = _seen or []
    finally:
        _seen = None
    assert seen and not [
        each
        for each in seen
        if "evil" in each[1] or (str(tmp_path) in each[1] and ".py'" in each[1])
    ]
    assert not list(tmp_path.rglob("ran-*")) and sys.path == path
    assert not [name for name in sys.modules if "evil" in name]
    if use not in (use_adapter, use_delta):
        assert "auto_map ignored, chatserve never runs a model folder's code" in caplog.text


@pytest.mark.parametrize("names", [("config.json",), ("tokenizer_config.json",),
                                   ("config.json", "tokenizer_config.json")])  # fmt: skip
def test_a_folder_that_names_code_is_warned_of_once(
    names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.save_model(tmp_path)
    for name in names:
        path = tmp_path / name
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**content, "auto_map": {"AutoModel": "evil.M"}}), "utf-8")
    open_checkpoint(tmp_path).weights.close()
    load_tokenizer(tmp_path)
    assert caplog.text.count("auto_map ignored, chatserve never runs a model folder's code") == 1


def test_a_loader_that_trusts_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: what transformers does when it is told to."""
    global _seen
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "evil"}', "utf-8")
    plant(folder)
    _seen = []
    try:
        with pytest.raises(AttributeError, match="Config"):
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
        seen = _seen
    finally:
        _seen = None
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]
    assert (folder / "ran-configuration_evil").exists()
    assert {event for event, text in seen if "evil" in text} >= {"open", "exec"}
