"""Names and links that lead out of a folder: refused, and what lies outside is never opened."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chatserve.errors import ModelLoadError
from chatserve.models import weight_files
from chatserve.models.adapter import load_adapter
from chatserve.models.chat_template import load_template_sources
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.delta import apply_delta
from chatserve.models.tokenizer import load_tokenizer
from tests import adapters, deltas, tiny

_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_audit)  # cannot be removed, so it does nothing unless it is asked to


@contextmanager
def opened_files() -> Iterator[list[str]]:
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def use_model(folder: Path) -> None:
    with closing(open_checkpoint(folder).weights):
        load_tokenizer(folder)
        load_template_sources(folder)


def use_adapter(folder: Path) -> None:
    load_adapter(folder, ModelConfig.from_hf(tiny.sizes()))


def use_delta(folder: Path) -> None:
    base = deltas.write_folder(folder.parent / "base", deltas.base_tensors())
    apply_delta(base, folder, folder.parent / "target")


def model(folder: Path) -> None:
    tiny.save_model(folder, max_shard_size="100KB")
    (folder / "generation_config.json").write_text("{}", "utf-8")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{}", "utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")


def sentencepiece(folder: Path) -> None:
    model(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def old_adapter(folder: Path) -> None:
    adapters.write(folder, as_bin=True)


def delta(folder: Path) -> None:
    deltas.write_folder(folder, deltas.delta_tensors())
    (folder / "LICENSE").write_text("", "utf-8")


Build = Callable[[Path], Any]
FILES: dict[str, tuple[Build, Build]] = {
    "config.json": (model, use_model),
    "generation_config.json": (model, use_model),
    "model-00001-of-*.safetensors": (model, use_model),
    "model.safetensors.index.json": (model, use_model),
    "tokenizer.json": (model, use_model),
    "tokenizer.model": (sentencepiece, use_model),
    "tokenizer_config.json": (model, use_model),
    "special_tokens_map.json": (model, use_model),
    "added_tokens.json": (model, use_model),
    "chat_template.jinja": (model, use_model),
    "adapter_config.json": (adapters.write, use_adapter),
    "adapter_model.safetensors": (adapters.write, use_adapter),
    "adapter_model.bin": (old_adapter, use_adapter),
    "pytorch_model.bin": (delta, use_delta),
    "LICENSE": (delta, use_delta),
}


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def relative_link(path: Path, outside: Path) -> None:
    path.symlink_to(os.path.relpath(outside, path.parent))


def chain(path: Path, outside: Path) -> None:
    """Through a link that stays inside."""
    (path.parent / "inner").symlink_to(outside)
    path.symlink_to("inner")


def fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def itself(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def directory(path: Path, outside: Path) -> None:
    path.mkdir()


WAYS = (link, relative_link, chain, fifo, device, itself, directory)


@pytest.mark.skipif(sys.platform == "win32", reason="no links and fifos on Windows")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_files_that_lie_elsewhere_are_never_opened(
    name: str, way: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    build, use = FILES[name]
    folder, outside = tmp_path / "m", tmp_path / "outside"
    folder.mkdir()
    if build is delta:
        folder.rmdir()
    build(folder)
    [path] = folder.glob(name)
    path.rename(outside)
    way(path, outside)
    with opened_files() as opened, pytest.raises(ModelLoadError) as caught:
        use(folder)
    assert caught.value.exit_code == 3 and path.name in caught.value.message
    assert not {str(outside), str(path), "/dev/zero"} & set(opened)
    assert not (tmp_path / "target").exists()


SHARDS = (
    "../outside", "../../outside", "./outside", "a/../outside", "/{outside}", "\\outside",
    "..\\outside", "outside\0", "\0", "", ".", "..", "~", "~/outside", "C:outside", "file:outside",
    "outside\n", "outside ", "\u202eoutside", "%2e%2e/outside", "..%2foutside", "outside" * 50,
    "//outside", "/dev/zero", "/dev/stdin", "/proc/self/environ",
)  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="names of POSIX")
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("name", SHARDS)
def test_shards_of_other_folders_are_never_opened(name: str, suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    model(folder)
    outside = tmp_path / f"outside{suffix}"
    next(folder.glob("*.safetensors")).rename(outside)
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text("utf-8"))
    first = min(shards["weight_map"])
    shards["weight_map"][first] = name.replace("{outside}", str(tmp_path / "outside")) + suffix
    index.write_text(json.dumps(shards), "utf-8")
    with opened_files() as opened, pytest.raises(ModelLoadError) as caught:
        use_model(folder)
    assert caught.value.exit_code == 3 and "\n" not in caught.value.message
    assert all(Path(path).is_relative_to(folder) for path in opened if is_of_a_model(path))


def is_of_a_model(path: str) -> bool:
    """Not what Python reads for itself."""
    return not path.startswith((sys.prefix, sys.base_prefix)) and not path.endswith((".py", ".pyc"))


@pytest.mark.skipif(sys.platform == "win32", reason="no links on Windows")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "adapter_model.safetensors"])
def test_a_reader_that_follows_links_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teeth: with every root allowed the file outside is read as if it lay inside."""
    monkeypatch.setattr(weight_files, "_allowed_roots", lambda _: [Path("/")])
    build, use = FILES[name]
    folder, outside = tmp_path / "m", tmp_path / "outside"
    folder.mkdir()
    build(folder)
    (folder / name).rename(outside)
    link(folder / name, outside)
    with opened_files() as opened:
        use(folder)
    assert str(outside) in opened


@pytest.mark.skipif(sys.platform == "win32", reason="no links on Windows")
def test_the_hook_sees_what_is_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}", "utf-8")
    (tmp_path / "link").symlink_to("secret")
    with opened_files() as opened:
        (tmp_path / "link").read_bytes()
        os.close(os.open(tmp_path / "link", os.O_RDONLY))
    assert opened == [str(tmp_path / "secret")] * 2
