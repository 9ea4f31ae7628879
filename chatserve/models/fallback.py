"""Any causal model that transformers knows, behind the native network's interface.

Slower, and said so at load: sequences run one after another, weights pass through a state dict.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from chatserve.errors import GenerationFailed, ModelLoadError
from chatserve.models.batch import Batch, Segment
from chatserve.models.config import architectures, refuse_quantized
from chatserve.models.device import DevicePolicy
from chatserve.models.kv_pool import Placement, TorchKVPool
from chatserve.models.linear import build_matrix

logger = logging.getLogger(__name__)

# Layers are listed one by one as soon as transformers reads a config, so their number is bounded.
_MAX_LAYERS = 4096
_LABEL_KEYS = ("num_labels", "id2label", "label2id")  # of classifiers, listed in the same way
_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


class FallbackModel:
    """A transformers model driven one segment at a time over the engine's own KV cache."""

    def __init__(self, model: Any, policy: DevicePolicy) -> None:
        self._model = model
        self.policy = policy
        self.device = policy.device
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.hidden_size = int(model.get_input_embeddings().weight.shape[-1])

    def build_kv_pool(self, num_blocks: int, block_size: int) -> TorchKVPool:
        return TorchKVPool(num_blocks, block_size, self.device)

    def forward(self, batch: Batch, pool: TorchKVPool) -> torch.Tensor:
        """As `Llama.forward`."""
        ids = torch.tensor(batch.token_ids, device=self.device)
        positions = torch.tensor(batch.positions, device=self.device)
        num_layers = self._model.config.get_text_config().num_hidden_layers
        logits = []
        for segment in batch.segments:
            rows = [row - segment.start for row in batch.output_rows if row in _span(segment)]
            cache = _cache_over(segment, pool, num_layers)
            inputs = {
                "input_ids": ids[segment.rows][None],
                "position_ids": positions[segment.rows][None],
                "past_key_values": cache,
                "use_cache": True,
            }
            wanted = [row for row in batch.hidden_rows if row in _span(segment)]
            if wanted:
                output = self._model.base_model(**inputs)
            else:
                kept = torch.tensor(rows or [0], device=self.device)
                output = self._model(**inputs, logits_to_keep=kept)
            if output.past_key_values is not cache or segment.num_past + segment.num_tokens != (
                cache.get_seq_length()
            ):
                raise GenerationFailed(
                    f"{type(self._model).__name__} does not keep keys and values as chatserve "
                    "needs them; this architecture is not supported"
                )
            if wanted and batch.hidden is not None:
                states = _last_states(output, type(self._model).__name__)
                first = batch.hidden_rows.index(wanted[0])
                batch.hidden[first : first + len(wanted)] = states[
                    [row - segment.start for row in wanted]
                ]
            elif rows:
                logits.append(output.logits[0])
        if not logits:
            return torch.empty(0, self.vocab_size, device=self.device, dtype=self.policy.dtype)
        return torch.cat(logits)


def load_fallback(
    config: Mapping[str, Any], state: dict[str, torch.Tensor], policy: DevicePolicy
) -> FallbackModel:
    """Build the transformers model of `config` around the tensors of `state`, which is emptied.

    Raises `ModelLoadError` when transformers does not know the architecture, or names and shapes of
    the weights do not match it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging as hf_logging

    hf_config = read_hf_config(config)
    hf_logging.disable_progress_bar()  # the loader draws its own
    with refusals("transformers cannot load this model"):
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)].from_pretrained(
            None,
            config=hf_config,
            state_dict=state,
            dtype=policy.dtype,
            attn_implementation="eager" if policy.attention == "plain" else None,
            output_loading_info=True,
        )
    state.clear()  # a matrix that is packed leaves nothing behind
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"the weights lack {len(missing)} tensors of {type(model).__name__}, first {missing[0]}"
        )
    if getattr(model, "_is_stateful", False):
        raise ModelLoadError(
            f"{type(model).__name__} keeps a running state instead of keys and values; "
            "chatserve runs attention models only"
        )
    model.eval().requires_grad_(False)
    if policy.int8:
        replaced = _compress(model, policy)
        logger.info("int8: %d linear layers packed", replaced)
    model.to(policy.device)
    with refusals("transformers cannot load this model"):
        return FallbackModel(model, policy)


def read_hf_config(config: Mapping[str, Any]) -> Any:
    """The transformers config object of a `config.json`.

    Raises `ModelLoadError` when its architecture is not a causal model that transformers knows.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    name = next(iter(architectures(config)), model_type)
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelLoadError(
            f"unknown architecture {name!r} (model_type {model_type!r}): chatserve runs the Llama "
            "family natively and causal models that the installed transformers knows; "
            "code that comes with a model is never run"
        )
    return plain_hf_config(config)


