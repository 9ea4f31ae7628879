"""From WEIGHTS to a running engine: tokenizer, template, device, network, KV budget, fingerprint.

The composition of one worker's inside. Knows no HTTP; the cheap checks come before the weights.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve import environment
from chatserve.config import WorkerConfig, reward_adapters, served_names, split_adapters
from chatserve.engine import determinism
from chatserve.engine.adapters import AdaptableNetwork, AdapterPlace, Adapters
from chatserve.engine.async_engine import AsyncEngine
from chatserve.engine.encoder_serving import load_encoder
from chatserve.engine.engine import Engine
from chatserve.engine.fingerprint import fingerprint
from chatserve.engine.no_answers import NoAnswers
from chatserve.engine.prompt import PromptBuilder
from chatserve.engine.sequence import SamplingParams
from chatserve.engine.served_model import ServedModel
from chatserve.engine.step_size import fit_steps
from chatserve.engine.tokenization import Tokenization
from chatserve.errors import (
    AdapterRefused,
    DoesNotFit,
    ModelLoadError,
    OutOfMemory,
    UsageError,
)
from chatserve.hub import resolve_weights
from chatserve.models import reading
from chatserve.models.adapter_config import merged_adapters
from chatserve.models.chat_template import (
    WeightsFacts,
    choose_template,
    load_template_sources,
)
from chatserve.models.checkpoint import Checkpoint, open_checkpoint
from chatserve.models.device import DevicePolicy, check, choose_policy
from chatserve.models.fallback import FallbackModel
from chatserve.models.fingerprint import weights_fingerprint
from chatserve.models.form import packing_by_file
from chatserve.models.gpus import (
    GPUOptions,
    choose_device_map,
    free_for_tokens,
    show_gpus,
    torch_policy,
)
from chatserve.models.llama import Llama
from chatserve.models.llama_kernels import KernelLlama, num_warm_tokens
from chatserve.models.loader import load_model
from chatserve.models.memory import available_bytes, in_gb
from chatserve.models.memory_plan import MIN_CONTEXT, MemoryPlan, plan_memory
from chatserve.models.merge import merge
from chatserve.models.placed_llama import PlacedLlama
from chatserve.models.pooling_config import default_pooling, refuse_further_modules
from chatserve.models.receipt import MeasuredForm, read_receipt
from chatserve.models.self_check import check_reading
from chatserve.models.templates.jinja import Renderer
from chatserve.models.tokenizer import Tokenizer, load_tokenizer
from chatserve.models.vocabulary_check import (
    num_rows,
    refuse_two_vocabularies,
    warn_of_other_tokenizer,
)
from chatserve.progress import Progress

logger = logging.getLogger(__name__)

# fields of a generation_config.json that are sampling defaults, with what a request may ask for
_GENERATION_DEFAULTS = {
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "top_k": (-1, 1 << 31),
    "repetition_penalty": (0.01, 2),
    "min_p": (0, 1),
}


def load(
    config: WorkerConfig, progress: Progress | None = None, renderer: Renderer | None = None
) -> tuple[AsyncEngine, ServedModel]:
    """Load what `config` asks for; the caller starts the engine inside its event loop.

    renderer: runs the model's own chat template, which this process does without one. The caller
    closes it.
    Raises a `StartupError` whose exit code says what kind of thing is wrong.
    """
    start = time.perf_counter()
    names = served_names(config.weights, config.model_names)
    merged, named = split_adapters(config.adapter)
    rewards = reward_adapters(config.reward_adapter, named)
    place = _adapter_place(names, {**named, **rewards})
    adapter_root = _adapter_root(config)
    path = resolve_weights(config.weights, revision=config.revision, offline=config.offline)
    gpu_options = GPUOptions(
        config.num_gpus, config.gpus, config.max_gpu_memory, config.cpu_offloading
    )
    show_gpus(gpu_options)
    policy = choose_policy(
        config.device, config.dtype, load_8bit=config.load_8bit, load_4bit=config.load_4bit,
        quant_group=config.quant_group, quant_backend=config.quant_backend,
    )  # fmt: skip
    checkpoint = open_checkpoint(path, may_be_encoder=True)
    with closing(checkpoint.weights):
        if checkpoint.is_encoder:
            return load_encoder(config, checkpoint, names, progress)
        if not checkpoint.has_head:
            refuse_further_modules(path)
        checkpoint = merge(checkpoint, merged)
        policy = check(as_the_file(policy, checkpoint, config.dtype))
        logger.info("%s", policy.describe())
        refuse_two_vocabularies(checkpoint)
        tokenizer = load_tokenizer(path, checkpoint.metadata)
        warn_of_other_tokenizer(checkpoint, tokenizer)
        sources = load_template_sources(path, checkpoint.metadata)
        facts = WeightsFacts(path.name, checkpoint.config, num_rows(checkpoint))
        choice = None
        if checkpoint.has_head:
            choice = choose_template(config.conv_template, facts, tokenizer, sources, renderer)
            logger.info("chat template %s: %s", choice.template.name, choice.reason)
        offload_folder = environment.home() / "offload"
        device_map = choose_device_map(
            checkpoint, policy, gpu_options, folder=offload_folder,
            context=config.context_length, max_rows=config.max_num_batched_tokens,
        )  # fmt: skip
        model = load_model(
            checkpoint, torch_policy(policy) if device_map else policy, progress=progress,
            max_rows=config.max_num_batched_tokens, device_map=device_map,
            offload_folder=offload_folder,
        )  # fmt: skip
        policy = model.policy
        is_steady = config.deterministic and not determinism.is_free(model)
        worker_fingerprint = fingerprint(
            checkpoint, policy, tokenizer, choice, sources, system_message=config.conv_system_msg,
            placement=device_map.describe() if device_map else None,
            block_size=determinism.BLOCK_SIZE if is_steady else None,
        )  # fmt: skip
        quality = _quality(path, checkpoint, policy)
        plan = plan_memory(
            checkpoint, policy, context=config.context_length, concurrency=config.max_num_seqs,
            max_rows=config.max_num_batched_tokens,
        )  # fmt: skip
        free_bytes = available_bytes(policy.device)
        if isinstance(model, PlacedLlama):
            logger.info("spread: %s", model.device_map.describe())
            free_bytes = free_for_tokens(model, plan)
        limits = _Limits.of(plan, free_bytes)
        speculates = config.speculation and policy.has_steady_rows and not is_steady
        build = determinism.build_steady_engine if is_steady else Engine
        engine = build(
            model,
            tokenizer,
            num_kv_tokens=limits.num_kv_tokens,
            num_warm_tokens=num_warm_tokens(limits.context_length) if policy.kernels else None,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            seed=config.seed,
            speculation=speculates,
        )
        _try_out(engine, checkpoint.path)
        most = min(config.max_num_batched_tokens, limits.context_length)
        if checkpoint.has_head:
            fit_steps(engine, most, config.token_gap_timeout_s)
        if config.self_check and checkpoint.has_head:
            _let_read(engine, checkpoint, tokenizer, most)
        if config.deterministic:
            logger.info("%s", determinism.price(model, tokenizer))
        adapters = Adapters(checkpoint, _adaptable(model), adapter_root, place)
        for name, folder in named.items():
            adapters.load(name, folder)
        for name, folder in rewards.items():
            adapters.load_reward(name, folder, tokenizer.special_ids)
    prompts: PromptBuilder | NoAnswers
    if choice is None:
        logger.info("%s has no head: it is served for embeddings only", names[0])
        prompts = NoAnswers(names[0], "has no head")
    else:
        prompts = PromptBuilder(
            tokenizer,
            choice.template,
            limits.context_length,
            config.conv_system_msg,
            model_name=names[0],
            vocab_size=model.vocab_size,
        )
    served = ServedModel(
        names=names,
        context_length=limits.context_length,
        vocab_size=model.vocab_size,
        prompts=prompts,
        hidden_size=model.hidden_size,
        pooling=default_pooling(path) or "mean",
        tokenization=Tokenization(tokenizer, prompts, model.vocab_size),
        tokenizer=tokenizer,
        stop=prompts.stop,
        stop_token_ids=prompts.stop_token_ids,
        strip_leading_space=tokenizer.strips_leading_space,
        fingerprint=worker_fingerprint,
        description={
            "device": policy.device.type,
            "dtype": policy.dtype_name,
            "load_8bit": policy.packing is not None and policy.packing.bits == 8,
            "weight_bits": policy.packing.bits if policy.packing else None,
            "packing": str(policy.packing) if policy.packing else None,
            "kernels": policy.kernels.level if policy.kernels else None,
            "reasons": list(policy.reasons),
            "template": choice.template.name if choice else None,
            "embeddings_only": not checkpoint.has_head,
            "adapters": [each.get("name") for each in merged_adapters(checkpoint.config)],
            "native": not isinstance(model, FallbackModel),
            "device_map": device_map.describe() if device_map else None,
            "kv_tokens": limits.num_kv_tokens,
            "memory": {
                "weights_bytes": plan.weights_bytes,
                "kv_bytes": limits.num_kv_tokens * plan.kv_bytes_per_token,
                "activation_bytes": plan.activation_bytes,
                "slack_bytes": plan.slack_bytes,
            },
            "speculation": speculates,
            "deterministic": is_steady or determinism.is_free(model),
            "quality": quality,
        },
        defaults=_generation_defaults(checkpoint) if config.use_generation_config else {},
        adapters=adapters,
    )
    elapsed = time.perf_counter() - start
    logger.info("%s loaded in %.1f s, context %d tokens", names[0], elapsed, served.context_length)
    async_engine = AsyncEngine(
        engine, max_num_seqs=config.max_num_seqs, max_num_waiting=config.max_num_waiting,
        max_num_seqs_per_key=config.max_num_seqs_per_key,
        limits=config,
    )  # fmt: skip
    return async_engine, served


def _adapter_place(names: Sequence[str], adapters: Iterable[str]) -> AdapterPlace:
    """Raises `UsageError` where `adapters` have none beside the model's `names`."""
    place = AdapterPlace.beside(names)
    for number, adapter in enumerate(adapters, 1):
        try:
            place.check(adapter, number)
        except AdapterRefused as error:
            raise UsageError(f"--adapter {adapter}: {error.message}") from error
    return place


