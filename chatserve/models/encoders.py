"""Encoders: networks that read a text in both directions and write none. Known by name, refused.

transformers knows some of them as causal models, too, which they are only if they were trained so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatserve.errors import ModelLoadError

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


def refuse_encoder(config: Mapping[str, Any]) -> None:
    """Raises `ModelLoadError` for the `config.json` of one."""
    model_type = config.get("model_type")
    if model_type in MODEL_TYPES and config.get("is_decoder") is not True:
        raise ModelLoadError(
            f"{model_type!r} is an encoder, which reads texts but writes none; chatserve makes "
            "embeddings with models that generate, so pass one of those, or serve this one with "
            "another program"
        )