def plain_hf_config(config: Mapping[str, Any]) -> Any:
    """The same of a model type that transformers is known to know."""
    from transformers import AutoConfig

    refuse_quantized(config)
    known = _plain_values(config)
    model_type = known.pop("model_type")
    with refusals(f"config.json of {next(iter(architectures(config)), model_type)!r}"):
        return AutoConfig.for_model(model_type, **known)


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Whatever transformers raises over a model's files becomes one line of `ModelLoadError`."""
    try:
        yield
    except ModelLoadError:
        raise
    # It checks little and computes with the rest: KeyError, AttributeError, ZeroDivisionError and
    # errors of its own all mean that the files are not what it expects.
    except Exception as error:
        raise ModelLoadError(f"{what}: {type(error).__name__}: {_first_line(error)}") from error


def _plain_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the keys that choose code: an attention implementation may be a download."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith(("_implementation", "_implementation_internal")):
            continue
        if key in _LABEL_KEYS or key in ("auto_map", "quantization_config"):
            continue
        if key in _LAYER_KEYS and type(value) is int and value > _MAX_LAYERS:
            raise ModelLoadError(
                f"config.json: {key} is over {_MAX_LAYERS}, which no model has; the file is damaged"
            )
        plain[key] = _plain_values(value) if isinstance(value, Mapping) else value
    return plain


class _PackedLinear(nn.Module):
    """A packed matrix in the place of an `nn.Linear`, for inputs of any leading shape."""

    def __init__(self, linear: nn.Linear, policy: DevicePolicy) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        self._packed = build_matrix(rows, columns, bias=linear.bias is not None, policy=policy)
        self._packed.load_rows(0, linear.weight)
        if self._packed.bias is not None:
            self._packed.bias.load_rows(0, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._packed(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _compress(model: nn.Module, policy: DevicePolicy) -> int:
    """Replace every `nn.Linear` but a head that shares the embedding's matrix."""
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    tied = {id(embedding.weight) for embedding in embeddings}
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in tied
    ]
    for name in names:  # not the modules: each would keep its half precision until the last
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, own, _PackedLinear(getattr(module, own), policy))
    return len(names)


def _last_states(output: Any, name: str) -> torch.Tensor:
    """(T, hidden). Raises `GenerationFailed` where there are none."""
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise GenerationFailed(f"{name} does not tell its hidden states: it makes no embeddings")
    return cast(torch.Tensor, states[0])


def _span(segment: Segment) -> range:
    return range(segment.start, segment.start + segment.num_tokens)


def _cache_over(segment: Segment, pool: TorchKVPool, num_layers: int) -> Any:
    """A transformers `Cache` whose layers store into the segment's blocks."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class LayerView(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
        """One layer of the pool; grows by `update` alone."""

        is_sliding = False

        def __init__(self, layer: int, placement: Placement, length: int) -> None:
            super().__init__()
            self.is_initialized = True
            self._layer, self._placement, self._length = layer, placement, length

        def lazy_initialization(self, *arguments: Any, **options: Any) -> None:
            """Nothing to prepare: the tensors are the pool's."""

        def update(
            self, keys: torch.Tensor, values: torch.Tensor, *arguments: Any, **options: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = (keys[0].transpose(0, 1), values[0].transpose(0, 1))
            pool.store(self._layer, self._placement, *rows)
            all_keys, all_values = pool.read(self._layer, self._placement.spans[0])
            self._length += keys.shape[-2]
            return all_keys[None], all_values[None]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self._length + query_length, 0

        def get_seq_length(self) -> int:
            return self._length

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length  # its name before transformers 5.20

    placement = pool.place([segment])
    return Cache(
        layers=[LayerView(index, placement, segment.num_past) for index in range(num_layers)]
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
