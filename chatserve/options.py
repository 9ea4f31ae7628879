"""Settings that commands share, in the groups that `--help` shows; `config` puts them together."""

from __future__ import annotations

from dataclasses import dataclass

from chatserve.settings import setting

MAX_CONNECTIONS = 65536
INT64 = 2**63
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelOptions:
    """Which weights, where, and in which form. Shared by `chat`, `serve` and `worker`."""

    device: str = setting(
        "auto", "where the model runs", choices=("auto", "cpu", "cuda", "mps"), group="model",
        refused={
            "xpu": "there are no kernels for Intel GPUs; use --device cpu",
            "npu": "there are no kernels for Ascend NPUs; use --device cpu",
        },
    )  # fmt: skip
    dtype: str = setting(
        "auto", "half-precision or full-precision weights", choices=DTYPES, group="model"
    )
    load_8bit: bool = setting(
        False, "compress the weights to packed int8 while loading", group="model"
    )
    load_4bit: bool = setting(
        False, "compress them to packed int4: smaller and faster, less exact (CPU)", group="model"
    )
    quant_group: str | None = setting(
        None, "with --load-8bit: a scale per 32 weights, and 16-bit activations (CPU)",
        group="model", choices=("32",),
    )  # fmt: skip
    quant_backend: str = setting(
        "native", "whose products take compressed weights on CUDA", group="model",
        choices=("native", "bitsandbytes"),
    )  # fmt: skip
    num_gpus: int | None = setting(
        None, "spread the model over so many GPUs; default: those of --gpus, else one",
        group="model", metavar="N", ge=1, le=64,
    )  # fmt: skip
    gpus: str | None = setting(
        None, "which GPUs may be used, by number, as in 0,2", group="model", metavar="A,B"
    )
    max_gpu_memory: str | None = setting(
        None, "weights on each GPU take at most so much, as in 13GiB", group="model",
        metavar="SIZE",
    )  # fmt: skip
    cpu_offloading: bool = setting(
        False, "keep layers that no GPU has room for in main memory, or on the disk",
        group="model",
    )  # fmt: skip
    adapter: tuple[str, ...] = setting(
        (), "folder of a LoRA adapter to merge while loading, several in their order; with a name "
        "it is served beside the base, as BASE:NAME",
        group="model", metavar="[NAME=]PATH", repeated=True,
    )  # fmt: skip
    adapter_root: str | None = setting(
        None, "folder below which /v1/load_lora_adapter may load adapters; none without it",
        group="model", metavar="FOLDER",
    )  # fmt: skip
    conv_template: str | None = setting(
        None, "chat template by name (`chatserve template` lists them)", group="model",
        metavar="NAME",
    )  # fmt: skip
    conv_system_msg: str | None = setting(
        None, "system message used when a chat brings none", group="model",
        flags=("--system",), metavar="TEXT",
    )  # fmt: skip
    context_length: int | None = setting(
        None, "cap the context below the model's own, in tokens", group="model", metavar="TOKENS",
        ge=1,
    )  # fmt: skip
    revision: str = setting("main", "revision of a hub id", group="model")
    offline: bool = setting(False, "never touch the network", group="model")
    self_check: bool = setting(
        True, "let the weights read a known text at start; refuse those that a conversion spoilt",
        group="model",
    )  # fmt: skip
    use_generation_config: bool = setting(
        False, "take sampling defaults from the model's generation_config.json", group="model"
    )