def _adapter_root(config: WorkerConfig) -> Path | None:
    """Raises `UsageError` for what is no folder: nothing could ever be loaded from it."""
    if config.adapter_root is None:
        return None
    root = Path(config.adapter_root).expanduser()
    if not root.is_dir():
        raise UsageError(f"--adapter-root {root}: no such folder; make it, or leave the flag out")
    return root


def _adaptable(model: object) -> AdaptableNetwork | None:
    """The model, if it takes adapters beside the base."""
    return model if isinstance(model, KernelLlama | Llama) else None


def as_the_file(policy: DevicePolicy, checkpoint: Checkpoint, dtype: str) -> DevicePolicy:
    """The policy with the file's own packing, where that is the better one."""
    packing = packing_by_file(checkpoint, policy, is_chosen=dtype != "auto")
    if packing == policy.packing:
        return policy
    if policy.packing:
        return dataclasses.replace(policy, packing=packing)
    packed = choose_policy("cpu", load_8bit=True)
    reason = f"{packing} as the file has no more; --dtype bfloat16 unpacks it"
    return dataclasses.replace(packed, packing=packing, reasons=(*packed.reasons, reason))


@dataclass(frozen=True)
class _Limits:
    """How long a sequence may get, and how many tokens all running ones may hold."""

    context_length: int
    num_kv_tokens: int

    @staticmethod
    def of(plan: MemoryPlan, free_bytes: int) -> _Limits:
        """What the plan's pool gets of the memory that the weights have left.

        Raises `DoesNotFit` when not even a short context fits.
        """
        context = plan.context
        fits = plan.kv_tokens_beside(free_bytes)
        if fits < min(MIN_CONTEXT, context):
            raise DoesNotFit(
                f"beside the weights {in_gb(free_bytes)} are left on {plan.device}, of which a "
                f"step takes {in_gb(plan.working_bytes)}: too little for "
                f"{min(MIN_CONTEXT, context)} tokens of context at {plan.kv_bytes_per_token:,} "
                "bytes each; use --load-8bit, a smaller model, or free some memory"
            )
        if fits < context:
            logger.warning(
                "context limited to %d of %d tokens by memory (%d bytes a token)",
                fits, context, plan.kv_bytes_per_token,
            )  # fmt: skip
        return _Limits(min(context, fits), fits)


