"""`chatserve apply-delta`: spellings, exit codes and what the user reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatserve.cli.main import main
from chatserve.models import safetensors_writer
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.manifest import MANIFEST_NAME
from chatserve.models.safetensors_writer import FolderWriter
from tests.deltas import VOCAB, base_tensors, delta_tensors, expected, write_folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The command sets it for its own process."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`base`, `delta` (v0) and `wrong`, a base with other weights, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("CHATSERVE_HOME", "CHATSERVE_CONFIG", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    write_folder(tmp_path / "base", base_tensors())
    write_folder(tmp_path / "wrong", base_tensors(9))
    write_folder(tmp_path / "delta", delta_tensors(vocab=VOCAB + 1))


def is_sum(folder: str) -> bool:
    got = load_file(f"{folder}/model.safetensors")
    wanted = expected(base_tensors(), delta_tensors(vocab=VOCAB + 1))
    return got.keys() == wanted.keys() and all(got[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        "base delta out",
        "base --force delta --offline out",
        "--base-model-path base --target-model-path out --delta-path delta",
        "--base base --target out --delta delta --low-cpu-mem",
        "--delta delta base out",
        "out --base=base --delta=delta --verify",
    ],
)
def test_every_spelling_writes_the_model(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["apply-delta", *arguments.split()]) == 0
    streams = capsys.readouterr()
    assert streams.out == "out\n"
    assert streams.err.startswith("writing out (0 MB)\n")
    assert ("verifying out" in streams.err) == ("--verify" in arguments)
    assert is_sum("out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "BASE is missing: chatserve apply-delta BASE DELTA TARGET"),
        ("base", "DELTA is missing"),
        ("base delta", "TARGET is missing"),
        ("base delta out more", "unexpected argument 'more'"),
        ("base delta out --forse", "unknown flag --forse; did you mean --force?"),
        ("base base out", "BASE and DELTA are both base"),
        ("base delta base --force", "base, which is read; name another"),
        ("base delta wrong", "wrong exists; name a new folder, or replace it with --force"),
        ("base delta home --force", "home holds no model (config.json), so it is not replaced"),
        ("--verify delta --base base", "TARGET is missing"),
        ("nonsense delta out", "unknown model 'nonsense'"),
    ],
)
def test_wrong_usage_exits_2(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").write_text("dear")
    assert main(["apply-delta", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("delta base out", "look swapped: chatserve apply-delta base delta TARGET"),
        ("base wrong out", "wrong: is a whole model, not delta weights"),
        ("./gone delta out", "gone: no such folder or file"),
        ("wrong delta out --recorded sum", "wrong: is not the base that the manifest was made"),
        ("base delta out --recorded delta", "chatserve-manifest.json is missing"),
        ("base delta out --recorded base/config.json", "is not a manifest of chatserve"),
        ("base --verify", "chatserve-manifest.json is missing"),
        ("delta --verify --recorded sum", "holds unmerged delta weights"),
        (
            "wrong --verify --recorded sum",
            "'model.embed_tokens.weight' is float16 (32, 16), the manifest",
        ),
    ],
)
def test_wrong_files_exit_3(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["apply-delta", "base", "delta", "sum"]) == 0
    capsys.readouterr()
    assert main(["apply-delta", *arguments.split()]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda path: Disk())
    assert main(["apply-delta", "base", "delta", "out"]) == 1
    assert "bytes, its disk has 5 free; free some space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Disk:
    free = 5


def test_verify_alone_finds_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["apply-delta", "base", "delta", "out"]) == 0
    assert main(["apply-delta", "out", "--verify"]) == 0
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["apply-delta", "--verify", "out"]) == 3
    assert "has the SHA-256" in capsys.readouterr().err


def test_verify_after_writing_reads_the_files_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that returns other bytes than it was given."""
    finish = FolderWriter.finish

    def finish_and_spoil(writer: FolderWriter) -> None:
        finish(writer)
        path = writer.target / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")

    monkeypatch.setattr(FolderWriter, "finish", finish_and_spoil)
    assert main(["apply-delta", "base", "delta", "out"]) == 0
    assert main(["apply-delta", "base", "delta", "other", "--verify"]) == 3
    assert "other: 'lm_head.weight' has the SHA-256" in capsys.readouterr().err


def test_a_recorded_manifest_may_be_anywhere(tmp_path: Path) -> None:
    assert main(["apply-delta", "base", "delta", "first"]) == 0
    Path("first", MANIFEST_NAME).rename(tmp_path / "published.json")
    arguments = ["base", "delta", "out", "--recorded", "published.json", "--verify"]
    assert main(["apply-delta", *arguments]) == 0
    assert main(["apply-delta", "first", "--verify", "--recorded", "published.json"]) == 0


def test_the_loader_takes_the_model_as_it_is(tmp_path: Path) -> None:
    assert main(["apply-delta", "base", "delta", "out"]) == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    with closing(checkpoint.weights):
        load_model(checkpoint, choose_policy("cpu", "float32", load_8bit=False))