@dataclass(frozen=True)
class RankingOptions:
    """Which reward models stand beside the base."""

    reward_adapter: tuple[str, ...] = setting(
        (), "folder of a reward model's LoRA adapter, with its score head: it ranks answers "
        '(rank_by: "NAME") and scores texts at /v1/score, as BASE:NAME',
        group="model", metavar="NAME=PATH", repeated=True,
    )  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the scheduler."""

    max_num_seqs: int = setting(
        16, "sequences generated at once", group="engine", flags=("--limit-worker-concurrency",
        "--limit-model-concurrency"), metavar="N", ge=1, le=4096,
    )  # fmt: skip
    max_num_batched_tokens: int = setting(
        512, "tokens of one step: decode first, the rest for prefill", group="engine", metavar="N",
        ge=1, le=65536,
    )  # fmt: skip
    max_num_waiting: int = setting(
        64, "requests that may wait before new ones get 429", group="engine", metavar="N",
        ge=1, le=65536,
    )  # fmt: skip
    max_num_seqs_per_key: int | None = setting(
        None, "answers of one API key at once, running and waiting; default: all that there is "
        "room for, but no flood keeps another key out", group="engine", metavar="N", ge=1, le=65536,
    )  # fmt: skip
    speculation: bool = setting(
        True, "guess tokens from what a text has said before; it comes sooner and stays the same "
        "(where a batch does not change the rounding: on the CPU kernels, and in float32)",
        group="engine",
    )  # fmt: skip
    prepare_grammars: bool = setting(
        True, "build what structured output and tools need before the worker is ready; else with "
        "the first of them, and all streams stand still meanwhile", group="engine",
    )  # fmt: skip
    deterministic: bool = setting(
        False, "let no request's text depend on what else runs, bit for bit: free on the CPU "
        "kernels, elsewhere sequences run one by one (the log tells the price)", group="engine",
    )  # fmt: skip
    replay_log: bool = setting(
        False, "keep what it takes to repeat an answer, prompts among it, in a private file of "
        "CHATSERVE_HOME; `chatserve replay ID` repeats it", group="engine",
    )  # fmt: skip
    seed: int | None = setting(
        None, "base seed for requests that bring none", group="engine", metavar="N",
        ge=-INT64, le=INT64 - 1,
    )  # fmt: skip


@dataclass(frozen=True)
class TimeLimits:
    """How long requests may wait and take; 0 is without a limit."""

    queue_timeout_s: float = setting(
        600.0, "seconds a request may wait for its turn; 0: without limit", group="limits",
        metavar="S", ge=0, le=86400,
    )  # fmt: skip
    first_token_timeout_s: float = setting(
        0.0, "seconds from a request's arrival to its first token; 0: without limit",
        group="limits", metavar="S", ge=0, le=86400,
    )  # fmt: skip
    token_gap_timeout_s: float = setting(
        30.0, "seconds between two tokens, or between two steps of the engine, after which it "
        "counts as stalled; 0: without limit", group="limits", metavar="S", ge=0, le=86400,
    )  # fmt: skip
    request_timeout_s: float = setting(
        0.0, "seconds a whole answer may take; 0: without limit", group="limits", metavar="S",
        ge=0, le=86400,
    )  # fmt: skip


@dataclass(frozen=True)
class DrainOptions:
    """How a server ends."""

    drain_timeout_s: float = setting(
        30.0, "seconds that answers under way may take to finish once the server is told to stop",
        group="limits", metavar="S", ge=0, le=3600,
    )  # fmt: skip


@dataclass(frozen=True)
class ApiOptions:
    """What requests may hold."""

    lenient: bool = setting(
        False, "leave out fields of requests that chatserve does not know or support, and list them"
        " in a header of the answer, instead of refusing the request",
        group="api",
    )  # fmt: skip


@dataclass(frozen=True)
class KeepingOptions:
    """What is kept of requests by whoever clients talk to."""

    store_responses: bool = setting(
        True, "keep answers of /v1/responses, with what they answer to, for 30 days in a private "
        "file of CHATSERVE_HOME, so that previous_response_id can go on from them",
        group="api",
    )  # fmt: skip
    store_conversations: bool = setting(
        True, "keep conversations and votes of the web page in a private file of the user's data "
        "folder, apart for each API key; without, they stay in the browser",
        group="api",
    )  # fmt: skip


@dataclass(frozen=True)
class LoadingOptions:
    """Which models a server has beside those it starts with, and who makes room for whom."""

    models: tuple[str, ...] = setting(
        (), "further WEIGHTS, comma-separated, or NAME=WEIGHTS, that wait to be loaded: by "
        "`chatserve load`, or with --auto-load by who asks for them", group="models",
        metavar="A,B",
    )  # fmt: skip
    auto_load: bool = setting(
        False, "load a model when a request asks for it; models that nobody uses make room",
        group="models",
    )  # fmt: skip
    max_loaded_bytes: str | None = setting(
        None, "memory of all loaded models together, as in 16GB; default: what is free",
        group="models", metavar="SIZE",
    )  # fmt: skip
    keep_alive: str | None = setting(
        None, "with --auto-load: unload a model that nobody has used for so long, as in 30m or 2h; "
        "default: never", group="models", metavar="TIME",
    )  # fmt: skip
    load_timeout_s: float = setting(
        300.0, "seconds that a request without `stream` waits for its model to load; a stream "
        "is told how far it is, and waits on", group="models", metavar="S", ge=0, le=86400,
    )  # fmt: skip


@dataclass(frozen=True)
class ListenOptions:
    """How connections are taken, and what is said of them."""

    max_connections: int = setting(
        256, "open connections at once; more are told to come back", group="network",
        metavar="N", ge=8, le=MAX_CONNECTIONS,
    )  # fmt: skip
    write_timeout_s: float = setting(
        30.0, "seconds that a client may leave its answer unread before it is cut; 0: for ever",
        group="limits", metavar="S", ge=0, le=86400,
    )  # fmt: skip
    ssl_certfile: str | None = setting(
        None, "serve https with this certificate chain, in PEM form", group="security",
        metavar="FILE",
    )  # fmt: skip
    ssl_keyfile: str | None = setting(
        None, "its private key, where the certificate's file does not hold it", group="security",
        metavar="FILE",
    )  # fmt: skip
    log_format: str = setting(
        "text", "lines for people, or one JSON object a line", choices=("text", "json"),
        group="logging",
    )  # fmt: skip
    otlp_traces_endpoint: str | None = setting(
        None, "send OpenTelemetry traces there, OTLP over HTTP, as in "
        "http://127.0.0.1:4318/v1/traces (needs chatserve[otel])", group="logging", metavar="URL",
    )  # fmt: skip
