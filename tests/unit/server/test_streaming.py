"""Events to chunks: what goes over the wire, and that streamed = folded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from chatserve.engine.sequence import SamplingParams, TokenEvent
from chatserve.errors import GenerationFailed, OutOfMemory, Overloaded
from chatserve.models.tool_format import TAGS
from chatserve.protocol.sse import DONE, SSEDecoder
from chatserve.server.choices import Piece, choices_of
from chatserve.server.generation import Generation
from chatserve.server.preparation import Prepared, Prompt
from chatserve.server.streaming import ReplyHead, _Answer, chunk_encoder, fold, stream_frames
from tests.fakes import ANSWER, FakeEngine, FakeStream, FakeTokenizer

TEXT = "".join(ANSWER)


def prepared(
    *, num_choices: int = 1, num_prompts: int = 1, is_chat: bool = True, **details: Any
) -> Prepared:
    prompt = details.pop("prompt", Prompt((1, 2, 3), SamplingParams(max_tokens=100)))
    return Prepared(
        model="m",
        prompts=(prompt,) * num_prompts,
        num_choices=num_choices,
        is_chat=is_chat,
        is_stream=True,
        includes_usage=details.pop("usage", False),
        strip_leading_space=is_chat,
        **details,
    )


def head(is_chat: bool = True) -> ReplyHead:
    return ReplyHead("id-1", 123, "m", "fp", is_chat)


def frames_of(engine: FakeEngine, **shape: Any) -> list[bytes]:
    async def main() -> list[bytes]:
        request = prepared(**shape)
        generation = await Generation.submit(engine, "id-1", request)
        encoder = chunk_encoder(generation, head(request.is_chat))
        choices = choices_of(request, FakeTokenizer(), "id")
        try:
            return [frame async for frame in stream_frames(generation, encoder, choices)]
        finally:
            await generation.aclose()

    return asyncio.run(main())


def folded(engine: FakeEngine, **shape: Any) -> dict[str, Any]:
    async def main() -> dict[str, Any]:
        request = prepared(**shape)
        generation = await Generation.submit(engine, "id-1", request)
        try:
            choices = choices_of(request, FakeTokenizer(), "id")
            return await fold(generation, head(request.is_chat), choices)
        finally:
            await generation.aclose()

    return asyncio.run(main())


def events(frames: Sequence[bytes]) -> list[Any]:
    decoder = SSEDecoder()
    data = [event.data for frame in frames for event in decoder.feed(frame)]
    return [item if item == DONE else json.loads(item) for item in data]


def test_chat_chunks() -> None:
    shared = {
        "id": "id-1", "object": "chat.completion.chunk", "created": 123, "model": "m",
        "system_fingerprint": "fp",
    }  # fmt: skip

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**shared, "choices": [choice]}

    assert events(frames_of(FakeEngine(["a", "b"]))) == [
        chunk({"role": "assistant", "content": "", "refusal": None}),
        chunk({"content": "a"}),
        chunk({"content": "b"}),
        chunk({}, "stop"),
        DONE,
    ]


def test_completion_chunks() -> None:
    first, second, last, done = events(frames_of(FakeEngine(["a", "b"]), is_chat=False))
    assert first == {
        "id": "id-1", "object": "text_completion", "created": 123, "model": "m",
        "system_fingerprint": "fp",
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
    }  # fmt: skip
    assert second["choices"][0]["text"] == "b"
    assert last["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert done == DONE


def usage_with(**counts: int) -> dict[str, Any]:
    return {**counts, "prompt_tokens_details": {"cached_tokens": 0}}


def test_usage_comes_last_with_no_choices() -> None:
    *chunks, usage, done = events(frames_of(FakeEngine(["a", "b"]), usage=True))
    assert usage["choices"] == []
    assert usage["usage"] == usage_with(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert done == DONE


def test_one_write_per_event_and_none_for_silence() -> None:
    frames = frames_of(FakeEngine(["a", "", "", "b"]))
    assert len(frames) == 5  # role, a, b, finish, usage or done
    assert all(frame.endswith(b"\n\n") for frame in frames)


def test_text_and_finish_in_one_event_are_one_write() -> None:
    class Last(FakeEngine):
        def _script(self, seq_id: str, num_prompt: int, params: Any) -> list[TokenEvent]:
            return [TokenEvent(seq_id, "a", (1,), 3, 1, finish_reason="length")]

    role, both, done = frames_of(Last())
    text, finish = events([both])
    assert text["choices"][0]["delta"] == {"content": "a"}
    assert finish["choices"][0]["finish_reason"] == "length"
    assert (events([role])[0]["choices"][0]["delta"]["role"], events([done])) == (
        "assistant",
        [DONE],
    )


@pytest.mark.parametrize(
    "pieces", [["\n\ndata: x\n\n"], ["\r"], ["\u2028"], ['"}]}'], ["\x00"], ["🙂", "你", "é"], [""]]
)
def test_no_text_breaks_a_frame(pieces: list[str]) -> None:
    chunks = events(frames_of(FakeEngine(pieces)))
    assert chunks[-1] == DONE
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == "".join(pieces)


@pytest.mark.parametrize("shape", [{}, {"num_choices": 3}, {"num_prompts": 2, "is_chat": False}])
@pytest.mark.parametrize("step_s", [None, 0])
def test_streamed_equals_folded(shape: dict[str, Any], step_s: float | None) -> None:
    chunks = events(frames_of(FakeEngine(step_s=step_s), usage=True, **shape))[:-1]
    whole = folded(FakeEngine(step_s=step_s), **shape)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        delta = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + delta
        if choice["finish_reason"]:
            assert choice["index"] not in reasons
            reasons[choice["index"]] = choice["finish_reason"]
    for choice in whole["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert text == texts[choice["index"]] == TEXT
        assert choice["finish_reason"] == reasons[choice["index"]] == "stop"
    assert [c["index"] for c in whole["choices"]] == sorted(texts)
    assert whole["usage"] == chunks[-1]["usage"]


def test_whole_chat() -> None:
    assert folded(FakeEngine(["a"])) == {
        "id": "id-1", "object": "chat.completion", "created": 123, "model": "m",
        "system_fingerprint": "fp",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "a", "refusal": None},
             "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": usage_with(prompt_tokens=3, completion_tokens=1, total_tokens=4),
    }  # fmt: skip


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content"),
    [(CALL, None), (f"so {CALL}", "so"), ("just text", "just text"), ("", None)],
)
@pytest.mark.parametrize("num_pieces", [1, 7])
def test_where_tools_are_offered_a_stream_adds_up_to_the_whole(
    text: str, content: str | None, num_pieces: int
) -> None:
    step = max(1, len(text) // num_pieces)
    pieces = [text[i : i + step] for i in range(0, len(text), step)]
    whole = folded(FakeEngine(pieces), tool_format=TAGS)["choices"][0]
    state: ChatCompletionStreamState[Any] = ChatCompletionStreamState()
    chunks = [
        each for each in events(frames_of(FakeEngine(pieces), tool_format=TAGS)) if each != DONE
    ]
    for chunk in chunks:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    assert chunks[0]["choices"][0]["delta"] == {
        "role": "assistant", "content": None, "refusal": None,
    }  # fmt: skip
    streamed = state.get_final_completion().choices[0]
    assert (streamed.message.content, whole["message"]["content"]) == (content, content)
    assert (streamed.finish_reason, streamed.message.refusal) == (whole["finish_reason"], None)
    calls = [
        (each.function.name, each.function.arguments) for each in streamed.message.tool_calls or []
    ]
    assert calls == [
        (each["function"]["name"], each["function"]["arguments"])
        for each in whole["message"].get("tool_calls", [])
    ]


def prompt_ids_of(chunks: Sequence[Any], is_chat: bool) -> list[tuple[int, Any]]:
    """Of which choice, and what; by chunk, in their order."""
    told = []
    for chunk in chunks:
        for choice in [] if chunk == DONE else chunk["choices"]:
            place = chunk if is_chat else choice
            told.append((choice["index"], place.get("prompt_token_ids")))
    return told


@pytest.mark.parametrize("pieces", [["a", "b"], ["", "", "a"], [""]])
@pytest.mark.parametrize(
    "shape", [{}, {"num_choices": 2}, {"num_choices": 2, "num_prompts": 2, "is_chat": False}]
)
def test_the_ids_of_the_prompt_come_once_with_the_first_chunk(
    pieces: list[str], shape: dict[str, Any]
) -> None:
    is_chat = shape.get("is_chat", True)
    chunks = events(frames_of(FakeEngine(pieces), returns_token_ids=True, **shape))
    told = prompt_ids_of(chunks, is_chat)
    num_sequences = shape.get("num_choices", 1) * shape.get("num_prompts", 1)
    for index in range(num_sequences):
        first, *rest = [ids for each, ids in told if each == index]
        assert first == [1, 2, 3] and rest and not any(rest)
    # and nowhere else
    assert not any(ids for _, ids in prompt_ids_of(chunks, not is_chat))
    silent = prompt_ids_of(events(frames_of(FakeEngine(pieces), **shape)), is_chat)
    assert not any(ids for _, ids in silent)


def test_prompt_is_counted_once_for_all_choices() -> None:
    usage = folded(FakeEngine(["a", "b"]), num_choices=3, num_prompts=2)["usage"]
    assert usage == usage_with(prompt_tokens=6, completion_tokens=12, total_tokens=18)


def test_cached_prompt_tokens_count_once_per_prompt() -> None:
    usage = folded(FakeEngine(["a"], num_cached=2), num_choices=3, num_prompts=2)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


@pytest.mark.parametrize("num_choices", [1, 2])
def test_error_after_the_first_byte_ends_without_done(num_choices: int) -> None:
    engine = FakeEngine(["a"], error=OutOfMemory("no room"), hangs=False)
    *_, last = events(frames_of(engine, num_choices=num_choices))
    assert last["error"]["code"] == "out_of_memory" and last["error"]["message"] == "no room"
    assert not engine.running


def test_error_of_a_fold_is_raised() -> None:
    with pytest.raises(OutOfMemory):
        folded(FakeEngine(["a"], error=OutOfMemory("no room")))


class EndsEarly(FakeEngine):
    """An engine with a bug: its streams stop without a last event."""

    def _script(self, seq_id: str, num_prompt: int, params: Any) -> list[TokenEvent]:
        return super()._script(seq_id, num_prompt, params)[:-1]


@pytest.mark.parametrize("num_choices", [1, 2])
def test_sequence_that_just_stops_is_an_error(num_choices: int) -> None:
    *_, last = events(frames_of(EndsEarly(["a"]), num_choices=num_choices))
    assert last["error"]["code"] == "generation_failed"
    with pytest.raises(GenerationFailed):
        folded(EndsEarly(["a"]), num_choices=num_choices)


class Aborts(FakeEngine):
    def _script(self, seq_id: str, num_prompt: int, params: Any) -> list[TokenEvent]:
        return [TokenEvent(seq_id, finish_reason="abort")]


def test_abort_never_goes_over_the_wire() -> None:
    *_, last = events(frames_of(Aborts()))
    assert last["error"]["code"] == "generation_failed"


class Buggy(FakeEngine):
    def submit(self, *arguments: Any, **options: Any) -> FakeStream:
        stream = super().submit(*arguments, **options)
        stream.__class__ = BuggyStream
        return stream


class BuggyStream(FakeStream):
    async def __anext__(self) -> TokenEvent:
        raise KeyError("secret")


@pytest.mark.parametrize("num_choices", [1, 2])
def test_bug_in_a_stream_is_told_without_its_words(num_choices: int) -> None:
    frames = frames_of(Buggy(), num_choices=num_choices)
    assert events(frames)[-1]["error"]["code"] == "internal_error"
    assert b"secret" not in b"".join(frames)


def test_refused_submission_leaves_nothing_running() -> None:
    class Refuses(FakeEngine):
        def submit(self, *arguments: Any, **options: Any) -> FakeStream:
            if len(self.submitted) == 2:
                raise Overloaded("full")
            return super().submit(*arguments, **options)

    engine = Refuses(hangs=True)
    with pytest.raises(Overloaded):
        folded(engine, num_choices=3)
    assert len(engine.aborted) == 2 and not engine.running


def test_choices_are_told_apart_and_prompts_have_ids_of_their_own() -> None:
    engine = FakeEngine(["a"])
    folded(engine, num_choices=2, num_prompts=2)
    assert [s.seq_id for s in engine.submitted] == ["id-1-0-0", "id-1-0-1", "id-1-1-0", "id-1-1-1"]
    assert [s.choice for s in engine.submitted] == [0, 1, 0, 1]


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("num_read", [0, 1, 2, 3])
def test_closing_early_aborts_every_sequence(num_choices: int, num_read: int) -> None:
    engine = FakeEngine(["a", "b", "c"], hangs=True, step_s=0)

    async def main() -> None:
        generation = await Generation.submit(engine, "id-1", prepared(num_choices=num_choices))
        encoder = chunk_encoder(generation, head())
        async with aclosing(stream_frames(generation, encoder)) as frames:
            for _ in range(num_read):
                await anext(frames)
        await generation.aclose()
        await generation.aclose()

    asyncio.run(main())
    assert sorted(engine.aborted) == [f"id-1-{i}" for i in range(num_choices)]


def test_scores_of_a_prompt_are_no_first_token(caplog: pytest.LogCaptureFixture) -> None:
    class Scores(FakeEngine):
        def _script(self, seq_id: str, num_prompt: int, params: Any) -> list[TokenEvent]:
            return [TokenEvent(seq_id), TokenEvent(seq_id, finish_reason="length")]

    async def main() -> None:
        generation = await Generation.submit(Scores(), "id-1", prepared())
        await fold(generation, head())
        generation.log_summary()

    with caplog.at_level("INFO"):
        asyncio.run(main())
    assert "ttft_ms=- tpot_ms=- finish=length" in caplog.text


def test_cancelling_in_the_middle_aborts() -> None:
    engine = FakeEngine(["a"], hangs=True)

    async def main() -> None:
        generation = await Generation.submit(engine, "id-1", prepared(num_choices=2))
        try:
            async with asyncio.timeout(0.05):
                await fold(generation, head())
        except TimeoutError:
            pass
        finally:
            await generation.aclose()

    asyncio.run(main())
    assert len(engine.aborted) == 2


def test_ids_are_gathered_in_one_list() -> None:
    """A new one for each token would cost the square of their number."""
    answer = _Answer()
    answer.add(Piece("a", token_ids=(1,)), TokenEvent("x"))
    gathered = answer.token_ids
    answer.add(Piece("b", token_ids=(2, 3)), TokenEvent("x"))
    assert answer.token_ids is gathered == [1, 2, 3]
