"""Which template a model gets: by name, by verified family, the tokenizer's own, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatserve.engine.prompt import Message
from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.chat_template import (
    TemplateChoice,
    WeightsFacts,
    choose_template,
    load_template_sources,
    template_names,
)
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from tests.unit.models.vocabularies import save_byte_level, save_json, save_llama

OWN = {"default": "{{ messages[0].content }}"}
LLAMA = {"model_type": "llama", "vocab_size": 32000}
LLAMA_V0 = {"model_type": "llama", "vocab_size": 32001}
PAD = {"[PAD]": 32000}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def llama_v0(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_llama(tmp_path_factory.mktemp("v0"), added_tokens=PAD))


def merged(*names: str | None) -> dict[str, Any]:
    """The config of a LLaMA with adapters, from name and base of each."""
    pairs = zip(names[::2], names[1::2], strict=True)
    return {**LLAMA, "merged_adapters": [{"name": name, "base": base} for name, base in pairs]}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("other")
    save_byte_level(folder, special=["<|im_start|>", "<|im_end|>"])
    return load_tokenizer(folder)


def choose(
    tokenizer: Tokenizer,
    name: str = "model",
    config: dict[str, Any] | None = None,
    sources: dict[str, str] | None = None,
    explicit: str | None = None,
    vocab_rows: int | None = None,
) -> TemplateChoice:
    facts = WeightsFacts(name, config or {}, vocab_rows)
    return choose_template(explicit, facts, tokenizer, sources or {})


@pytest.mark.parametrize(
    ("name", "config", "template"),
    [
        ("vicuna-7b-v1.1", LLAMA, "vicuna_v1.1"),
        ("Vicuna-13B-v1.3", LLAMA, "vicuna_v1.1"),
        ("vicuna-7b-v1.5.Q4_K.gguf", LLAMA, "vicuna_v1.1"),
        ("my-folder", {**LLAMA, "_name_or_path": "lmsys/vicuna-7b-v1.5"}, "vicuna_v1.1"),
        ("mine", {**LLAMA, "applied_delta": "vicuna-7b-delta-v1.1"}, "vicuna_v1.1"),
        ("stackllama-merged", LLAMA, "stackllama"),
        ("x", {**LLAMA, "_name_or_path": "trl-lib/llama-7b-se-rl-peft/"}, "stackllama"),
        ("llama-7b", merged("sft", "LLaMA-7B", "rl", "trl-lib/llama-se-merged"), "stackllama"),
        ("llama-7b", merged("llama-7b-se-peft", "LLaMA-7B"), "stackllama"),
        ("x", merged("sql", "lmsys/vicuna-7b-v1.5"), "vicuna_v1.1"),
    ],
)
def test_verified_family(
    llama: Tokenizer, name: str, config: dict[str, Any], template: str
) -> None:
    # Its own template comes second: a later one on Vicuna v1.5's page is of unknown origin.
    for sources in ({}, OWN):
        choice = choose(llama, name, config, sources)
        assert choice.template.name == template
        assert "verified" in choice.reason and "32000 vocabulary rows" in choice.reason


@pytest.mark.parametrize("name", ["vicuna-7b", "vicuna-13b-v0", "llama-7b-delta-applied"])
def test_vicuna_v0_by_its_padding_row(llama_v0: Tokenizer, name: str) -> None:
    choice = choose(llama_v0, name, LLAMA_V0)
    assert choice.template.name == "vicuna_v0"
    assert "[PAD] is 32000" in choice.reason


def test_measured_rows_beat_the_config(llama_v0: Tokenizer) -> None:
    assert choose(llama_v0, config=LLAMA, vocab_rows=32001).template.name == "vicuna_v0"


def test_vicuna_v0_named_has_precedence_over_its_own_template(llama_v0: Tokenizer) -> None:
    assert choose(llama_v0, "vicuna-7b", LLAMA_V0, OWN).template.name == "vicuna_v0"
    assert choose(llama_v0, "fine-tune", LLAMA_V0, OWN).template.name == "tokenizer"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-7b", LLAMA),
        ("vicuna", {}),
        ("vicuna", {"model_type": "mistral", "vocab_size": 32000}),
        ("vicuna", {"model_type": "llama", "vocab_size": 32016}),
        ("vicuna", {"model_type": "llama", "vocab_size": "32000"}),
        ("vicuna-7b-v0", LLAMA),
        ("x", {**LLAMA, "_name_or_path": "/data/vicuna/llama-7b"}),
        ("x", {**LLAMA, "_name_or_path": 7}),
        ("x", {**LLAMA, "applied_delta": ["vicuna"]}),
        ("vicuna", LLAMA_V0),
        ("llama-7b", merged("sql", None)),
        ("llama-7b", {**LLAMA, "merged_adapters": ["vicuna"]}),
        ("llama-7b", {**LLAMA, "merged_adapters": {"name": "vicuna"}}),
    ],
)
def test_name_alone_is_no_proof(llama: Tokenizer, name: str, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no chat template is known for") as caught:
        choose(llama, name, config)
    assert all(known in caught.value.message for known in template_names())
    assert choose(llama, name, config, OWN).template.name == "tokenizer"


def test_vocabulary_is_verified_by_its_ids(other: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no chat template is known"):
        choose(other, "vicuna-7b-v1.5", LLAMA)


def test_other_families_with_a_padding_row(llama_v0: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no chat template is known"):
        choose(llama_v0, "alpaca-7b", LLAMA_V0)


def test_tokenizer_s_own_template(other: Tokenizer) -> None:
    choice = choose(other, sources=OWN)
    assert choice.reason == "the tokenizer's own chat template"
    assert choice.template.render([Message("user", "hi")]) == ["hi"]


def test_explicit_name_has_the_last_word(llama: Tokenizer) -> None:
    for name, template in (
        ("vicuna_v0", "vicuna_v0"), ("zero_shot", "vicuna_v0"), ("vicuna_v1.5", "vicuna_v1.1"),
        ("stackllama", "stackllama"), ("tokenizer", "tokenizer"),
    ):  # fmt: skip
        choice = choose(llama, "vicuna-7b-v1.5", LLAMA, OWN, explicit=name)
        assert (choice.template.name, choice.reason) == (template, "chosen by name")


def test_unknown_name_lists_the_known_ones(llama: Tokenizer) -> None:
    with pytest.raises(UsageError, match="unknown chat template 'one_shot'") as caught:
        choose(llama, explicit="one_shot")
    assert "zero_shot is the same layout without FastChat's example" in caught.value.message
    assert all(known in caught.value.message for known in template_names())


def test_template_that_the_vocabulary_cannot_write(llama: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"chatml needs the special token <\|im_start\|>"):
        choose(llama, explicit="chatml")


def test_own_template_asked_for_but_missing(llama: Tokenizer) -> None:
    with pytest.raises(UsageError, match="brings no chat template"):
        choose(llama, explicit="tokenizer", sources={"tool_use": "x"})


def test_own_template_that_is_no_jinja(other: Tokenizer) -> None:
    with pytest.raises(ModelLoadError, match="not valid Jinja"):
        choose(other, sources={"default": "{% for %}"})
    assert choose(other, sources={"default": "{% for %}"}, explicit="chatml").template.stop == ()


def test_sources_of_a_folder(tmp_path: Path) -> None:
    assert load_template_sources(tmp_path) == {}
    save_json(tmp_path, tokenizer_config={})
    assert load_template_sources(tmp_path) == {}
    save_json(tmp_path, tokenizer_config={"chat_template": "one"})
    assert load_template_sources(tmp_path) == {"default": "one"}
    named = [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
        {"name": 3, "template": "c"},
        {"name": "d"},
        "e",
    ]
    save_json(tmp_path, tokenizer_config={"chat_template": named})
    assert load_template_sources(tmp_path) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("file\n", "utf-8")
    assert load_template_sources(tmp_path) == {"default": "file\n", "tool_use": "b"}


def test_source_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja"):
        load_template_sources(tmp_path)


def test_oversized_source_file_is_refused(tmp_path: Path, other: Tokenizer) -> None:
    (tmp_path / "chat_template.jinja").write_text("x" * (3 << 20), "utf-8")
    with pytest.raises(ModelLoadError, match="over the limit"):
        choose(other, sources=load_template_sources(tmp_path))


def test_sources_of_gguf_metadata() -> None:
    key = "tokenizer.chat_template"
    path = Path("x.gguf")
    assert load_template_sources(path, {}) == {}
    assert load_template_sources(path, {key: 3, f"{key}.rag": 4}) == {}
    metadata = {key: "a", f"{key}.tool_use": "b", f"{key}s": ["tool_use"]}
    assert load_template_sources(path, metadata) == {"default": "a", "tool_use": "b"}
