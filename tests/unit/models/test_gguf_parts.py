"""A GGUF model in several files: read as one; what is no whole model is refused by name.

The files are written by llama.cpp's own package.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatserve import hub
from chatserve.cli.commands import plan, template, template_check
from chatserve.config import served_names
from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.gguf_file import GGUFFile
from chatserve.models.gguf_parts import open_gguf
from chatserve.models.tokenizer import load_tokenizer
from chatserve.models.weights_summary import summarise
from tests.unit.models.gguf_bytes import (
    INT32,
    UINT16,
    gguf_bytes,
    key_value,
    model_tensors,
    string,
    tensor,
    u32,
    write_model,
)  # fmt: skip

NAMES = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
TENSORS = model_tensors()
PER_FILE = 8  # of 21


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, **keys: Any) -> list[Path]:
    folder.mkdir(exist_ok=True)
    found = TENSORS if tensors is None else tensors
    write_model(folder / "m.gguf", "llama", found, {**KEYS, **keys}, tensors_per_file=PER_FILE)
    return [folder / name for name in NAMES]


KEYS = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0],
    "tokenizer.ggml.token_type": [3, 3, 1, 1],
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return write(tmp_path / "split")


def refused(path: Path, *reasons: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        open_gguf(path)
    message = str(error.value)
    assert "\n" not in message
    for reason in reasons:
        assert reason in message


@pytest.mark.parametrize("which", ["first", "last", "folder"])
def test_it_is_the_model_in_one_file(parts: list[Path], tmp_path: Path, which: str) -> None:
    whole = write_model(tmp_path / "m.gguf", "llama", TENSORS, KEYS)
    given = {"first": parts[0], "last": parts[2], "folder": parts[0].parent}[which]
    path = hub.resolve_weights(str(given))
    assert path == parts[0]
    one, several = open_checkpoint(whole), open_checkpoint(path)
    with closing(one.weights), closing(several.weights):
        assert several.config == one.config and several.metadata == one.metadata
        assert several.weights.tensors() == one.weights.tensors()
        for name in one.weights.tensors():
            assert several.weights.read(name).equal(one.weights.read(name))
            assert several.weights.read(name, range(1, 3)).equal(
                one.weights.read(name, range(1, 3))
            )
    assert summarise(path) == summarise(whole)
    assert load_tokenizer(path).vocab_size == 4


def test_its_name_is_the_models(parts: list[Path]) -> None:
    assert served_names(str(parts[1])) == ("m",)


@pytest.mark.parametrize("is_folder", [False, True])
def test_commands_take_it(
    parts: list[Path], is_folder: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(parts[0].parent if is_folder else parts[1])
    assert plan.main([weights, "--memory", "8GB"]) == 0
    assert "fits" in capsys.readouterr().out
    assert template.main([weights]) == 0
    assert template_check.main([weights]) == 0
    assert "template" in capsys.readouterr().out


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(
        tmp_path / "m.gguf", "llama", split_max_tensors=1, small_first_shard=True
    )
    writer.add_tensor("a.weight", np.zeros((2, 2), np.float32))
    writer.add_tensor("b.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with closing(open_gguf(tmp_path / NAMES[0])) as model:
        assert list(model.tensors()) == ["a.weight", "b.weight"]
        assert model.read("b.weight").sum() == 4


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], gone: int) -> None:
    parts[gone].unlink()
    for given in (parts[gone - 1], parts[0].parent):
        refused(hub.find_local(str(given)), f"of which {NAMES[gone]} is not beside it")  # type: ignore[arg-type]


def test_all_missing_parts_are_named(parts: list[Path]) -> None:
    parts[0].unlink()
    parts[2].unlink()
    refused(parts[1], f"of which {NAMES[0]}, {NAMES[2]} are not beside it")


def test_a_part_under_the_name_of_a_whole_model(parts: list[Path], tmp_path: Path) -> None:
    path = shutil.copy(parts[1], tmp_path / "model.gguf")
    refused(path, "says part 2 of 3, its name says none", "NAME-00001-of-00003.gguf")


def test_parts_that_were_exchanged(parts: list[Path]) -> None:
    kept = parts[1].read_bytes()
    shutil.copy(parts[2], parts[1])
    refused(parts[0], NAMES[1], "says part 3 of 3, its name says part 2 of 3")
    refused(parts[1], "says part 3 of 3, its name says part 2 of 3")
    parts[1].write_bytes(kept)
    open_gguf(parts[0]).close()


def test_parts_of_another_count(parts: list[Path], tmp_path: Path) -> None:
    tensors = {name: TENSORS[name] for name in list(TENSORS)[:10]}
    write(tmp_path / "two", tensors)
    shutil.copy(tmp_path / "two" / "m-00002-of-00002.gguf", parts[1])
    refused(parts[0], NAMES[1], "says part 2 of 2, its name says part 2 of 3", "another model")


def test_a_part_of_a_model_of_other_sizes(parts: list[Path], tmp_path: Path) -> None:
    wider = {name: np.concatenate([each, each], -1) for name, each in TENSORS.items()}
    others = write(tmp_path / "wider", wider, embedding_length=16)
    shutil.copy(others[2], parts[2])
    refused(parts[0], NAMES[2], "has shape", "in the parts before it is", "another model")


def test_a_part_of_a_model_of_more_tensors(parts: list[Path], tmp_path: Path) -> None:
    more = {**TENSORS, "blk.2.attn_norm.weight": np.ones(8, np.float32)}
    others = write(tmp_path / "more", more)
    shutil.copy(others[2], parts[2])
    refused(parts[0], NAMES[2], "split.tensors.count is 22", "it is 21", "another model")


def write_part(path: Path, number: int, count: int, names: list[str], *extra: bytes) -> None:
    keys = [
        key_value("split.no", UINT16, number.to_bytes(2, "little")),
        key_value("split.count", UINT16, count.to_bytes(2, "little")),
    ]
    headers = [tensor(name, (4,), offset=32 * i) for i, name in enumerate(names)]
    path.write_bytes(gguf_bytes([*keys, *extra], headers, bytes(32 * len(names))))


def in_two(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    first, second = in_two(tmp_path)
    write_part(first, 0, 2, ["a", "b"])
    write_part(second, 1, 2, ["c", "b"])
    refused(first, "'b' lies both in", str(first), str(second))


def test_parts_that_hold_too_few_tensors(tmp_path: Path) -> None:
    first, second = in_two(tmp_path)
    total = key_value("split.tensors.count", INT32, u32(3))
    write_part(first, 0, 2, ["a"], total)
    write_part(second, 1, 2, ["b"], total)
    refused(first, "its 2 parts hold 2 tensors, its metadata says 3")


def test_a_part_that_names_another_model(tmp_path: Path) -> None:
    first, second = in_two(tmp_path)
    for path, number, name in ((first, 0, "one"), (second, 1, "other")):
        write_part(path, number, 2, [name], key_value("general.name", 8, string(name)))
    refused(first, f"{second}: general.name is 'other', in {first.name} it is 'one'")


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [(8, string("three"), "'three'"), (5, b"\xff\xff\xff\xff", "-1"), (5, u32(1 << 30), "1073741")],
)
def test_a_count_that_is_none(tmp_path: Path, kind: int, value: bytes, shown: str) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_bytes([key_value("split.count", kind, value)]))
    refused(path, f"split.count is {shown}", "not a number of files")


def test_a_number_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    count = key_value("split.count", UINT16, b"\x02\x00")
    path.write_bytes(gguf_bytes([key_value("split.no", 8, string("x")), count]))
    refused(path, "its metadata says part 'x' of 2, its name says part 1 of 2")


def test_a_folder_of_two_models_stays_a_folder(parts: list[Path]) -> None:
    folder = parts[0].parent
    (folder / "mmproj-f16.gguf").touch()  # a vision tower is no model of its own
    assert hub.find_local(str(folder)) == parts[0]
    write_model(folder / "other.gguf", "llama", TENSORS)
    assert hub.find_local(str(folder)) == folder
    with pytest.raises(ModelLoadError, match="pass one of them"):
        open_checkpoint(folder)


def test_weights_in_hugging_face_layout_come_first(parts: list[Path]) -> None:
    folder = parts[0].parent
    (folder / "model.safetensors.index.json").touch()
    assert hub.find_local(str(folder)) == folder


def test_what_does_not_fit_together_is_closed(
    parts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[GGUFFile] = []
    real = GGUFFile.open

    def spy(path: Path) -> GGUFFile:
        opened.append(real(path))
        return opened[-1]

    monkeypatch.setattr(GGUFFile, "open", spy)
    shutil.copy(parts[2], parts[1])
    refused(parts[0], NAMES[1])
    assert len(opened) == 3 and all(file._file.closed for file in opened)
