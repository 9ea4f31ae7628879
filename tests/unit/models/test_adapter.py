"""LoRA adapters: the files of 2023 and of today are read, everything else is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatserve.errors import ModelLoadError
from chatserve.models.adapter import Adapter, load_adapter
from chatserve.models.config import ModelConfig
from tests import adapters, tiny

CONFIG = ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], **tiny.sizes()})
Q0 = "model.layers.0.self_attn.q_proj"
NAME_A, NAME_B = adapters.pair_names(Q0)
EMBEDDING = "base_model.model.model.embed_tokens"


def pairs() -> dict[str, torch.Tensor]:
    return adapters.random_pairs(adapters.tiny_shapes())


def load(folder: Path, config: ModelConfig = CONFIG) -> Adapter:
    return load_adapter(folder, config)


def refused(folder: Path, *reasons: str, config: ModelConfig = CONFIG) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(folder, config)
    message = caught.value.message
    assert str(folder) in message and "\n" not in message and len(message) < 600
    for reason in reasons:
        assert reason in message


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_2023_adapter_is_read(tmp_path: Path, as_bin: bool, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in pairs().items()}
    folder = adapters.write(tmp_path / "sft", tensors, as_bin=as_bin, lora_alpha=8)
    adapter = load(folder)
    assert (adapter.name, adapter.path) == ("sft", folder)
    assert adapter.pairs.keys() == {f"{module}.weight" for module in adapters.tiny_shapes()}
    pair = adapter.pairs[f"{Q0}.weight"]
    assert pair.scale == 2 and pair.a.dtype == pair.b.dtype == torch.float32
    assert pair.a.equal(tensors[NAME_A].float()) and pair.b.equal(tensors[NAME_B].float())
    assert load_adapter(folder, CONFIG, name="other").name == "other"


def test_peft_reads_the_same_files(tmp_path: Path) -> None:
    """So what the tests write is what PEFT writes: keys, shapes and config."""
    import peft

    folder = adapters.write(tmp_path / "a", as_bin=False)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        config = peft.LoraConfig.from_pretrained(folder)
    assert isinstance(config, peft.LoraConfig) and (config.r, config.lora_alpha) == (4, 8)
    model = adapters.peft_model(tiny.build_hf_model())
    adapters.save_peft(model, tmp_path / "b")
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert len(load(tmp_path / "b").pairs) == 4


def test_the_fingerprint_is_of_the_numbers(tmp_path: Path) -> None:
    first = load(adapters.write(tmp_path / "a")).fingerprint
    assert first == load(adapters.write(tmp_path / "b", as_bin=True)).fingerprint
    assert first != load(adapters.write(tmp_path / "c", lora_alpha=9)).fingerprint
    changed = pairs()
    changed[NAME_B][0, 0] += 1e-6
    assert first != load(adapters.write(tmp_path / "d", changed)).fingerprint


def test_raw_state_dicts_and_value_heads_are_read(tmp_path: Path) -> None:
    tensors = {
        name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
        for name, tensor in pairs().items()
    }
    tensors["v_head.summary.weight"] = torch.zeros(1, 64)
    assert len(load(adapters.write(tmp_path / "a", tensors)).pairs) == 4


def test_scales_and_ranks_follow_the_config(tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a", use_rslora=True)
    assert load(folder).pairs[f"{Q0}.weight"].scale == 8 / math.sqrt(4)
    tensors = pairs() | adapters.random_pairs({Q0: (64, 64)}, rank=2)
    folder = adapters.write(
        tmp_path / "b", tensors,
        rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2}, alpha_pattern={"v_proj": 1},
    )  # fmt: skip
    adapter = load(folder)
    assert adapter.pairs[f"{Q0}.weight"].scale == 8 / 2
    assert adapter.pairs[f"{Q0}.weight".replace("q_", "v_")].scale == 1 / 4
    assert adapter.pairs["model.layers.1.self_attn.q_proj.weight"].scale == 8 / 4


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({"target_modules": "all-linear"}, ("_proj",)),
        ({"target_modules": r".*\.mlp\..*"}, ("gate_proj", "up_proj", "down_proj")),
        ({"target_modules": None}, ("q_proj", "v_proj")),
        ({"target_modules": ["self_attn.q_proj", "query_key_value"]}, ("q_proj",)),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, ("q_proj",)),
    ],
)
def test_targets_in_every_spelling(tmp_path: Path, changes: Any, targets: Any) -> None:
    tensors = adapters.random_pairs(adapters.tiny_shapes(targets))
    folder = adapters.write(tmp_path / "a", tensors, **changes)
    assert len(load(folder).pairs) == len(tensors) // 2


def test_only_some_layers_may_have_pairs(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in pairs().items() if ".1." in name}
    folder = adapters.write(tmp_path / "a", tensors, layers_to_transform=[1])
    assert len(load(folder).pairs) == 2
    refused(adapters.write(tmp_path / "b", tensors), "lacks 2 of 4 modules", Q0)


def test_an_untied_head_may_have_a_pair(tmp_path: Path) -> None:
    tensors = adapters.random_pairs({"lm_head": (tiny.VOCAB_SIZE, 64)})
    folder = adapters.write(tmp_path / "a", tensors, target_modules=["lm_head"])
    assert load(folder).pairs.keys() == {"lm_head.weight"}
    refused(folder, "shares with its embedding", config=replace(CONFIG, is_tied=True))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is refused: only LORA"),
        ({"task_type": "SEQ_CLS"}, "a reward model"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "another kind of model"),
        ({"bias": "all"}, "bias 'all' is refused"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is refused"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "only after certain tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "rows of the embedding"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed base"),
        ({"init_lora_weights": "loftq"}, "changed base"),
        ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern '(a+)+b' is refused"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is 0"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], not an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern is 'x'"),
        ({"r": None}, "r is None, not a rank"),
        ({"r": True}, "r is True"),
        ({"r": 10**30}, "not a rank from 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"target_modules": [1]}, "target_modules is [1]"),
        ({"target_modules": {"q": 1}}, "target_modules is {'q': 1}"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'"),
        ({"target_modules": ["q_proj"]}, "holds 2 modules that adapter_config.json does not"),
        ({"target_modules": ["query_key_value"]}, "holds 4 modules that adapter_config.json does"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks 2 of 6 modules"),
        ({"r": 8}, "in rank 4 and 4, adapter_config.json says 8"),
    ],
)
def test_a_config_that_asks_for_more_or_nonsense_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    refused(adapters.write(tmp_path / "a", **changes), reason)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", None])
def test_starts_that_leave_the_base_alone_are_read(tmp_path: Path, start: Any) -> None:
    load(adapters.write(tmp_path / "a", init_lora_weights=start))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({NAME_A: None}, f"lacks lora_A of '{Q0}'"),
        ({NAME_B: None}, f"lacks lora_B of '{Q0}'"),
        ({NAME_A: None, NAME_B: None}, "lacks 1 of 4 modules that adapter_config.json targets, "
         f"first {Q0}"),
        ({NAME_A: torch.zeros(4, 32)},
         f"fits a '{Q0}' of shape (64, 32), this base's is (64, 64)"),
        ({NAME_B: torch.zeros(32, 4)}, "of shape (32, 64), this base's is (64, 64)"),
        ({NAME_A: torch.zeros(3, 64)}, "in rank 3 and 4"),
        ({NAME_B: torch.zeros(64, 3)}, "in rank 4 and 3"),
        ({NAME_B: torch.zeros(64, 4, 1)}, "not as matrices"),
        ({NAME_A: torch.zeros(4, 64, dtype=torch.int8)}, "not as real numbers"),
        ({NAME_A: torch.full((4, 64), math.nan)}, f"'{NAME_A}' holds values that are no numbers"),
        ({NAME_B: torch.full((64, 4), math.inf)}, f"'{NAME_B}' holds values that are no numbers"),
        ({NAME_A.replace("lora_A", "lora_A.other"): torch.zeros(4, 64)}, "twice"),
        ({f"{EMBEDDING}.weight": torch.zeros(2, 2)}, "no part of a LoRA pair"),
        ({f"{EMBEDDING}.lora_embedding_A": torch.zeros(2, 2)}, "no part of a LoRA pair"),
        ({name.replace("0.self", "7.self"): torch.zeros(4, 64) for name in (NAME_A, NAME_B)},
         "this base of 2 layers does not have"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], reason: str
) -> None:
    tensors = {**pairs(), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    refused(adapters.write(tmp_path / "a", kept), reason)


def test_another_base_is_named(tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a", base_model_name_or_path="huggyllama/llama-7b")
    for other in (replace(CONFIG, hidden_size=128), replace(CONFIG, num_layers=1)):
        refused(folder, "another base (it was trained on 'huggyllama/llama-7b')", config=other)
    refused(folder, "lacks 2 of 6 modules", "more layers", config=replace(CONFIG, num_layers=3))


def test_an_empty_file_is_what_early_scripts_saved(tmp_path: Path) -> None:
    refused(adapters.write(tmp_path / "a", {}, as_bin=True), "early training scripts saved empty")


def test_what_is_no_adapter_says_what_it_is(tmp_path: Path) -> None:
    refused(tmp_path / "none", "`chatserve pull NAME` fetches")
    refused(tmp_path, "has no adapter_config.json")
    folder = adapters.write(tmp_path / "a", as_bin=True)
    refused(folder / "adapter_model.bin", "pass the folder")
    (folder / "adapter_model.bin").unlink()
    refused(folder, "no weights (wanted adapter_model.safetensors or adapter_model.bin)")
    tiny.save_model(tmp_path / "model", tokenizer=False)
    refused(tmp_path / "model", "whole model", f"chatserve serve {tmp_path / 'model'}")


def test_weights_may_not_lie_elsewhere(tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "adapter_model.safetensors").symlink_to("../elsewhere.safetensors")
    refused(folder, "link out of the folder")


def test_shapes_are_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = pairs() | {NAME_A: torch.zeros(4, 32)}
    folder = adapters.write(tmp_path / "a", tensors)

    def read(*_: object) -> torch.Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("chatserve.models.safetensors_file.SafetensorsFile.read", read)
    refused(folder, "this base's is")


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = adapters.write(tmp_path / "a")
    for content in (b"[]", b"{", b"\xff", json.dumps({"x": "y" * (1 << 20)}).encode()):
        (folder / "adapter_config.json").write_bytes(content)
        refused(folder, "adapter_config.json")
    save_file({}, folder / "adapter_model.safetensors")
