"""The answers of the API as types, for the OpenAPI document and whoever builds them.

Text only: nothing here is checked while serving. A test holds real answers against them.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ErrorDetail(TypedDict):
    """What went wrong: a sentence for people, the field at fault, a code for programs."""

    message: str
    type: ErrorType
    param: str | None
    code: str


class ErrorReply(TypedDict):
    """Every error, whole or as the last event of a stream (no `[DONE]` follows it)."""

    error: ErrorDetail


class ModelMemory(TypedDict):
    """By the plan of the worker; encoders have no keys and values."""

    weights_bytes: int
    activation_bytes: int
    kv_bytes: NotRequired[int]
    slack_bytes: NotRequired[int]


class ModelQuality(TypedDict):
    """What `chatserve quality` has measured of these weights in this form; divergences in nats."""

    form: str
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    text: str
    num_positions: int
    measured_at: str


class ModelDetails(TypedDict):
    """Beyond OpenAI. While a model is loading there is only `context_length`, which is null then.

    Of each: `context_length` in tokens and `fingerprint`. Of an adapter: `adapter`, the fingerprint
    of its own numbers, and `trained_on`, the base that its files name; of a reward model, which
    writes nothing, `reward_model`, too. Of a base: `reasons` for its
    device and form, the names of `adapters` that are merged into it, whether it is `native` or run
    by transformers, whether the `kernels` compute it and at which level, whether its answers are
    `deterministic` whatever else is asked for. Of an encoder: `pooling`.

    A controller adds the `state` of the model, and of its memory the `bytes`, once they are known.
    """

    context_length: int | None
    fingerprint: NotRequired[str]
    adapter: NotRequired[str]
    trained_on: NotRequired[str]
    device: NotRequired[str]
    dtype: NotRequired[str]
    load_8bit: NotRequired[bool]
    weight_bits: NotRequired[int | None]
    packing: NotRequired[str | None]
    kernels: NotRequired[str | None]
    reasons: NotRequired[list[str]]
    template: NotRequired[str | None]
    embeddings_only: NotRequired[bool]
    reward_model: NotRequired[bool]
    adapters: NotRequired[list[str | None]]
    native: NotRequired[bool]
    device_map: NotRequired[str | None]
    kv_tokens: NotRequired[int]
    memory: NotRequired[ModelMemory]
    speculation: NotRequired[bool]
    deterministic: NotRequired[bool]
    quality: NotRequired[ModelQuality | None]
    pooling: NotRequired[str]
    state: NotRequired[str]
    bytes: NotRequired[int | None]


class Model(TypedDict):
    """A model, or a model with an adapter (`parent` is the model then)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    chatserve: ModelDetails


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class DeletedModel(TypedDict):
    id: str
    object: Literal["model"]
    deleted: Literal[True]


class PromptTokensDetails(TypedDict):
    """`cached_tokens`: prompt tokens whose keys and values were still there."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens; a prompt counts once, however many choices continue it.

    With `rank_by`: how many tokens the reward model has read, beside those.

    With `truncation`: by how many tokens the prompt became shorter, and the places of the messages
    that were dropped.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    ranking_tokens: NotRequired[int]
    prompt_tokens_dropped: NotRequired[int]
    messages_dropped: NotRequired[list[int]]


class Live(TypedDict):
    status: Literal["live"]
    proof: NotRequired[str]


class ModelReadiness(TypedDict):
    name: str
    state: str
    loaded_bytes: int
    total_bytes: int


class Ready(TypedDict):
    status: Literal["loading", "ready", "draining"]
    models: list[ModelReadiness]


class Decoding(TypedDict):
    """A worker says how far its engine is, a controller which workers are stalled."""

    status: Literal["decoding", "stalled", "loading"]
    tick: NotRequired[int]
    last_token_age_s: NotRequired[float]
    num_running: NotRequired[int]
    num_waiting: NotRequired[int]
    stalled: NotRequired[list[str]]


FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TypedDict):
    """One token of an answer, and the likeliest that might have stood in its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    content: list[TokenLogprob] | None
    refusal: NotRequired[None]


class FunctionCall(TypedDict):
    """`arguments` is JSON in a text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(TypedDict):
    """`content` is null where tools were offered and there is no text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """`score`: what the reward model of `rank_by` says; the best choice comes first."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    score: NotRequired[float]
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """`system_fingerprint`: of weights, form, template and engine."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: NotRequired[str]


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: NotRequired[FunctionDelta]


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    refusal: NotRequired[None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


class ChatCompletionChunk(TypedDict):
    """`usage` only where `stream_options.include_usage` asks for it: null but in the last chunk.

    `prompt_token_ids` with the role of each choice, where `return_token_ids` asks for them.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class TextLogprobs(TypedDict):
    """One entry a token; the first token of an echoed prompt has no logprob."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    """`score` as in a chat."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    score: NotRequired[float]
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class TextCompletion(TypedDict):
    """An answer, or one chunk of it: `finish_reason` is null until a choice ends.

    `prompt_token_ids` of a choice are in the first of its chunks.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class EmbeddingUsage(TypedDict):
    """`prompt_tokens_dropped` where `truncate_prompt_tokens` was given."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_dropped: NotRequired[int]


class Embedding(TypedDict):
    """Numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingReply(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Score(TypedDict):
    object: Literal["score"]
    index: int
    score: float


class ScoreReply(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    data: list[Score]
    model: str
    usage: EmbeddingUsage


class TokenizeReply(TypedDict):
    """`token_strs` where `return_token_strs` asks for them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(TypedDict):
    prompt: str
