"""Opening model folders: what is a whole model opens, everything else is one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatserve.errors import ModelLoadError
from chatserve.models.checkpoint import TensorInfo, looks_like_delta, open_checkpoint
from chatserve.models.manifest import dtype_name
from chatserve.models.weight_files import member
from tests.unit.models.gguf_bytes import model_tensors, write_model

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4}
TENSORS = {
    "model.embed_tokens.weight": torch.arange(32.0).reshape(8, 4),
    "model.layers.0.mlp.up_proj.weight": torch.ones(6, 4).half(),
    "model.norm.weight": torch.tensor([0.9, 1.1, 1.0, 1.2]),
}
NAMES = list(TENSORS)
SHARDS = {NAMES[0]: 1, NAMES[1]: 2, NAMES[2]: 2}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


def save_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def make_folder(folder: Path, layout: str) -> Path:
    """A model in one of the four layouts: `safetensors`, `bin`, each `single` or `sharded`."""
    kind, count = layout.split()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"temperature": 0.6})
    if count == "single":
        save_shard(folder / f"{stem}.{kind}", TENSORS)
        return folder
    weight_map = {name: f"{stem}-0000{SHARDS[name]}-of-00002.{kind}" for name in NAMES}
    for shard in set(weight_map.values()):
        save_shard(folder / shard, {n: TENSORS[n] for n in NAMES if weight_map[n] == shard})
    write_json(folder / f"{stem}.{kind}.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


LAYOUTS = ["safetensors single", "safetensors sharded", "bin single", "bin sharded"]


def refused(folder: Path, *reasons: str) -> str:
    with pytest.raises(ModelLoadError) as error:
        open_checkpoint(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    for reason in reasons:
        assert reason in message
    return message


def edit_index(folder: Path, **changes: str | None) -> None:
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    write_json(path, index)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_and_reads_back_equal(tmp_path: Path, layout: str) -> None:
    checkpoint = open_checkpoint(make_folder(tmp_path / "m", layout))
    with closing(checkpoint.weights) as weights:
        assert checkpoint.path == tmp_path / "m"
        assert checkpoint.config == CONFIG
        assert checkpoint.generation_config == {"temperature": 0.6}
        assert set(weights.tensors()) == set(NAMES)
        for name, tensor in TENSORS.items():
            info = TensorInfo(name, tuple(tensor.shape), dtype_name(tensor.dtype), tensor.nbytes)
            assert weights.tensors()[name] == info
            assert weights.read(name).equal(tensor)
            assert weights.read(name, range(1, 3)).equal(tensor[1:3])


@pytest.mark.parametrize("layout", ["safetensors sharded", "bin sharded"])
def test_shards_come_one_after_another(tmp_path: Path, layout: str) -> None:
    with closing(open_checkpoint(make_folder(tmp_path / "m", layout)).weights) as weights:
        assert [SHARDS[name] for name in weights.tensors()] == [1, 2, 2]


def test_safetensors_are_preferred_over_bin(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    open_checkpoint(folder).weights.close()


def test_no_generation_config_means_an_empty_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "bin single")
    (folder / "generation_config.json").unlink()
    checkpoint = open_checkpoint(folder)
    checkpoint.weights.close()
    assert checkpoint.generation_config == {}
    assert checkpoint.metadata is None


def test_a_gguf_file_opens_under_hugging_face_names(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.GGUF", "llama", model_tensors())
    checkpoint = open_checkpoint(path)
    with closing(checkpoint.weights) as weights:
        assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
        assert checkpoint.config["tie_word_embeddings"] is False
        assert checkpoint.metadata["general.architecture"] == "llama"
        assert weights.tensors()["model.layers.1.mlp.up_proj.weight"].shape == (12, 8)


def test_a_gguf_file_of_another_architecture_is_closed_again(tmp_path: Path) -> None:
    """Warnings are errors: a file left open would fail this test."""
    refused(write_model(tmp_path / "m.gguf", "mamba", {}), "mamba")


def test_missing_folder_and_wrong_kinds_of_path(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    folder = make_folder(tmp_path / "m", "safetensors single")
    refused(folder / "model.safetensors", "pass the folder")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe{", b"[" * 100_000, b""])
def test_bad_json_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    (folder / name).write_bytes(content)
    refused(folder, name)


def test_json_over_the_limit_is_not_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    os.truncate(folder / "config.json", (16 << 20) + 1)
    refused(folder, "the limit is")


def test_no_weights_says_what_was_wanted_and_found(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    (folder / "model.safetensors").rename(folder / "model.safetensors.part")
    refused(folder, "wanted model.safetensors", "model.safetensors.part")


@pytest.mark.parametrize("layout", ["safetensors sharded", "bin sharded"])
def test_shards_without_their_index(tmp_path: Path, layout: str) -> None:
    folder = make_folder(tmp_path / "m", layout)
    index = next(folder.glob("*.index.json"))
    index.unlink()
    refused(folder, "one of 2 shards", index.name)


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "m.Q4_0.gguf").touch()
    refused(tmp_path, str(tmp_path / "m.Q4_0.gguf"))


@pytest.mark.parametrize("layout", ["safetensors sharded", "bin sharded"])
def test_missing_and_truncated_shards_are_named(tmp_path: Path, layout: str) -> None:
    folder = make_folder(tmp_path / "m", layout)
    shard = next(folder.glob("*-00002-of-00002.*"))
    content = shard.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:size])
        refused(folder, shard.name)
    shard.unlink()
    refused(folder, f"{shard.name} is missing")


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors sharded")
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    edit_index(folder, **{"model.more.weight": first})
    refused(folder, f"puts 'model.more.weight' into {first}, it is nowhere")
    make_folder(folder, "safetensors sharded")
    edit_index(folder, **{NAMES[2]: first})
    refused(folder, f"it is {second}")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "bin sharded")
    torch.save(TENSORS, folder / "pytorch_model-00001-of-00002.bin")
    refused(folder, NAMES[1], "lies both in")


@pytest.mark.parametrize("value", [{}, [], None, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, value: Any) -> None:
    folder = make_folder(tmp_path / "m", "safetensors sharded")
    write_json(folder / "model.safetensors.index.json", value)
    refused(folder, "model.safetensors.index.json")


OUTSIDE = [
    *("../x.safetensors", "../../etc/x.safetensors", "/etc/x.safetensors", "a/x.safetensors"),
    *("./x.safetensors", "..\\x.safetensors", "C:x.safetensors", "x\0.safetensors"),
    *("x\n.safetensors", "\ud800.safetensors", "x" * 256 + ".safetensors", "//x.safetensors"),
    *("file:///x.safetensors", "x\u202e.safetensors"),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_shard_names_are_plain(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "m", "safetensors sharded")
    save_file(TENSORS, tmp_path / "x.safetensors")
    edit_index(folder, **{NAMES[0]: name})
    refused(folder, "not a plain file name")


@pytest.mark.parametrize("name", ["..", ".", "", "model.bin", 3, None, ["x.safetensors"]])
def test_shard_names_of_another_kind_are_refused(tmp_path: Path, name: Any) -> None:
    folder = make_folder(tmp_path / "m", "safetensors sharded")
    edit_index(folder, **{NAMES[0]: name})
    refused(folder, "not in a .safetensors file")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model-00001-of-00002.safetensors"]
)
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "m", "safetensors sharded")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    refused(folder, name, "link out of the folder")


def test_links_inside_the_folder_and_to_the_folder_are_fine(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to(folder)
    open_checkpoint(tmp_path / "alias").weights.close()


def hub_snapshot(cache: Path, *, shared: bool) -> Path:
    """The layout of the hub's cache: snapshots link to blobs, which may link to shared ones."""
    repository = cache / "models--org--m"
    snapshot = repository / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    make_folder(snapshot, "safetensors sharded")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = repository / "blobs" / str(number)
        path.rename(blob)
        path.symlink_to(f"../../blobs/{number}")
        if shared:
            target = cache / "blobs" / "00" / str(number)
            target.parent.mkdir(parents=True, exist_ok=True)
            blob.rename(target)
            blob.symlink_to(f"../../blobs/00/{number}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_cache_links_are_followed(tmp_path: Path, shared: bool) -> None:
    checkpoint = open_checkpoint(hub_snapshot(tmp_path / "hub", shared=shared))
    with closing(checkpoint.weights) as weights:
        assert weights.read(NAMES[0]).equal(TENSORS[NAMES[0]])


def test_the_hub_cache_links_lead_nowhere_else(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", shared=False)
    secret = tmp_path / "hub" / "token"
    secret.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../token")
    refused(snapshot, "link out of the folder")


@pytest.mark.skipif(sys.platform == "win32", reason="no fifos on Windows")
def test_fifos_folders_and_devices_are_not_opened(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    weights = folder / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    refused(folder, "not a regular file")
    weights.unlink()
    weights.mkdir()
    refused(folder, "not a regular file")
    weights.rmdir()
    weights.symlink_to("/dev/zero")
    refused(folder, "link out of the folder")


def test_an_unreadable_name_is_reported(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelLoadError, match="loop fails: "):
        member(tmp_path, "loop")


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    save_file({"lora_A.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    command = f"chatserve serve org/base --adapter {tmp_path}"
    refused(tmp_path, "LoRA adapter for 'org/base'", command)
    write_json(tmp_path / "config.json", CONFIG)
    refused(tmp_path, "LoRA adapter for 'org/base'", command)


def test_an_adapter_beside_a_value_head_is_no_model(tmp_path: Path) -> None:
    """StackLLaMA's RL adapter, with a config.json that somebody has put there."""
    base = "trl-lib/llama-se-merged"
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": base})
    write_json(tmp_path / "config.json", CONFIG)
    torch.save({"v_head.summary.weight": torch.zeros(1, 8)}, tmp_path / "pytorch_model.bin")
    refused(
        tmp_path, f"LoRA adapter for '{base}'",
        f"chatserve serve LLAMA-7B --adapter LLAMA-7B-SE-PEFT --adapter {tmp_path}",
    )  # fmt: skip


@pytest.mark.parametrize("base", [None, 7, "a b; rm", "x" * 500, ["a"]])
def test_an_adapters_command_repeats_only_names(tmp_path: Path, base: object) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": base})
    refused(tmp_path, f"chatserve serve BASE --adapter {tmp_path}")


def test_a_merged_model_may_keep_its_adapter_config(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "org/base"})
    open_checkpoint(folder).weights.close()


@pytest.mark.parametrize("layout", ["safetensors single", "bin single"])
def test_an_unmerged_delta_is_recognised_by_its_final_norm(tmp_path: Path, layout: str) -> None:
    folder = make_folder(tmp_path / "m", layout)
    weights = next(path for path in folder.iterdir() if path.suffix != ".json")
    save_shard(weights, {name: tensor * 0.01 for name, tensor in TENSORS.items()})
    refused(folder, "unmerged delta", "base model")


def test_a_merged_model_that_is_named_after_its_delta_opens(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "vicuna-7b-delta-v1.1", "safetensors single")
    write_json(folder / "config.json", CONFIG | {"_name_or_path": "lmsys/vicuna-7b-delta-v1.1"})
    open_checkpoint(folder).weights.close()


def test_models_whose_norms_are_offsets_are_no_deltas(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    save_file(TENSORS | {"model.norm.weight": torch.zeros(4)}, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG | {"model_type": "gemma"})
    with closing(open_checkpoint(folder).weights) as weights:
        assert looks_like_delta(weights)


def test_without_a_final_norm_nothing_is_said_about_deltas(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    save_file({"transformer.wte.weight": torch.zeros(4)}, folder / "model.safetensors")
    with closing(open_checkpoint(folder).weights) as weights:
        assert not looks_like_delta(weights)


def test_auto_map_is_ignored_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_folder(tmp_path / "m", "safetensors single")
    marker = tmp_path / "marker"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    write_json(folder / "config.json", CONFIG | {"auto_map": {"AutoModel": "modeling_evil.M"}})
    open_checkpoint(folder).weights.close()
    assert "auto_map ignored" in caplog.text
    assert not marker.exists()


MEASURE = """
import resource, sys, psutil, torch
from pathlib import Path
from chatserve.models.checkpoint import open_checkpoint
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
ballast, kept = [], []
while psutil.Process().memory_info().rss < peak():  # importing torch peaked higher than this
    ballast.append(torch.ones(1 << 18))
before = peak()
weights = open_checkpoint(Path(sys.argv[1])).weights
for name in weights.tensors():
    tensor = weights.read(name)
    if sys.argv[2] == "keep":
        kept.append(tensor)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module on Windows")
@pytest.mark.parametrize("layout", ["safetensors single", "bin single"])
def test_only_one_tensor_is_resident_at_a_time(tmp_path: Path, layout: str) -> None:
    """Ten tensors of 16 MB; two of them are there while a name is bound anew."""
    folder = make_folder(tmp_path / "m", layout)
    tensors = {f"t{n}": torch.zeros(4 << 20) for n in range(10)}
    save_shard(next(p for p in folder.iterdir() if p.suffix != ".json"), tensors)
    peaks = {}
    for mode in ("drop", "keep"):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, folder, mode],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        )  # fmt: skip
        peaks[mode] = int(run.stdout) / (16 << 20)
    assert peaks["drop"] < 2.5 and peaks["keep"] > 9
