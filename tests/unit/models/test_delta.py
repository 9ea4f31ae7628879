"""Base plus delta: bit-equal to float16 arithmetic in every layout, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models import manifest as manifests
from chatserve.models.checkpoint import open_checkpoint, open_weights
from chatserve.models.delta import apply_delta
from chatserve.models.manifest import MANIFEST_NAME, Manifest, read_manifest, verify
from tests.deltas import (
    HIDDEN,
    LAYERS,
    VOCAB,
    Tensors,
    base_tensors,
    delta_tensors,
    expected,
    with_rotary,
    write_folder,
)

FORMS = ["bin", "bin-shards", "safetensors", "safetensors-shards"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "llama", with_rotary(base_tensors()))


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    """As v1.1."""
    return write_folder(tmp_path / "delta", with_rotary(delta_tensors()))


def result(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def assert_bits(got: Tensors, wanted: Tensors) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == torch.float16 and got[name].shape == tensor.shape
        assert got[name].view(torch.int16).equal(tensor.view(torch.int16)), name


@pytest.mark.parametrize("vocab", [VOCAB, VOCAB + 1], ids=["v1.1", "v0"])
@pytest.mark.parametrize("form", FORMS)
def test_the_sum_is_bit_equal_to_float16_arithmetic(form: str, vocab: int, tmp_path: Path) -> None:
    ours, theirs = base_tensors(), delta_tensors(vocab=vocab)
    theirs["lm_head.weight"][-1, 0] = -0.0  # 0 + -0 is +0
    write_folder(tmp_path / "b", with_rotary(ours), form=FORMS[FORMS.index(form) - 1])
    write_folder(tmp_path / "d", with_rotary(theirs), form=form, vocab_size=vocab)
    apply_delta(tmp_path / "b", tmp_path / "d", tmp_path / "m")
    assert_bits(result(tmp_path / "m"), expected(ours, theirs))


@pytest.mark.parametrize("rows", [1, 2, 5, 31])
def test_any_cut_into_parts_gives_the_same_bits(
    rows: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v0's zero row alone in a part, at the end of one, and with the base's last rows."""
    theirs = delta_tensors(vocab=VOCAB + 1)
    write_folder(tmp_path / "d", theirs)
    monkeypatch.setattr(manifests, "MAX_PART_BYTES", rows * 2 * HIDDEN)
    apply_delta(base, tmp_path / "d", tmp_path / "m")
    assert_bits(result(tmp_path / "m"), expected(base_tensors(), theirs))
    check(tmp_path / "m", read_manifest(tmp_path / "m"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_of_another_dtype_is_cast_first(
    dtype: torch.dtype, delta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(5)
    ours = {
        name: (tensor + 1e-5 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in base_tensors().items()
    }
    write_folder(tmp_path / "b", ours)
    apply_delta(tmp_path / "b", delta, tmp_path / "m")
    assert_bits(result(tmp_path / "m"), expected(ours, delta_tensors()))
    assert ("is bfloat16" in caplog.text) == (dtype == torch.bfloat16)


def test_subnormal_sums_keep_their_bits(tmp_path: Path) -> None:
    ours, theirs = base_tensors(), delta_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    ours[name] = (torch.arange(-192.0, 192).reshape(24, 16) * 6e-8).half()
    theirs[name] = (torch.arange(384.0).reshape(24, 16) * 1.3e-7).half()
    write_folder(tmp_path / "b", ours)
    write_folder(tmp_path / "d", theirs)
    apply_delta(tmp_path / "b", tmp_path / "d", tmp_path / "m")
    assert_bits(result(tmp_path / "m"), expected(ours, theirs))


def test_tokenizer_and_config_come_from_the_delta(base: Path, tmp_path: Path) -> None:
    write_folder(
        tmp_path / "d", delta_tensors(vocab=VOCAB + 1),
        auto_map={"AutoModel": "evil.M"}, torch_dtype="float32", rms_norm_eps=1e-5,
    )  # fmt: skip
    (tmp_path / "d/evil.py").write_text("")
    (tmp_path / "d/generation_config.json").write_text("{}")
    apply_delta(base, tmp_path / "d", tmp_path / "m")
    assert (tmp_path / "m/tokenizer.model").read_bytes() == b"pieces of d"
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        MANIFEST_NAME, "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    checkpoint = open_checkpoint(tmp_path / "m")
    checkpoint.weights.close()
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert checkpoint.config["vocab_size"] == VOCAB + 1  # whatever the delta's config said
    assert checkpoint.config["torch_dtype"] == "float16"
    assert "auto_map" not in checkpoint.config
    assert checkpoint.config["applied_delta"] == "d"


def test_no_delta_is_added_twice(base: Path, tmp_path: Path) -> None:
    """Neither v1.1, which keeps all shapes, nor v0, whose row is there already."""
    for rows in (VOCAB, VOCAB + 1):
        delta = write_folder(tmp_path / f"delta-{rows}", delta_tensors(vocab=rows))
        made = tmp_path / f"made-{rows}"
        apply_delta(base, delta, made)
        refused(f"was made with the delta 'delta-{rows}'", made, delta, tmp_path / "again")


def test_progress_ends_with_everything(base: Path, delta: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    apply_delta(base, delta, tmp_path / "m", progress=lambda *counts: seen.append(counts))
    total = sum(tensor.nbytes for tensor in result(tmp_path / "m").values())
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert len(seen) == 3 + 9 * LAYERS


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


def changed(tensors: Tensors, name: str, change: Callable[[torch.Tensor], Any]) -> Tensors:
    return tensors | {name: change(tensors[name].clone())}


def infinite(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1, 3] = float("inf")
    return tensor


UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"
BASES: dict[str, tuple[Tensors, str]] = {
    "another size": (
        base_tensors(hidden=24), r"'model.embed_tokens.weight' is \(32, 24\), .* it is \(32, 16\)",
    ),
    "fewer layers": (base_tensors(layers=1), "has 1 layers, the delta .* has 2: .* another size"),
    "extended already": (
        base_tensors(vocab=VOCAB + 1), "has 33 rows, in the delta .* 32: BASE was extended already",
    ),
    "a tensor is missing": (without(base_tensors(), UP), f"llama: has no '{UP}', which .*delta"),
    "no final norm": (
        without(base_tensors(), "model.norm.weight"), "llama: has no 'model.norm.weight', which",
    ),
    "a tensor too many": (base_tensors() | {"x": torch.ones(2)}, "delta: has no 'x', which"),
    "a delta": (delta_tensors(7), "llama: holds delta weights itself"),
    "quantised": (
        changed(base_tensors(), UP, lambda tensor: tensor.to(torch.int8)),
        f"'{UP}' is int8; deltas are added to float16",
    ),
    "empty": (
        changed(base_tensors(), UP, lambda tensor: tensor[:0]), r"has the shape \(0, 16\)",
    ),
    "a scalar": (
        changed(base_tensors(), "model.layers.0.input_layernorm.weight", lambda t: t[0]),
        r"has the shape \(\), which is empty",
    ),
    "not finite": (
        changed(base_tensors(), UP, infinite), f"'{UP}' has values that are not finite.* rows 0 to"
    ),
    "too large for float16": (
        changed(base_tensors(), UP, lambda tensor: tensor.float() + 1e5), "not finite in float16"
    ),
}  # fmt: skip
DELTAS: dict[str, tuple[Tensors, str]] = {
    "a whole model": (base_tensors(7), "delta: is a whole model, not delta weights"),
    "two rows": (delta_tensors(vocab=VOCAB + 2), "has 34 rows, 2 more than .*llama; only Vicuna"),
    "one row in one": (
        changed(delta_tensors(), HEAD, lambda tensor: torch.cat([tensor, tensor[:1]])),
        "delta: appends rows to only one of embedding and head",
    ),
    "another family": (
        changed(delta_tensors(), UP, lambda tensor: tensor.T.contiguous()), "another size or family"
    ),
    "8-bit floats": (
        changed(delta_tensors(), UP, lambda tensor: tensor.to(torch.float8_e4m3fn)), "float8_e4m3fn"
    ),
}  # fmt: skip


def refused(message: str, base: Path, delta: Path, target: Path, **options: Any) -> None:
    """By name, and nothing is left beside the two."""
    before = sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(ModelLoadError, match=message):
        apply_delta(base, delta, target, **options)
    assert sorted(path.name for path in target.parent.iterdir()) == before


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_does_not_fit_is_refused_by_name(
    case: str, delta: Path, tmp_path: Path
) -> None:
    tensors, message = BASES[case]
    form = "safetensors" if case in ("empty", "quantised") else "bin"
    refused(message, write_folder(tmp_path / "llama", tensors, form=form), delta, tmp_path / "m")


@pytest.mark.parametrize("case", DELTAS)
def test_a_delta_that_does_not_fit_is_refused_by_name(
    case: str, base: Path, tmp_path: Path
) -> None:
    tensors, message = DELTAS[case]
    form = "safetensors" if case == "8-bit floats" else "bin"
    refused(message, base, write_folder(tmp_path / "delta", tensors, form=form), tmp_path / "m")


def test_large_finite_weights_are_added(delta: Path, tmp_path: Path) -> None:
    """Their sum overflows float16 although none of them does."""
    ours = changed(base_tensors(), UP, lambda tensor: tensor * 0 + 6e4)
    write_folder(tmp_path / "b", ours)
    apply_delta(tmp_path / "b", delta, tmp_path / "m")
    assert_bits(result(tmp_path / "m"), expected(ours, delta_tensors()))


def test_base_and_delta_swapped_say_the_right_command(
    base: Path, delta: Path, tmp_path: Path
) -> None:
    refused(
        f"look swapped: chatserve apply-delta {base} {delta} TARGET", delta, base, tmp_path / "m"
    )


def test_base_and_delta_the_same_folder(delta: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(delta)
    with pytest.raises(UsageError, match=r"BASE and DELTA are both .*alias"):
        apply_delta(tmp_path / "alias", delta, tmp_path / "m")


@pytest.mark.parametrize("force", [False, True])
def test_the_target_may_not_be_what_is_read(force: bool, base: Path, delta: Path) -> None:
    for target in (base, delta):
        with pytest.raises(UsageError, match="which is read; name another"):
            apply_delta(base, delta, target, force=force)
    assert (delta / "pytorch_model.bin").exists()


def test_places_that_hold_no_weights(base: Path, delta: Path, tmp_path: Path) -> None:
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    (tmp_path / "nothing").mkdir()
    refused("file.gguf: is a file; BASE is a folder", tmp_path / "file.gguf", delta, tmp_path / "m")
    refused("gone: does not exist; DELTA is a folder", base, tmp_path / "gone", tmp_path / "m")
    refused("nothing: no weights found", base, tmp_path / "nothing", tmp_path / "m")


def test_an_adapter_is_no_delta(base: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"base_model_name_or_path": "llama"}')
    refused("lora: is a LoRA adapter", base, tmp_path / "lora", tmp_path / "m")


def test_a_delta_without_tokenizer(base: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "d", delta_tensors(), tokenizer=False)
    message = r"d: has no tokenizer \(tokenizer.model or tokenizer.json\)"
    refused(message, base, tmp_path / "d", tmp_path / "m")


def test_a_delta_without_config(base: Path, delta: Path, tmp_path: Path) -> None:
    (delta / "config.json").unlink()
    refused("config.json is missing", base, delta, tmp_path / "m")


def test_files_that_lead_out_of_the_delta_are_not_copied(
    base: Path, delta: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (delta / "added_tokens.json").symlink_to(tmp_path / "secret")
    refused("added_tokens.json is a link out of the folder", base, delta, tmp_path / "m")


def test_half_a_download(base: Path, tmp_path: Path) -> None:
    delta = write_folder(tmp_path / "d", delta_tensors(), form="bin-shards")
    shard = delta / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:1000])
    refused("pytorch_model-00002-of-00002.bin: truncated", base, delta, tmp_path / "m")
    shard.unlink()
    refused("pytorch_model-00002-of-00002.bin is missing", base, delta, tmp_path / "m")


def check(folder: Path, manifest: Manifest) -> None:
    with closing(open_weights(folder)) as weights:
        verify(folder, weights, manifest)


def test_the_manifest_names_every_tensor(base: Path, delta: Path, tmp_path: Path) -> None:
    manifest = apply_delta(base, delta, tmp_path / "m")
    assert read_manifest(tmp_path / "m") == manifest
    assert read_manifest(tmp_path / "m" / MANIFEST_NAME) == manifest
    assert manifest.tensors.keys() == base_tensors().keys()
    assert (manifest.base, manifest.delta) == ("llama", "delta")
    check(tmp_path / "m", manifest)


def test_the_same_inputs_in_other_files_have_the_same_manifest(
    base: Path, delta: Path, tmp_path: Path
) -> None:
    """So a manifest that one user publishes is of use to others."""
    first = apply_delta(base, delta, tmp_path / "m")
    floats = {name: tensor.float() for name, tensor in base_tensors().items()}
    other_base = write_folder(tmp_path / "2/llama", floats, form="safetensors-shards")
    other_delta = write_folder(tmp_path / "2/delta", delta_tensors(), form="safetensors")
    assert apply_delta(other_base, other_delta, tmp_path / "n", recorded=first) == first


def test_one_flipped_bit_is_found(base: Path, delta: Path, tmp_path: Path) -> None:
    manifest = apply_delta(base, delta, tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last tensor of the delta's file
    path.write_bytes(data)
    last = list(manifest.tensors)[-1]
    with pytest.raises(ModelLoadError, match=f"'{last}' has the SHA-256 .*, the manifest says"):
        check(tmp_path / "m", manifest)


def test_verify_wants_the_same_tensors(base: Path, delta: Path, tmp_path: Path) -> None:
    manifest = apply_delta(base, delta, tmp_path / "m")
    fewer = Manifest("", "", {k: v for k, v in manifest.tensors.items() if k != UP})
    with pytest.raises(ModelLoadError, match=f"'{UP}' is missing in the manifest"):
        check(tmp_path / "m", fewer)
    more = Manifest("", "", dict(manifest.tensors) | {"x": manifest.tensors[UP]})
    with pytest.raises(ModelLoadError, match="'x' is missing in the weights"):
        check(tmp_path / "m", more)
    other = Manifest("", "", dict(manifest.tensors) | {UP: manifest.tensors[HEAD]})
    with pytest.raises(ModelLoadError, match=r"is float16 \(24, 16\), the manifest says .*32, 16"):
        check(tmp_path / "m", other)


def test_another_base_is_named_before_anything_is_written(
    base: Path, delta: Path, tmp_path: Path
) -> None:
    """Right shapes, wrong weights: LLaMA 2 instead of LLaMA, say."""
    manifest = apply_delta(base, delta, tmp_path / "m")
    wrong = write_folder(tmp_path / "llama-2", base_tensors(9))
    message = (
        r"llama-2: is not the base that the manifest was made with \(llama\): 21 of 21 tensors "
        "differ, first 'model.embed_tokens.weight'"
    )
    refused(message, wrong, delta, tmp_path / "n", recorded=manifest)
    wrong = write_folder(tmp_path / "v1", changed(delta_tensors(), UP, lambda tensor: tensor * 2))
    message = rf"v1: is not the delta .* \(delta\): 1 of 21 tensors differ, first '{UP}'"
    refused(message, base, wrong, tmp_path / "n", recorded=manifest)


def test_a_difference_after_the_sample_is_found_while_writing(
    base: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "_SAMPLE_BYTES", 1)
    manifest = apply_delta(base, delta, tmp_path / "m")

    def nudged(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1] += 1
        return tensor

    wrong = write_folder(tmp_path / "b", changed(base_tensors(), UP, nudged))
    refused(f"n: '{UP}' has the SHA-256", wrong, delta, tmp_path / "n", recorded=manifest)


def test_a_manifest_of_another_model(base: Path, delta: Path, tmp_path: Path) -> None:
    manifest = apply_delta(base, delta, tmp_path / "m")
    fewer = Manifest("b", "d", {k: v for k, v in manifest.tensors.items() if k != UP})
    message = f"the manifest has no '{UP}'; it is of another model"
    refused(message, base, delta, tmp_path / "n", recorded=fewer)


@pytest.mark.parametrize(
    "content",
    [
        "{}", '{"tensors": []}', '{"tensors": {}}', '{"tensors": {"x": 1}}',
        '{"tensors": {"x": {"shape": 1}}}', '{"tensors": {"x": {"shape": [1], "more": 2}}}',
        '{"base": "b", "delta": "d", "tensors": {"x": {"shape": [1], "dtype": "float16", '
        '"sha256": "abc", "base": "", "delta": ""}}}',
        '{"base": "b", "delta": "d", "tensors": {"x": {"shape": [1], "dtype": "float16", '
        '"sha256": 5, "base": null, "delta": ""}}}',
    ],
)  # fmt: skip
def test_what_is_no_manifest(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ModelLoadError, match=r"manifest.json: is not a manifest of chatserve"):
        read_manifest(tmp_path)


def test_a_manifest_without_sources_is_none(base: Path, delta: Path, tmp_path: Path) -> None:
    apply_delta(base, delta, tmp_path / "m")
    content = json.loads((tmp_path / "m" / MANIFEST_NAME).read_bytes())
    del content["base"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match="is not a manifest"):
        read_manifest(tmp_path / "x.json")
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ModelLoadError, match="is missing"):
        read_manifest(tmp_path / "m")
