"""The base that an adapter is trained on: a transformers model over chatserve's own reading.

A folder or a `.gguf` file becomes a fresh network of transformers with the dequantised weights, and
the tokenizer that serves it becomes the trainers' tokenizer: so what is trained is what is served.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.config import ModelConfig, architectures, is_native
from chatserve.models.fallback import read_hf_config, refusals
from chatserve.models.fingerprint import weights_fingerprint
from chatserve.models.form import native_config
from chatserve.models.merge import merge
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from chatserve.train.served_tokenizer import ServedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Head = Literal["text", "score"]
_SKIPPED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


@dataclass(frozen=True)
class TrainingBase:
    """A base in memory, frozen. fingerprint: of its weights, adapters merged into them included.

    name: what goes into an adapter's `base_model_name_or_path`. network: its shapes. model: on
    `device`, with a head that writes text or one that makes a score, whose weights then are new.
    """

    path: Path
    name: str
    fingerprint: str
    network: ModelConfig
    model: PreTrainedModel
    tokenizer: Tokenizer
    processing: ServedTokenizer
    device: torch.device


@dataclass(frozen=True)
class BaseIdentity:
    """What tells a base from others, read from headers and some rows."""

    path: Path
    name: str
    fingerprint: str


def identify_base(weights: Path, *, adapters: Sequence[Path] = ()) -> BaseIdentity:
    """Of `weights` with `adapters` merged into them, without loading. Raises `ModelLoadError`."""
    opened = open_checkpoint(weights)
    with closing(opened.weights):
        return _identity(merge(opened, adapters))


def open_base(
    weights: Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    int8: bool = False,
    head: Head = "text",
    adapters: Sequence[Path] = (),
    seed: int = 0,
) -> TrainingBase:
    """Load `weights`, a folder or `.gguf` file, for training.

    dtype: None for float32 on the CPU and bfloat16 elsewhere. int8: matrices in 8 bits, by
    bitsandbytes, on CUDA only. adapters: merged into the base first, in their order. seed: of a new
    score head. Raises `ModelLoadError` for files that no network can be made of, `UsageError` for
    what this device cannot.
    """
    place = training_device(device)
    if int8 and place.type != "cuda":
        raise UsageError(f"--int8 on: bitsandbytes trains on CUDA, not on {place.type}; leave it")
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    opened = open_checkpoint(weights)
    with closing(opened.weights):
        _check_family(opened)
        checkpoint = merge(opened, adapters)
        identity = _identity(checkpoint)
        tokenizer = load_tokenizer(weights, checkpoint.metadata)
        network = native_config(checkpoint)
        model = _build(checkpoint, network, dtype, head, seed)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.config._name_or_path = model.name_or_path = identity.name
    if int8:
        from chatserve.train.int8_base import pack_linears

        logger.info("int8: %d matrices by bitsandbytes", pack_linears(model))
    model.to(place)
    processing = ServedTokenizer(tokenizer)
    model.config.get_text_config().eos_token_id = processing.eos_token_id
    model.config.get_text_config().pad_token_id = processing.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = processing.eos_token_id
        model.generation_config.pad_token_id = processing.pad_token_id
    return TrainingBase(
        weights, identity.name, identity.fingerprint, network, model, tokenizer, processing, place
    )


def training_device(name: str) -> torch.device:
    """`auto`: this process's CUDA device, else Metal, else the CPU. Raises `UsageError`."""
    from accelerate import PartialState

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_here in has.items() if is_here)
    if not has[name]:
        raise UsageError(f"--device {name}: no such device is here; use --device cpu")
    if name == "cuda":
        return torch.device("cuda", PartialState().local_process_index)
    return torch.device(name)


def score_model(base: TrainingBase, seed: int = 0) -> PreTrainedModel:
    """A network with a score head that shares every weight of `base`, whose head writes text."""
    kind = _class_of(base.model.config, "score")
    content = base.model.config.to_dict()
    for labels in ("id2label", "label2id"):
        content.pop(labels, None)
    config = type(base.model.config).from_dict({**content, "num_labels": 1})
    # on no device: what it is made of is the base's
    with torch.device("meta"):
        model = kind(config)
    setattr(model, model.base_model_prefix, base.model.base_model)
    weight = _new_head(config, seed).to(base.device, torch.float32)
    model.score.weight = torch.nn.Parameter(weight, requires_grad=False)
    return cast("PreTrainedModel", model.eval())


def _check_family(checkpoint: Checkpoint) -> None:
    if not is_native(checkpoint.config):
        name = next(iter(architectures(checkpoint.config)), "this model")
        raise ModelLoadError(
            f"{checkpoint.path}: adapters are served on networks of the Llama family, so nothing "
            f"else is trained here, {name} neither; take a base of that family"
        )


def _identity(checkpoint: Checkpoint) -> BaseIdentity:
    path = checkpoint.path
    name = path.resolve().name.removesuffix(".gguf")
    return BaseIdentity(path, name, weights_fingerprint(checkpoint))


def _class_of(config: Any, head: Head) -> Any:
    from transformers.models.auto import modeling_auto

    tables = {
        "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "score": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    kind = tables[head].get(type(config), None)
    if kind is None:
        raise ModelLoadError(
            f"transformers has no score head for {type(config).__name__}; train the reward model "
            "on another base"
        )
    return kind


def _build(
    checkpoint: Checkpoint, network: ModelConfig, dtype: torch.dtype, head: Head, seed: int
) -> PreTrainedModel:
    config = read_hf_config(_hf_config(checkpoint))
    state: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.weights.tensors().items():
        if name.endswith(_SKIPPED) or (head == "score" and name.startswith("lm_head.")):
            continue
        state[name] = checkpoint.weights.read(name).to(dtype if info.is_real else info.dtype)
    config.tie_word_embeddings = network.is_tied
    if head == "score":
        config.num_labels = 1
        state["score.weight"] = _new_head(config, seed).to(dtype)
    with refusals(f"{checkpoint.path}: transformers cannot train this model"):
        model, report = _class_of(config, head).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(
            f"{checkpoint.path} lacks {len(missing)} tensors of {type(model).__name__}, first "
            f"{missing[0]}; the download is incomplete"
        )
    return model


def _new_head(config: Any, seed: int) -> torch.Tensor:
    """(1, hidden), as transformers begins such a head, but the same in every process."""
    weight = torch.empty(1, config.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    return weight.normal_(0.0, config.initializer_range, generator=generator)


def _hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Refuses what a GGUF file knows and transformers' config cannot say."""
    scaling = checkpoint.config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type") == "factors":
        raise ModelLoadError(
            f"{checkpoint.path}: its rotary factors have no form in transformers; train on the "
            "model's Hugging Face folder, and serve the adapter on either"
        )
    return checkpoint.config
