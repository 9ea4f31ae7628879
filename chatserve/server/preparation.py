"""From the bytes of a request to prompt ids and sampling params: the CPU work before the engine.

Pure and synchronous, to be run off the event loop. Knows no engine and no response.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import orjson

from chatserve.engine.grammar import Grammar, GrammarSpec
from chatserve.engine.rolling import Rolled
from chatserve.engine.sequence import LoadedAdapter, SamplingParams
from chatserve.engine.tokenization import MAX_BYTES_PER_TOKEN
from chatserve.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter
from chatserve.models.tool_format import ToolFormat
from chatserve.protocol.chat import ChatMessage, ChatRequest, parse_chat
from chatserve.protocol.completions import CompletionRequest, parse_completion
from chatserve.protocol.fields import Priority
from chatserve.protocol.sampling_request import SamplingRequest
from chatserve.server.adapted import find_writer
from chatserve.server.contract import ServedModel
from chatserve.server.ranking import Ranking, chat_ranking, completion_ranking
from chatserve.server.tagged_arguments import Kinds, argument_kinds
from chatserve.server.tool_grammar import tool_grammar

COMPLETION_MAX_TOKENS = 16
MAX_SCORES = 1 << 20
"""Numbers that the scored prompts of one request may take in its answer: some 100 MB of memory."""


class CompileGrammar(Protocol):
    """Compiles what answers must match, for whoever has this salt; it takes its time."""

    def __call__(self, *, salt: bytes = b"") -> Coroutine[Any, Any, Grammar]: ...


@dataclass(frozen=True)
class Prompt:
    """One prompt, to be continued `num_choices` times with the same params.

    `text` goes in front of the answers.
    """

    ids: tuple[int, ...]
    params: SamplingParams
    text: str = ""


@dataclass(frozen=True)
class Prepared:
    """A request that can be submitted. Choice k of prompt p has index p * num_choices + k.

    `num_dropped` of a prompt's choices are not returned: those that `ranking` rates lowest, or,
    without one, the least likely.
    `rolled` says what gave way to the prompt, where that was asked for.
    `compile_grammar` gives what its answers must match, `tool_format` says how they call tools,
    `argument_kinds` how they write arguments that are no JSON.
    `is_replay`: it repeats an answer, for whoever compares the two.
    """

    model: str
    prompts: tuple[Prompt, ...]
    num_choices: int
    is_chat: bool
    is_stream: bool
    includes_usage: bool
    strip_leading_space: bool
    adapter: LoadedAdapter | None = None
    num_dropped: int = 0
    is_echo: bool = False
    shows_logprobs: bool = False
    has_usage_in_chunks: bool = False
    rolled: Rolled | None = None
    returns_token_ids: bool = False
    compile_grammar: CompileGrammar | None = None
    tool_format: ToolFormat | None = None
    priority: Priority = "interactive"
    argument_kinds: Kinds = field(default_factory=dict)
    is_replay: bool = False
    ranking: Ranking | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


def prepare_chat(body: bytes, model: ServedModel) -> Prepared:
    """Validate a chat request, render its template, encode it.

    Raises `InvalidRequest` and its children, `ModelNotFound`.
    """
    return prepare_chat_request(parse_chat(body), model, rolling="rolling")


def prepare_chat_request(
    request: ChatRequest, model: ServedModel, *, rolling: str | None = None
) -> Prepared:
    """The same, of a chat that has been validated. Raises as `prepare_chat` does.

    `rolling`: the `truncation` that drops the oldest turns, as the client would write it.
    """
    adapter = _check_common(request, model)
    try:
        rolled = chat_prompt(request, model)
        max_tokens = _room(request, model, len(rolled.ids))
    except ContextLengthExceeded as error:
        if rolling is None or request.truncation == "rolling" or not _has_turns(request):
            raise
        raise ContextLengthExceeded(
            f'{error.message}, or drop the oldest turns with truncation: "{rolling}"',
            param=error.param,
        ) from None
    # what would begin another turn in text may stand in JSON
    ends_turns = () if _is_all_form(request) else model.stop
    params = _sampling_params(
        request, model, max_tokens, stop=(*request.stop, *ends_turns),
        logprobs=_chosen_by(request, request.num_top),
    )  # fmt: skip
    ranking = chat_ranking(request, model, rolled.messages_dropped)
    if ranking is not None:
        params = ranking.with_room(0, params, request.asked_tokens, model, "messages")
    if request.offers_tools and (marks := model.prompts.tool_marks):
        params = replace(params, shown={token_id: mark for mark, token_id in marks.items()})
    return _prepared(
        request,
        [Prompt(tuple(rolled.ids), params)],
        adapter,
        rolled=rolled if request.truncation == "rolling" else None,
        ranking=ranking,
        is_chat=True,
        strip_leading_space=model.strip_leading_space and not request.is_open,
        shows_logprobs=request.num_top is not None,
        **_answer_form(request, model),
    )


def _is_all_form(request: ChatRequest) -> bool:
    """Whether a grammar holds all of the answer, and no part of it is free text."""
    if request.grammar is not None:
        return True
    return request.offers_tools and request.tool_choice.mode == "required"


def _has_turns(request: ChatRequest) -> bool:
    """Whether there are earlier turns that could be dropped."""
    return sum(message.role == "user" for message in request.messages) > 1


def _answer_form(request: ChatRequest, model: ServedModel) -> dict[str, Any]:
    """What the answer must match, and how it calls tools where there are any."""
    after_space = model.strip_leading_space and not request.is_open
    if not request.offers_tools:
        grammar = _compiling(request.grammar, model, after_space=after_space)
        return {"compile_grammar": grammar}
    tool_format = model.prompts.tool_format
    spec = tool_grammar(
        request,
        tool_format,
        control_id=model.prompts.tool_control_id,
        marks=model.prompts.tool_marks,
        after_space=after_space,
    )
    if request.grammar is not None:
        # JSON may have any text in it, that of calls, too
        tool_format = replace(tool_format, follows_text=False)
    return {
        "compile_grammar": _compiling(spec, model),
        "tool_format": tool_format,
        "argument_kinds": argument_kinds(request.tools, tool_format),
    }


def chat_prompt(request: ChatRequest, model: ServedModel) -> Rolled:
    """The prompt of a chat. Raises `ContextLengthExceeded`."""
    tools = [tool.definition for tool in request.tools] if request.offers_tools else []
    if request.truncation == "rolling":
        return model.prompts.rolling_chat(
            request.messages, request.asked_tokens, is_open=request.is_open, tools=tools
        )
    _check_num_bytes(sum(map(_num_bytes, request.messages)), model, "messages")
    return Rolled(model.prompts.chat(request.messages, is_open=request.is_open, tools=tools))


def _num_bytes(message: ChatMessage) -> int:
    calls = [call.arguments for call in message.tool_calls]
    return len(message.content.encode()) + (len(orjson.dumps(calls)) if calls else 0)


def _room(request: ChatRequest, model: ServedModel, num_prompt_tokens: int) -> int:
    """How long the answer may be. The field at fault goes by the name that the client used."""
    try:
        return model.prompts.max_tokens(num_prompt_tokens, request.asked_tokens)
    except ContextLengthExceeded as error:
        if request.max_completion_tokens is None:
            raise
        name = "max_completion_tokens"
        raise ContextLengthExceeded(error.message.replace("max_tokens", name), param=name) from None


def prepare_completion(body: bytes, model: ServedModel) -> Prepared:
    """Validate a text completion request and encode its prompts. Raises as `prepare_chat` does."""
    request = parse_completion(body)
    adapter = _check_common(request, model)
    prompts = [_completion_prompt(prompt, request, model) for prompt in request.prompt]
    ranking = completion_ranking(request.rank_by, request.prompt, model)
    if ranking is not None:
        prompts = [
            replace(
                prompt,
                params=ranking.with_room(
                    place, prompt.params, request.asked_tokens, model, "prompt"
                ),
            )
            for place, prompt in enumerate(prompts)
        ]
    _check_num_scores(prompts, request)
    return _prepared(
        request,
        prompts,
        adapter,
        ranking=ranking,
        is_chat=False,
        strip_leading_space=False,
        shows_logprobs=request.logprobs is not None,
        is_echo=bool(request.echo),
        compile_grammar=_compiling(
            request.grammar, model, after_space=bool(request.replay and request.replay.after_space)
        ),
        is_replay=request.replay is not None,
    )


def _check_num_scores(prompts: Sequence[Prompt], request: CompletionRequest) -> None:
    if not request.echo or request.logprobs is None:
        return
    num_tokens = sum(len(prompt.ids) for prompt in prompts) * request.num_tries
    num_scores = num_tokens * (1 + request.logprobs)
    if num_scores > MAX_SCORES:
        raise InvalidRequest(
            f"logprobs {request.logprobs} of {num_tokens:,} echoed tokens are {num_scores:,} "
            f"numbers, the limit is {MAX_SCORES:,}; lower it or send fewer prompts at once",
            param="logprobs",
        )


def _completion_prompt(
    prompt: str | list[int], request: CompletionRequest, model: ServedModel
) -> Prompt:
    _check_prompt(prompt, model)
    ids = model.prompts.completion(prompt, is_answered=request.asked_tokens != 0)
    if not ids:
        raise InvalidRequest("prompt is empty; send at least one token", param="prompt")
    max_tokens = model.prompts.max_tokens(len(ids), request.asked_tokens)
    if request.asked_tokens is None:
        max_tokens = min(max_tokens, COMPLETION_MAX_TOKENS)
    params = _sampling_params(
        request,
        model,
        max_tokens,
        stop=request.stop,
        logprobs=_chosen_by(request, request.logprobs),
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    if not request.echo:
        return Prompt(tuple(ids), params)
    text = prompt if isinstance(prompt, str) else model.tokenizer.decode(ids)
    return Prompt(tuple(ids), params, text)


def _chosen_by(request: SamplingRequest, logprobs: int | None) -> int | None:
    """`logprobs` as they were asked for, or as they are needed to choose among answers."""
    is_choosing = request.num_tries > request.num_choices and request.rank_by is None
    return 0 if logprobs is None and is_choosing else logprobs


def _compiling(
    spec: GrammarSpec | None, model: ServedModel, *, after_space: bool = False
) -> CompileGrammar | None:
    """How to compile `spec`, if there is one; it takes its time, and is awaited."""
    if spec is None:
        return None
    if model.grammars is None:
        raise UnsupportedParameter(
            f"{spec.param} is not offered by this server; leave it out", param=spec.param
        )
    return partial(model.grammars.compile, spec, after_space=after_space)


def _prepared(
    request: SamplingRequest, prompts: list[Prompt], adapter: LoadedAdapter | None, **shape: Any
) -> Prepared:
    return Prepared(
        model=request.model,
        prompts=tuple(prompts),
        is_stream=request.is_stream,
        includes_usage=request.includes_usage,
        has_usage_in_chunks=request.has_usage_in_chunks,
        returns_token_ids=bool(request.return_token_ids),
        priority=request.priority or "interactive",
        adapter=adapter,
        num_choices=request.num_tries,
        num_dropped=request.num_tries - request.num_choices,
        **shape,
    )


def _check_common(request: SamplingRequest, model: ServedModel) -> LoadedAdapter | None:
    """What all requests must obey; the adapter that this one names."""
    adapter = find_writer(model, request.model)
    for token_id in request.logit_bias:
        if token_id >= model.vocab_size:
            raise InvalidRequest(
                f"logit_bias: there is no token {token_id}, the vocabulary has {model.vocab_size}",
                param=f"logit_bias.{token_id}",
            )
    highest = max(request.stop_token_ids, default=0)
    if highest >= model.vocab_size:
        raise InvalidRequest(
            f"stop_token_ids: there is no token {highest}, the vocabulary has {model.vocab_size}",
            param="stop_token_ids",
        )
    return adapter


def _check_prompt(prompt: str | list[int], model: ServedModel) -> None:
    if isinstance(prompt, str):
        _check_num_bytes(len(prompt.encode()), model, "prompt")
        return
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"prompt: there is no token {token_id}, the vocabulary has {model.vocab_size}",
                param="prompt",
            )


def _check_num_bytes(num_bytes: int, model: ServedModel, param: str) -> None:
    # cheaper than the tokenizer, whose time grows with the text
    limit = model.context_length * MAX_BYTES_PER_TOKEN
    if num_bytes > limit:
        raise ContextLengthExceeded(
            f"{param} has {num_bytes:,} bytes, which cannot fit into the {model.context_length:,} "
            f"tokens of {model.names[0]}; shorten it",
            param=param,
        )


def _sampling_params(
    request: SamplingRequest,
    model: ServedModel,
    max_tokens: int,
    *,
    stop: tuple[str, ...],
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens:,}, but the answer may have {max_tokens:,} tokens at most; "
            "lower it or raise max_tokens",
            param="min_tokens",
        )
    usual = SamplingParams()

    def value(name: str) -> float:
        asked: float | None = getattr(request, name)
        return asked if asked is not None else model.defaults.get(name, getattr(usual, name))

    return SamplingParams(
        temperature=value("temperature"),
        top_p=value("top_p"),
        top_k=max(0, int(value("top_k"))),
        min_p=value("min_p"),
        repetition_penalty=value("repetition_penalty"),
        presence_penalty=value("presence_penalty"),
        frequency_penalty=value("frequency_penalty"),
        logit_bias=request.logit_bias,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=stop,
        stop_token_ids=(
            *request.stop_token_ids,
            *(() if request.ignore_eos else model.stop_token_ids),
        ),
        ignore_eos=bool(request.ignore_eos),
        seed=request.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
