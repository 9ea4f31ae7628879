"""The ids that Vicuna and StackLLaMA were trained on, with LLaMA's own tokenizer.model."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatserve.models.special_tokens import Special
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from tests.unit.models.vocabularies import llama_model, save_json, save_llama, smollm2

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_IDS = [
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076,
    8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889,
]  # fmt: skip
SINGLE_IDS = [*SYSTEM_IDS, 3148, 1001, 29901, 15043, 29991, 319, 1799, 9047, 13566, 29901]
MULTI = [
    f"{SYSTEM} USER: Hello! ASSISTANT: Hi!",
    Special("</s>"),
    "USER: How are you? ASSISTANT:",
]
ENDING = [29901, 1128, 526, 366, 29973, 319, 1799, 9047, 13566, 29901]
V0_ENDING_C = [
    13, 2277, 29937, 12968, 29901, 15043, 29991, 13, 2277, 29937, 4007, 22137, 29901,
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_llama(tmp_path_factory.mktemp("llama")))


def test_bos_is_added_and_eos_is_not(llama: Tokenizer) -> None:
    assert (llama.bos_id, llama.eos_ids, llama.vocab_size) == (1, {2}, 32000)
    assert llama.adds_bos
    assert llama.encode(SYSTEM, add_bos=True) == SYSTEM_IDS
    assert llama.encode(SYSTEM, add_bos=False) == SYSTEM_IDS[1:]


def test_vicuna_v0_system_message(llama: Tokenizer) -> None:
    human = [5199 if token_id == 1404 else token_id for token_id in SYSTEM_IDS]
    assert llama.encode(SYSTEM.replace("user", "human"), add_bos=True) == human


def test_vicuna_v11_single_turn(llama: Tokenizer) -> None:
    ids = llama.encode(f"{SYSTEM} USER: Hello! ASSISTANT:", add_bos=True)
    assert len(ids) == 41
    assert ids == SINGLE_IDS


@pytest.mark.parametrize("settings", [None, {}, {"legacy": True}, {"legacy": None}])
def test_text_after_a_special_token_starts_a_word_when_legacy(
    tmp_path: Path, settings: dict[str, object] | None
) -> None:
    files = {} if settings is None else {"tokenizer_config": settings}
    ids = load_tokenizer(save_llama(tmp_path, **files)).encode(MULTI, add_bos=True)
    assert len(ids) == 56
    assert ids[41:] == [6324, 29991, 2, 3148, 1001, *ENDING]


def test_text_after_a_special_token_continues_when_not_legacy(tmp_path: Path) -> None:
    folder = save_llama(tmp_path, tokenizer_config={"legacy": False})
    ids = load_tokenizer(folder).encode(MULTI, add_bos=True)
    assert len(ids) == 55
    assert ids[41:] == [6324, 29991, 2, 11889, *ENDING]


def test_transformers_agrees_on_both_forms(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    text = f"{SYSTEM} USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    for legacy in (True, False):
        folder = tmp_path / str(legacy)
        folder.mkdir()
        ours = load_tokenizer(save_llama(folder, tokenizer_config={"legacy": legacy}))
        judge = LlamaTokenizer.from_pretrained(folder, legacy=legacy)
        ids = judge(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(MULTI, add_bos=False) == ids, f"legacy={legacy}"


def test_vicuna_v0_layouts(llama: Tokenizer) -> None:
    system = SYSTEM.replace("user", "human")
    layout_c = llama.encode(f"{system}\n### Human: Hello!\n### Assistant:", add_bos=True)
    assert len(layout_c) == 44
    assert layout_c[-13:] == V0_ENDING_C
    layout_a = llama.encode(f"{system}###Human: Hello!###Assistant:", add_bos=True)
    assert len(layout_a) == 43
    assert layout_a[31:35] == [2277, 29937, 29950, 7889]


def test_space_before_an_end_token_costs_an_id(llama: Tokenizer) -> None:
    with_space = llama.encode(["Hi! ", Special("</s>")], add_bos=False)
    assert with_space == [6324, 29991, 29871, 2]
    assert llama.encode(["Hi!", Special("</s>")], add_bos=False) == [6324, 29991, 2]


def test_stackllama_question(llama: Tokenizer) -> None:
    ids = [
        1, 894, 29901, 1128, 437, 306, 6876, 325, 326, 29973, 13, 13, 22550, 29901, 29871,
    ]  # fmt: skip
    question = "Question: How do I exit vim?\n\nAnswer:"
    assert llama.encode(f"{question} ", add_bos=True) == ids
    assert llama.encode(question, add_bos=True) == ids[:-1]


def test_padding_token_of_v0_is_reported(tmp_path: Path) -> None:
    folder = save_llama(
        tmp_path,
        added_tokens={"[PAD]": 32000},
        special_tokens_map={
            "bos_token": "</s>",
            "eos_token": "</s>",
            "unk_token": "</s>",
            "pad_token": "[PAD]",
        },
        tokenizer_config={"bos_token": "", "eos_token": "", "unk_token": ""},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.forbidden_ids == {32000}
    assert tokenizer.token_bytes(32000) == b""
    assert tokenizer.vocab_size == 32001
    # The first release's map names </s> three times: the vocabulary's own ids win.
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.names["bos_token"] == "<s>"


def test_broken_ids_of_an_early_v11_config_are_ignored(tmp_path: Path) -> None:
    broken = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    tokenizer = load_tokenizer(save_llama(tmp_path, config=broken, generation_config=broken))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


def test_gguf_of_the_same_vocabulary_gives_the_same_ids(llama: Tokenizer) -> None:
    from chatserve.models.sentencepiece import read_vocabulary

    vocabulary = read_vocabulary(llama_model())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocabulary.pieces,
        "tokenizer.ggml.scores": vocabulary.scores,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = load_tokenizer(Path("vicuna.gguf"), metadata)
    assert tokenizer.encode(MULTI, add_bos=True) == llama.encode(MULTI, add_bos=True)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.adds_bos and tokenizer.strips_leading_space


@pytest.mark.weights
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("\n", [198]),
    ],
)
def test_smollm2_ids(text: str, ids: list[int]) -> None:
    tokenizer = load_tokenizer(smollm2())
    assert tokenizer.encode(text, add_bos=tokenizer.adds_bos) == ids
    assert tokenizer.decode(ids) == text


@pytest.mark.weights
def test_smollm2_special_tokens() -> None:
    tokenizer = load_tokenizer(smollm2())
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, {2})
    assert not tokenizer.adds_bos
    assert not tokenizer.strips_leading_space
    assert not tokenizer.forbidden_ids  # its padding token is also its end token
    assert tokenizer.special_ids["<|im_end|>"] == 2


def test_ids_from_the_map_when_the_model_is_extended(tmp_path: Path) -> None:
    folder = save_llama(
        tmp_path,
        added_tokens={"<|im_end|>": 32000, "<|im_start|>": 32001},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == {2, 32000}
    assert tokenizer.names["eos_token"] == "<|im_end|>"
    assert tokenizer.token_bytes(32000) == b""
    assert tokenizer.token_bytes(32001) == b"<|im_start|>"  # nothing flags it as special


def test_extra_special_tokens_are_not_shown(tmp_path: Path) -> None:
    folder = save_llama(
        tmp_path,
        added_tokens={"<|a|>": 32000, "<|b|>": 32001, "<|c|>": 32002},
        special_tokens_map={"additional_special_tokens": ["<|a|>"]},
        tokenizer_config={"extra_special_tokens": [{"content": "<|b|>"}]},
    )
    tokenizer = load_tokenizer(folder)
    shown = [tokenizer.token_bytes(token_id) for token_id in (32000, 32001, 32002)]
    assert shown == [b"", b"", b"<|c|>"]


def test_generation_config_adds_end_ids(tmp_path: Path) -> None:
    folder = save_llama(tmp_path, generation_config={"eos_token_id": [2, 13, 99999]})
    assert load_tokenizer(folder).eos_ids == {2, 13}
    save_json(folder, generation_config={"eos_token_id": 29871})
    assert load_tokenizer(folder).eos_ids == {2, 29871}
