"""Tiny random encoders on disk, made with transformers, with a WordPiece vocabulary of letters."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("cat", "sat", "mat", "the", "on", "##s", "##ing", "!", ".", "[", "]")
CONTEXT = 64
HIDDEN = 32
_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
}
_NAMED_OTHERWISE = {
    "distilbert": {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
                   "max_position_embeddings": CONTEXT},
    "albert": {**_SIZES, "embedding_size": 16},
    "electra": {**_SIZES, "embedding_size": 16},
}  # fmt: skip
_OFFSET = ("camembert", "mpnet", "roberta", "xlm-roberta")


def vocabulary() -> dict[str, int]:
    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIALS, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    return {piece: index for index, piece in enumerate(pieces)}


def save_encoder(folder: Path, model_type: str = "bert", *, pooling: str | None = None) -> Any:
    """Save a random one with its tokenizer into `folder`; returns the transformers model.

    pooling: a key of sentence-transformers' 1_Pooling/config.json.
    """
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    vocab = vocabulary()
    sizes: dict[str, Any] = dict(_NAMED_OTHERWISE.get(model_type, _SIZES))
    if model_type in _OFFSET:  # positions begin behind the padding token's
        sizes["max_position_embeddings"] = CONTEXT + (2 if model_type == "mpnet" else 1)
    config = AutoConfig.for_model(
        model_type, **sizes, vocab_size=len(vocab), pad_token_id=0, bos_token_id=None,
        eos_token_id=None, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    save_wordpiece(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True}), "utf-8")
    return model


def save_wordpiece(folder: Path) -> None:
    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=None, special_tokens=[(CLS, vocab[CLS]), (SEP, vocab[SEP])]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "unk_token": UNK,
        "cls_token": CLS, "sep_token": SEP, "mask_token": MASK,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