def _try_out(engine: Engine, path: Path) -> None:
    """Generate two tokens: warms the kernels, and finds weights that compute nothing usable.

    Raises `ModelLoadError` with the engine's own words, `DoesNotFit` where those are of memory.
    """
    engine.add("try-out", [0], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    while engine.has_work:
        for event in engine.step():
            if isinstance(event.error, OutOfMemory):
                raise DoesNotFit(f"{path} loads but cannot generate: {event.error.message}")
            if event.error is not None:
                raise ModelLoadError(
                    f"{path} loads but cannot generate ({event.error.message}); config.json or the "
                    "weights are damaged"
                )


def _quality(path: Path, checkpoint: Checkpoint, policy: DevicePolicy) -> dict[str, Any] | None:
    """What `chatserve quality` has found of these weights in this form, also for the log."""
    receipt = read_receipt(path, weights_fingerprint(checkpoint))
    found = receipt.of_form(MeasuredForm.of(policy)) if receipt else None
    if receipt is None or found is None:
        return None
    logger.info("quality of %s", found.summary())
    return {
        "form": found.form.name,
        "mean_kl": found.mean_kl,
        "p99_kl": found.p99_kl,
        "top1_agreement": found.top1_agreement,
        "perplexity": found.perplexity,
        "reference_perplexity": receipt.reference_perplexity,
        "text": receipt.text.name,
        "num_positions": receipt.text.num_positions,
        "measured_at": receipt.measured_at,
    }


def _let_read(engine: Engine, checkpoint: Checkpoint, tokenizer: Tokenizer, most: int) -> None:
    """Let the loaded weights read a known text of at most `most` tokens.

    Raises `ModelLoadError` when a known fault of conversions explains what they make of it.
    """
    ids = reading.token_ids(tokenizer, reading.COUNTING, most)
    if len(ids) >= reading.MIN_TOKENS and max(ids) < engine.model.vocab_size:
        check_reading(checkpoint, tokenizer, reading.loss(engine.read(ids), ids))


def _generation_defaults(checkpoint: Checkpoint) -> dict[str, float]:
    table = checkpoint.generation_config
    is_greedy = table.get("do_sample") is False
    defaults = {"temperature": 0.0} if is_greedy else {}
    for name, (low, high) in _GENERATION_DEFAULTS.items():
        value = table.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if is_greedy and name != "repetition_penalty":
            continue
        if low <= value <= high:
            defaults[name] = float(value)
        else:  # also NaN and Infinity, which Python's JSON lets through
            logger.warning("generation_config.json: ignored %s %r", name, value)
    return defaults
