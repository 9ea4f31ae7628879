"""`chatserve plan`: the table, the JSON, what to do instead, and where it refuses."""

from __future__ import annotations

import json
import platform
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from chatserve.cli import main as cli
from chatserve.cli.commands.plan import main
from chatserve.errors import DoesNotFit, HubError, ModelLoadError, UsageError
from chatserve.kernels.library import KernelsUnavailable
from chatserve.models import form as forms_of_workers
from chatserve.models import hardware, memory
from chatserve.models.checkpoint import open_weights
from chatserve.models.planned_weights import plan_from_config
from tests import adapters, tiny
from tests.sparse import llama, write_sparse
from tests.unit.models.gguf_bytes import Q4_1, Q8_0, write_model
from tests.unit.test_layering import modules_after


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse(tmp_path_factory.mktemp("plan") / "vicuna-13b", llama("13B"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def planned(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, dict[str, Any]]:
    """The forms of the only place, by name."""
    assert main([*map(str, argv), "--json"]) == 0
    (place,) = json.loads(capsys.readouterr().out)["places"]
    return {form["form"]: form for form in place["forms"]}


def test_13b_on_a_16_gb_card_is_told_to_take_8_bits(
    vicuna: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--memory", "16GB", "--device", "cuda", "--context", "2048"]
    assert main([str(vicuna), *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "vicuna-13b: 1 sequence of 2,048 tokens",
        "",
        "16.0 GB of cuda memory",
        "  form    weights       KV  activations    slack     total",
        "  half    26.0 GB   1.7 GB       132 MB   801 MB   28.6 GB  does not fit, use --load-8bit",
        "  8-bit   13.2 GB   1.7 GB       132 MB   673 MB   15.7 GB  fits (--load-8bit)",
        "  4-bit    7.6 GB   1.7 GB       132 MB   617 MB   10.0 GB  fits (--load-4bit)",
    ]


def test_a_shorter_context_is_the_other_way_to_fit(
    vicuna: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = planned(capsys, vicuna, "--memory", "16GB", "--device", "cuda")
    assert forms["half"]["use"] == "use --load-4bit"
    prefix = "use --load-4bit or --context-length "
    assert forms["8-bit"]["use"].startswith(prefix)
    context = forms["8-bit"]["use"].removeprefix(prefix)
    assert 2048 < int(context) < 4096
    forms = planned(capsys, vicuna, "--memory", "16GB", "--device", "cuda", "--context", context)
    assert forms["8-bit"]["fits"]


def test_json_has_the_parts_and_their_sum(vicuna: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms = planned(capsys, vicuna, "--memory", "32GB", "--context-length", "2048",
                    "--max-num-seqs", "2")  # fmt: skip
    assert list(forms) == ["half", "8-bit", "4-bit"]
    for form in forms.values():
        parts = ("weights_bytes", "kv_bytes", "activation_bytes", "slack_bytes")
        assert form["total_bytes"] == sum(form[part] for part in parts)
        assert (form["context"], form["concurrency"]) == (2048, 2)
        assert form["kv_bytes"] == 2 * 2048 * form["kv_bytes_per_token"]
    assert forms["8-bit"]["flags"] == "--load-8bit" and forms["8-bit"]["held_as"] == "int8"
    assert forms["half"]["fits"] and forms["half"]["use"] is None


def test_what_fits_nowhere_exits_4_and_names_the_context_that_would(
    vicuna: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(vicuna), "--memory", "9.5GB,8GB", "--concurrency", "2"]
    assert cli.main(["plan", *argv]) == 4
    out, err = capsys.readouterr()
    assert out.count("does not fit, use --load-4bit --context-length") == 3
    # a processor without bfloat16 keeps the table of tokens in float32
    least = re.findall(r"does not fit, use a smaller model or (15\.[03] GB) of memory", out)
    assert len(least) == 3 and len(set(least)) == 1
    assert err.startswith(f"chatserve: vicuna-13b does not fit: 4-bit needs {least[0]} ")
    assert "for 2 x 4,096 tokens, there are 9.5 GB; use --load-4bit --context-length " in err
    assert err.count("\n") == 1
    context = err.split()[-1]
    assert main([str(vicuna), "--memory", "9.5GB", "--concurrency", "2", "--context", context]) == 0
    longer = str(int(context) + 64)
    with pytest.raises(DoesNotFit):
        main([str(vicuna), "--memory", "9.5GB", "--concurrency", "2", "--context", longer])


def test_the_devices_here_are_asked_what_they_have_free(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 5_500_000_000)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 5_500_000_000)
    assert main([str(folder), "--device", "cpu"]) == 0
    assert "\ncpu, 5.5 GB free\n" in capsys.readouterr().out
    monkeypatch.setattr(hardware, "_GPU_DRIVERS", (folder,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "free" in line] == [
        "cuda:0, 5.5 GB free", "cuda:1, 5.5 GB free", "cpu, 5.5 GB free",
    ]  # fmt: skip


def test_a_device_that_is_not_here_needs_a_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"no cuda device is here; .* --memory 16GB"):
        main([str(folder), "--device", "cuda"])


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("16GB", 16 * 10**9), ("24GiB", 24 << 30), ("1.5 gb", 1_500_000_000), ("900m", 900_000_000),
     ("2000000000", 2 * 10**9)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(
    text: str, num_bytes: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "--memory", text, "--json"]) == 0
    (place,) = json.loads(capsys.readouterr().out)["places"]
    assert place["memory_bytes"] == num_bytes


@pytest.mark.parametrize("text", ["0", "16XB", "-1GB", "nan", "1e9", "9" * 16, "9999999T", "GB"])
def test_what_is_no_size_is_refused(text: str, folder: Path) -> None:
    with pytest.raises(UsageError, match="no size of memory; write it as 16GB"):
        main([str(folder), f"--memory={text}"])


@pytest.mark.parametrize(("kind", "form"), [(Q8_0, "int8/32"), (Q4_1, "int4/32+min")])
def test_a_compressed_file_is_planned_as_a_worker_would_hold_it(
    kind: int, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_llama_gguf(tmp_path / "model.gguf", kind)
    forms = planned(capsys, path, "--device", "cpu", "--memory", "1GB")
    assert list(forms) == ["file", "half", "8-bit", "4-bit"]
    assert (forms["file"]["flags"], forms["file"]["held_as"]) == ("", form)
    assert forms["half"]["flags"] == "--dtype bfloat16"


def write_llama_gguf(path: Path, kind: int) -> Path:
    import gguf
    import numpy as np

    hf = tiny.build_hf_model()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors: dict[str, np.ndarray] = {}
    for name, weight in hf.state_dict().items():
        values = weight.numpy()
        if values.ndim == 2:
            values = gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind))
        tensors[names.get_name(name, (".weight",))] = values
    keys = {
        "block_count": 2, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }  # fmt: skip
    return write_model(path, "llama", tensors, keys, kind=kind)


def test_half_precision_is_named_where_it_is_not_the_default(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = (folder, "--device", "cpu", "--memory", "1GB")
    monkeypatch.setattr(forms_of_workers, "multiplies_bfloat16", lambda: True)
    assert planned(capsys, *argv)["half"]["flags"] == ""
    monkeypatch.setattr(forms_of_workers, "multiplies_bfloat16", lambda: False)
    half = planned(capsys, *argv)["half"]
    assert (half["flags"], half["held_as"]) == ("--dtype bfloat16", "bfloat16")


def test_forms_that_a_worker_refuses_are_refused_with_its_words(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = ("--memory", "2GB")
    forms = planned(capsys, folder, *size, "--device", "mps")
    assert forms["4-bit"] == {
        "form": "4-bit", "flags": "--load-4bit", "fits": False,
        "reason": "there is no product in 4 bits on mps", "held_as": "int4/32",
    }  # fmt: skip
    tiny.save_model(tmp_path / "neox", "gpt_neox")
    forms = planned(capsys, tmp_path / "neox", *size, "--device", "cpu")
    assert forms["4-bit"]["reason"] == "only the Llama family's weights are packed in 4 bits"
    tiny.save_model(tmp_path / "odd", hidden_size=72, head_dim=16)
    forms = planned(capsys, tmp_path / "odd", *size, "--device", "cpu")
    assert "come in groups of 32" in forms["4-bit"]["reason"] and forms["8-bit"]["fits"]

    def unavailable() -> None:
        raise KernelsUnavailable("not built")

    monkeypatch.setattr(forms_of_workers, "load_kernels", unavailable)
    assert main([str(folder), *size, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "4-bit   4-bit weights need the CPU kernels, but not built" in out and "int4" not in out
    forms = planned(capsys, folder, *size, "--device", "cpu")
    assert forms["4-bit"]["held_as"] == "int4/32+min/8"


@pytest.mark.parametrize("options", [[], ["--device", "cuda", "--memory", "24GB"]])
def test_headers_are_planned_without_pytorch(options: list[str], vicuna: Path) -> None:
    """Its import alone takes over a second."""
    if not options and hardware.gpu_kinds():
        pytest.skip("a GPU's free memory is PyTorch's to tell")
    argv = ["plan", str(vicuna), *options]
    loaded = modules_after(f"from chatserve.cli.main import main\nassert main({argv}) in (0, 4)")
    assert "chatserve.models.memory_plan" in loaded
    assert not loaded & {"torch", "transformers", "numpy"}


def test_a_compressed_file_is_planned_without_pytorch(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "model.gguf", Q8_0)
    loaded = modules_after(f"from chatserve.cli.main import main\nmain(['plan', {str(path)!r}])")
    assert "chatserve.models.memory_plan" in loaded
    assert not loaded & {"torch", "transformers"}


def test_the_processor_is_asked_as_pytorch_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    expected = torch.cpu._is_avx512_bf16_supported() or capability == "SVE256"
    assert hardware.multiplies_bfloat16() == expected
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert hardware.multiplies_bfloat16() == expected  # by PyTorch's own word


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx512f avx512_bf16 amx", True), ("fpu avx512f", False)]
)
def test_the_processors_flags_tell_of_bfloat16(
    flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
    monkeypatch.setattr(hardware, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    assert hardware.multiplies_bfloat16() is expected


def only_config(folder: Path, target: Path, *more: str) -> Path:
    target.mkdir()
    for name in ("config.json", *more):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("more", [(), ("model.safetensors.index.json",)])
def test_a_folder_without_weights_is_planned_from_its_config(
    vicuna: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    """The same to the byte as with the weights, and it says where the figures are from."""
    options = ["--memory", "16GB", "--device", "cpu", "--context", "2048"]
    config = only_config(vicuna, tmp_path / "vicuna-13b", *more)
    assert planned(capsys, config, *options) == planned(capsys, vicuna, *options)
    assert main([str(config), *options]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nno weights here yet: sizes are worked out from config.json\n")
    assert main([str(vicuna), *options]) == 0
    assert out.startswith(capsys.readouterr().out)
    for path, expected in ((config, True), (vicuna, False)):
        assert main([str(path), *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["is_computed_from_config"] is expected


def test_half_a_download_is_not_planned_as_if_nothing_were_there(
    vicuna: Path, tmp_path: Path
) -> None:
    index = "model.safetensors.index.json"
    config = only_config(vicuna, tmp_path / "m", index)
    (config / "model-00001-of-00003.safetensors").touch()
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00003\.safetensors is missing"):
        main([str(config)])


def test_sizes_of_other_families_do_not_follow_from_their_config(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "neox", "gpt_neox")
    config = only_config(tmp_path / "neox", tmp_path / "m")
    with pytest.raises(ModelLoadError, match="only for the Llama family; download the weights"):
        main([str(config)])
    (config / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelLoadError, match=r"m: .*num_attention_heads"):
        main([str(config)])


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {}),
    ],
)
def test_planned_tensors_are_those_of_transformers(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    tiny.save_model(tmp_path / "whole", model_type, **changes)
    checkpoint = plan_from_config(only_config(tmp_path / "whole", tmp_path / "config"))
    with closing(open_weights(tmp_path / "whole")) as weights:
        expected = {name: info.shape for name, info in weights.tensors().items()}
    found = checkpoint.weights.tensors()
    assert {name: info.shape for name, info in found.items()} == expected
    with pytest.raises(ModelLoadError, match="not here yet"):
        checkpoint.weights.read("lm_head.weight")


def test_several_gpus_share_a_model_and_say_which_layers(
    vicuna: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(vicuna), "--memory", "16GB", "--num-gpus", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "16.0 GB + 16.0 GB of cuda memory"
    assert lines[4].endswith("30.4 GB  fits")
    assert lines[5] == (
        "         cuda:0 layers 0-19, cuda:1 layers 20-39; weights cuda:0 13.0 GB, cuda:1 13.0 GB"
    )
    forms = planned(capsys, vicuna, "--memory", "20GB,12.5GB", "--num-gpus", "2")
    assert forms["half"]["device_map"] == "cuda:0 layers 0-24, cuda:1 layers 25-39"
    held = forms["half"]["device_bytes"]
    assert sum(held.values()) == forms["half"]["weights_bytes"] and held["cuda:1"] < 12.5e9
    argv = (vicuna, "--memory", "16GB", "--num-gpus", "2", "--max-gpu-memory", "12GB")
    assert not planned(capsys, *argv)["half"]["fits"]


def test_offloading_counts_this_machines_memory(
    vicuna: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 20_000_000_000)
    argv = (vicuna, "--memory", "10GB", "--cpu-offloading")
    forms = planned(capsys, *argv)
    assert forms["half"]["use"] == "use --load-8bit"
    assert forms["8-bit"]["device_map"].startswith("cuda:0 layers 0-")
    assert forms["8-bit"]["device_map"].endswith("-39") and ", cpu " in forms["8-bit"]["device_map"]
    assert main([*map(str, argv)]) == 0
    assert "10.0 GB of cuda memory, 20.0 GB of main memory free" in capsys.readouterr().out
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 1)
    with pytest.raises(DoesNotFit, match="use more GPUs or a smaller model"):
        main([*map(str, argv)])
    with pytest.raises(DoesNotFit, match="use --cpu-offloading, more GPUs or a smaller model"):
        main([str(vicuna), "--memory", "5GB", "--num-gpus", "2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-gpus", "2"), "2 CUDA devices are wanted and 0 are known; say how much each has"),
        (("--num-gpus", "3", "--memory", "8GB,9GB"), "3 CUDA devices are wanted and 2 are known"),
        (("--cpu-offloading", "--device", "cpu"), "--device cpu: models are spread over CUDA"),
        (("--memory", "8GB", "--max-gpu-memory", "x"), "--max-gpu-memory 'x' is no size of memory"),
    ],
)
def test_spreading_over_what_nobody_knows_is_refused(
    options: tuple[str, ...], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpu_kinds", list)
    with pytest.raises(UsageError, match=message):
        main([str(folder), *options])


def test_the_gpus_here_are_asked_before_a_model_is_spread_over_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpu_kinds", lambda: ["cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 6_000_000_000)
    assert main([str(folder), "--num-gpus", "2"]) == 0
    assert "\n6.0 GB + 6.0 GB of cuda memory\n" in capsys.readouterr().out


def test_other_families_are_not_spread(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "neox", "gpt_neox")
    with pytest.raises(UsageError, match="only the Llama family's networks are spread"):
        main([str(tmp_path / "neox"), "--memory", "8GB", "--num-gpus", "2"])


def test_adapters_beside_the_base_are_counted_and_merged_ones_are_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of q and v in two layers: rank 4, 64 columns, 64 and 32 rows."""
    sql = adapters.write(tmp_path / "sql")
    num_values = 2 * 4 * (64 + 64 + 64 + 32)
    argv = (folder, "--device", "cpu", "--memory", "1GB", "--adapter", f"sql={sql}",
            "--adapter", f"again={sql}", "--adapter", sql)  # fmt: skip
    forms, plain = planned(capsys, *argv), planned(capsys, *argv[:5])
    for name in ("half", "8-bit", "4-bit"):
        assert forms[name]["adapter_bytes"] == 2 * 2 * num_values
        assert plain[name]["adapter_bytes"] == 0
        assert forms[name]["total_bytes"] == plain[name]["total_bytes"] + 4 * num_values


@pytest.mark.parametrize("prefix", ["", "sql="])
def test_adapters_that_do_not_fit_are_refused(prefix: str, folder: Path, tmp_path: Path) -> None:
    wide = {"model.layers.0.self_attn.q_proj": (64, 128)}
    other = adapters.write(tmp_path / "other", adapters.random_pairs(wide))
    with pytest.raises(ModelLoadError, match="belongs to another base"):
        main([str(folder), "--adapter", f"{prefix}{other}"])
    tiny.save_model(tmp_path / "neox", "gpt_neox")
    with pytest.raises(UsageError, match="only the Llama family's networks take adapters"):
        main([str(tmp_path / "neox"), "--adapter", f"{prefix}{other}"])


def test_adapters_are_counted_without_pytorch(folder: Path, tmp_path: Path) -> None:
    sql = adapters.write(tmp_path / "sql")
    argv = ["plan", str(folder), "--adapter", f"sql={sql}"]
    loaded = modules_after(f"from chatserve.cli.main import main\nassert main({argv}) == 0")
    assert "chatserve.models.adapter" in loaded
    assert not loaded & {"torch", "transformers", "numpy"} or hardware.gpu_kinds()


def test_it_never_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path))
    cases = {
        "some-org/some-model": "`chatserve pull some-org/some-model`",
        "tinyllama": "`chatserve pull TinyLlama/TinyLlama-1.1B-Chat-v1.0`",
        "smollm2-135m": "`chatserve pull smollm2-135m`",
    }
    for name, command in cases.items():
        with pytest.raises(HubError) as error:
            main([name])
        assert f"{name} is not in the cache" in str(error.value)
        assert command in str(error.value) and "off" not in str(error.value)


def test_missing_files_are_found(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        main([str(tmp_path / "nothing")])
