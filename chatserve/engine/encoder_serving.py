"""From an encoder's folder to a running engine: tokenizer, device, network, pooling, fingerprint.

The composition of such a worker's inside, as `serving.py` is of one that writes. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from chatserve.config import WorkerConfig
from chatserve.engine.adapters import Adapters
from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.encoder_engine import EncoderEngine
from chatserve.engine.fingerprint import fingerprint
from chatserve.engine.no_answers import NoAnswers
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.served_model import ServedModel
from chatserve.engine.step_size import fit_steps
from chatserve.engine.tokenization import Tokenization
from chatserve.errors import ModelLoadError, UsageError
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.device import DevicePolicy, check, choose_policy
from chatserve.models.encoder_network import (
    load_encoder_network,
    weights_bytes,
    working_bytes,
)
from chatserve.models.pooling_config import encoder_pooling, max_tokens, refuse_further_modules
from chatserve.models.tokenizer import load_tokenizer
from chatserve.progress import Progress

logger = logging.getLogger(__name__)

# flags that change what an encoder does not have
_REFUSED = (
    "load_8bit", "load_4bit", "quant_group", "num_gpus", "max_gpu_memory", "cpu_offloading",
    "adapter", "adapter_root", "reward_adapter", "conv_template", "conv_system_msg",
    "use_generation_config",
)  # fmt: skip
_MAX_TRIED = 512  # tokens: a longer text takes its time


def load_encoder(
    config: WorkerConfig,
    checkpoint: Checkpoint,
    names: Sequence[str],
    progress: Progress | None = None,
) -> tuple[AsyncEngine, ServedModel]:
    """As `serving.load`; the caller closes the checkpoint's weights."""
    start = time.perf_counter()
    path = checkpoint.path
    _refuse_flags(config, path)
    refuse_further_modules(path)
    pooling = encoder_pooling(path)
    longest = max_tokens(path)
    policy = _policy(config)
    tokenizer = load_tokenizer(path)
    # a longer text than a batch has tokens runs alone
    positions = checkpoint.config.get("max_position_embeddings")
    lengths = [each for each in (positions, longest, config.context_length) if each]
    max_rows = max(config.max_num_batched_tokens, min(lengths, default=0))
    network = load_encoder_network(checkpoint, policy, progress=progress, max_rows=max_rows)
    limits = (network.context_length, longest, config.context_length)
    context_length = min(limit for limit in limits if limit is not None)
    if context_length < 1:
        raise ModelLoadError(f"{path}: config.json leaves no position for a token; it is damaged")
    engine = EncoderEngine(
        network,
        context_length=context_length,
        max_num_seqs=1 if config.deterministic else config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    _try_out(engine, path, min(context_length, _MAX_TRIED))
    most = min(config.max_num_batched_tokens, context_length)
    fit_steps(engine, most, config.token_gap_timeout_s)
    prompts = NoAnswers(names[0], "is an encoder")
    served = ServedModel(
        names=names,
        context_length=context_length,
        vocab_size=network.vocab_size,
        prompts=prompts,
        hidden_size=network.hidden_size,
        pooling=pooling,
        is_encoder=True,
        tokenization=Tokenization(tokenizer, prompts, network.vocab_size, is_encoder=True),
        tokenizer=tokenizer,
        stop=prompts.stop,
        stop_token_ids=prompts.stop_token_ids,
        strip_leading_space=False,
        fingerprint=fingerprint(
            checkpoint, policy, tokenizer, None, {}, block_size=1 if config.deterministic else None
        ),
        description={
            "device": policy.device.type,
            "dtype": policy.dtype_name,
            "reasons": list(policy.reasons),
            "native": False,
            "embeddings_only": True,
            "pooling": pooling,
            "memory": {
                "weights_bytes": weights_bytes(checkpoint, policy),
                "activation_bytes": working_bytes(checkpoint, policy, max_rows),
            },
            "deterministic": config.deterministic,
        },
        defaults={},
        adapters=Adapters(checkpoint, None),
    )
    logger.info(
        "%s loaded in %.1f s: an encoder, for embeddings only (%s), texts of %d tokens",
        names[0], time.perf_counter() - start, pooling, context_length,
    )  # fmt: skip
    async_engine = AsyncEngine(
        engine, max_num_seqs=config.max_num_seqs, max_num_waiting=config.max_num_waiting,
        max_num_seqs_per_key=config.max_num_seqs_per_key,
        limits=config,
    )  # fmt: skip
    return async_engine, served


def _policy(config: WorkerConfig) -> DevicePolicy:
    """float32 on a CPU, unless it is told otherwise: vectors are compared, and these are small."""
    policy = choose_policy(config.device, config.dtype)
    if config.dtype == "auto" and policy.device.type == "cpu":
        reasons = (policy.reasons[0], "float32: vectors are compared", *policy.reasons[2:])
        policy = dataclasses.replace(choose_policy(config.device, "float32"), reasons=reasons)
    policy = check(policy)
    logger.info("%s", policy.describe())
    return policy


def _refuse_flags(config: WorkerConfig, path: Path) -> None:
    """Raises `UsageError` naming the first flag that an encoder has no use for."""
    for name in _REFUSED:
        if getattr(config, name):
            raise UsageError(
                f"--{name.replace('_', '-')}: {path.name} is an encoder, which runs whole on one "
                "device, through transformers, and writes no answers; leave the flag out"
            )


def _try_out(engine: EncoderEngine, path: Path, num_tokens: int) -> None:
    """Raises `ModelLoadError` for weights that compute nothing usable."""
    engine.add("try-out", [0] * num_tokens, SamplingParams(max_tokens=0, pooling="mean"))
    for event in engine.step():
        if event.error is not None:
            raise ModelLoadError(
                f"{path} loads but cannot read ({event.error.message}); config.json or the weights "
                "are damaged"
            )
