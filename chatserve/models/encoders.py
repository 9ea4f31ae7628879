"""Encoders: networks that read a text in both directions and write none. Known by name.

Those that transformers runs from its own code are served for embeddings; the others are refused.
transformers knows some of them as causal models, too, which they are only if they were trained so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatserve.errors import ModelLoadError
from chatserve.models.config import architectures

MODEL_TYPES = frozenset(
    (
        "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta",
        "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "flaubert", "fnet",
        "funnel", "gte", "ibert", "jina_embeddings_v3", "longformer", "luke", "megatron-bert",
        "mobilebert", "modernbert", "mpnet", "mra", "new", "nomic_bert", "nystromformer",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert",
        "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
    )
)  # fmt: skip
SERVED_TYPES = frozenset(
    (
        "albert", "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta",
        "xlm-roberta",
    )
)  # fmt: skip
# their positions are counted from behind the padding token's id
_OFFSET_TYPES = frozenset(("camembert", "roberta", "xlm-roberta"))
_MPNET_OFFSET = 2  # whatever that is
_BODIES = ("Model", "ForMaskedLM", "ForPreTraining")


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether the `config.json` is that of one."""
    model_type = config.get("model_type")
    is_known = isinstance(model_type, str) and model_type in MODEL_TYPES
    return is_known and config.get("is_decoder") is not True


def refuse_encoder(config: Mapping[str, Any]) -> None:
    """Raises `ModelLoadError` for the `config.json` of one, where texts are to be written."""
    if is_encoder(config):
        raise ModelLoadError(
            f"{config['model_type']!r} is an encoder, which reads texts but writes none; chatserve "
            "serves it for embeddings (`chatserve serve`), and no more"
        )


def refuse_unserved(config: Mapping[str, Any]) -> None:
    """Raises `ModelLoadError` for an encoder that gives no embeddings here."""
    model_type = config.get("model_type")
    if model_type not in SERVED_TYPES:
        raise ModelLoadError(
            f"{model_type!r} is an encoder that is not served here; of encoders there are "
            f"{', '.join(sorted(SERVED_TYPES))}"
        )
    for name in architectures(config):
        if not name.endswith(_BODIES):
            raise ModelLoadError(
                f"{name[:80]!r} is an encoder with a head of its own (a classifier or reranker), "
                "which is not served; embeddings come from the bare model"
            )


def longest_text(config: Any, model_type: str) -> int:
    """Tokens that the transformers `config` has positions for."""
    length = int(config.max_position_embeddings)
    if model_type == "mpnet":
        return length - _MPNET_OFFSET
    return length - config.pad_token_id - 1 if model_type in _OFFSET_TYPES else length
