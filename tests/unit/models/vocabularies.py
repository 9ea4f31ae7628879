"""Small vocabularies of each kind on disk, and where the two real ones lie."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from chatserve.default_model import SMOLLM2_135M

_REPOSITORY = Path(__file__).parents[3]
_SHARED = ("shared/data/llama-tokenizer.model", "../shared/data/llama-tokenizer.model")

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 2023, and we've 1234567 reasons.",
    "USER: Hello! ASSISTANT: Hi! How are you today? I'm fine, thank you.",
    "### Human: What is this?\n### Assistant: A test of tokenizers, vocabularies and templates.",
    "Größe, façade, naïve, Привет мир, 你好，世界, こんにちは,안녕하세요, مرحبا, 😀🎉👩‍👩‍👧",
    "def main():\n    return [x ** 2 for x in range(10)]\n\n\tif x == 3:   pass",
    "<|im_start|>user system assistant <s> </s> <think> [INST] <<SYS>> [/INST]",
] * 3

TEXTS = [
    "Hello!",
    "The quick brown fox",
    " leading and trailing ",
    "   runs    of     spaces  \n\n\n and\ttabs\r\n",
    "naïve façade, Größe, Привет мир, 你好，世界！ こんにちは 안녕하세요 مرحبا",
    "emoji 😀🎉 family 👩‍👩‍👧 flag 🇩🇪 rare 𓀀 \U000e0041",
    "1234567890 3.14159 2023-04-06",
    "def f(x):\n    return x ** 2  # it's fine, they'll see",
    "\u0000\u0001\u007f\u00a0\u200b\u2028\ufeff\ufffd",
    "ａｂｃ ① ﬁ e\u0301 é",
    "▁ and ▁▁ and <0x41> and <unk> </s> <s>",
    "a",
    " ",
    "\n",
]


def llama_model() -> bytes:
    """LLaMA's tokenizer.model; skips the test where it is not at hand."""
    for name in _SHARED:
        if (_REPOSITORY / name).exists():
            return (_REPOSITORY / name).read_bytes()
    pytest.skip(
        "shared/data/llama-tokenizer.model is not here: LLaMA's licence forbids shipping it"
    )


def smollm2() -> Path:
    """The default model's GGUF; skips the test where it has not been fetched."""
    if not SMOLLM2_135M.path.exists():
        pytest.skip("SmolLM2 is not in the cache: `make chat` fetches it")
    return SMOLLM2_135M.path


def save_llama(folder: Path, **files: Mapping[str, Any]) -> Path:
    """A folder like an early Vicuna's: tokenizer.model, and JSON files by stem."""
    (folder / "tokenizer.model").write_bytes(llama_model())
    return save_json(folder, **files)


def save_json(folder: Path, **files: Any) -> Path:
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content), "utf-8")
    return folder


@cache
def train_sentencepiece(**options: Any) -> bytes:
    """A small BPE tokenizer.model, LLaMA's settings unless `options` say otherwise."""
    import sentencepiece

    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 520,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "max_sentencepiece_length": 16,
        "minloglevel": 2,
        **options,
    }
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buffer, **settings
    )
    return buffer.getvalue()


def save_byte_level(
    folder: Path,
    *,
    special: Iterable[str],
    plain: Iterable[str] = (),
    pattern: str | None = None,
    nfc: bool = False,
    ignore_merges: bool = False,
    bos: str | None = None,
    **settings: Any,
) -> Tokenizer:
    """A byte-level folder with its tokenizer.json; `settings` go into tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    save_json(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    return tokenizer


def save_metaspace(
    folder: Path, *, prepend_scheme: str | None, special: Iterable[str], **settings: Any
) -> Tokenizer:
    """A sentencepiece-like tokenizer.json: Metaspace, or with None the legacy normaliser."""
    specials = ["<unk>", "<s>", "</s>", *special]
    letters = sorted({letter for text in CORPUS for letter in text if letter != " "} | {"▁"})
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    trainer_pieces = ["▁t", "he", "▁the", "er", "in", "on", "▁H", "▁He", "ll", "▁Hell", "▁Hello"]
    merges = [
        ("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("i", "n"), ("o", "n"), ("▁", "H"),
        ("▁H", "e"), ("l", "l"), ("▁He", "ll"), ("▁Hell", "o"), ("<", "/"), ("</", "s"),
        ("</s", ">"),
    ]  # fmt: skip
    # The last merge builds </s> out of plain text, as careless conversions of LLaMA do.
    vocab = {piece: i for i, piece in enumerate([*pieces, *trainer_pieces, "</", "</s"])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prepend_scheme is None:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=prepend_scheme, split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    save_json(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    return tokenizer


def transformers_tokenizer(folder: Path) -> Any:
    """The judge: transformers' own reading of the same tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def copy_folder(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
