"""A sequence that was begun elsewhere goes on as if it had been here, from wherever it was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import orjson
import pytest

from chatserve.engine.determinism import build_steady_engine
from chatserve.engine.engine import Engine
from chatserve.engine.grammar import GrammarOrigin
from chatserve.engine.output import OutputText
from chatserve.engine.sampler_state import SamplerState, split_mix
from chatserve.engine.sequence import Begun, SamplingParams, TokenEvent
from chatserve.engine.turn import Live
from chatserve.errors import ContextLengthExceeded, InvalidRequest
from chatserve.grammar.matcher import Grammar
from chatserve.grammar.source import to_llguidance
from chatserve.grammar.vocabulary import Vocabulary
from chatserve.models.checkpoint import open_checkpoint
from chatserve.models.device import choose_policy
from chatserve.models.loader import load_model
from chatserve.models.tool_format import TAGS
from chatserve.protocol.chat import parse_chat
from chatserve.server.tool_grammar import tool_grammar
from tests import tiny
from tests.unit.engine.ledger import LedgerModel
from tests.unit.engine.scripted import NUM_KV_TOKENS, ByteTokenizer, drain, scripted_engine, text

PROMPT = [5, 6, 7, 8] * 12
Build = Callable[[], Engine]


def begun(events: Sequence[TokenEvent], **changes: Any) -> Begun:
    """What a journal says of `events`."""
    return Begun(
        units=tuple(event.token_ids for event in events),
        logprobs=tuple(event.logprobs for event in events),
        num_cached_tokens=events[0].num_cached_tokens,
        has_ended=events[-1].is_last,
        **changes,
    )


def whole(
    engine: Engine, params: SamplingParams, prompt: list[int] = PROMPT, **options: Any
) -> list[TokenEvent]:
    engine.add("a", prompt, params, **options)
    return drain(engine)["a"]


def gone_on(
    engine: Engine,
    events: Sequence[TokenEvent],
    params: SamplingParams,
    prompt: list[int] = PROMPT,
    **options: Any,
) -> list[TokenEvent]:
    """All events again, the first of them from a journal."""
    said = engine.add("a", prompt, params, begun=begun(events), **options)
    return [*said, *drain(engine).get("a", ())]


def check(
    build: Build, params: SamplingParams, prompt: list[int] = PROMPT, **options: Any
) -> list[TokenEvent]:
    """Cut everywhere; nothing may differ from what was not cut. Returns that."""
    events = whole(build(), params, prompt, **options)
    for place in range(1, len(events) + 1):
        engine = build()
        free = engine.num_free_kv_tokens
        again = gone_on(engine, events[:place], params, prompt, **options)
        assert again == events, place
        assert engine.num_free_kv_tokens == free and not engine.has_work
    return events


# --- text: units cut anywhere in characters, stop strings and ends ---

SCRIPT = " Hello, wörld 🙂 END"


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({}, SCRIPT),
        ({"stop": ("END",)}, " Hello, wörld 🙂 "),
        ({"stop": ("🙂 END!", "wör", "rld")}, " Hello, "),
        ({"stop": ("🙂 ENDLESS", "ENDS")}, SCRIPT),  # withheld to the end, and shown after all
        ({"max_tokens": 10}, " Hello, w"),  # in the middle of a character
        ({"max_tokens": 30, "min_tokens": 30}, SCRIPT + "\0" + SCRIPT[:6]),
        ({"stop_token_ids": (ord("N"),)}, " Hello, wörld 🙂 E"),
        ({"ignore_eos": True, "max_tokens": 30}, SCRIPT + SCRIPT[:6]),
        ({"max_tokens": 1}, " "),
        ({"logprobs": 2, "stop": ("D",)}, " Hello, wörld 🙂 EN"),
    ],
)
def test_a_text_goes_on(params: dict[str, Any], shown: str, strips: bool) -> None:
    options = SamplingParams(**{"temperature": 0, "max_tokens": 64, **params})
    events = check(
        lambda: scripted_engine(SCRIPT)[0], options, PROMPT[:4], strip_leading_space=strips
    )
    assert text(events) == (shown.removeprefix(" ") if strips else shown)


def test_an_answer_without_tokens_goes_on_to_nothing() -> None:
    params = SamplingParams(max_tokens=0)
    [event] = check(lambda: scripted_engine(SCRIPT)[0], params)
    assert event.finish_reason == "length" and not event.token_ids


# --- grammars: the place in one ---

VOCABULARY = Vocabulary(
    (*(bytes([each]) for each in range(256)), *[b""] * (tiny.VOCAB_SIZE - 256)), (tiny.EOS_ID,)
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def grammar(kind: str, source: str) -> Grammar:
    inner = to_llguidance(kind, source, after_space=False)
    return Grammar.compile(VOCABULARY.build(), inner, GrammarOrigin(kind, source))


def tools(choice: str) -> Grammar:
    """Of calls that must come, or of a text in which they may: a lazy grammar."""
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
    request = parse_chat(orjson.dumps({**body, "tools": [TOOL], "tool_choice": choice}))
    return grammar("tools", tool_grammar(request, TAGS).source)


def digits(length: int) -> Grammar:
    return grammar("regex", f"[0-9]{{1,{length}}}")


GRAMMARS: dict[str, Callable[[], Grammar]] = {
    "regex": lambda: grammar("regex", "(ab|ba){3,9}"),
    "choice": lambda: grammar("choice", '["one", "oneself", "only"]'),
    "schema": lambda: grammar("json_schema", orjson.dumps(TOOL["function"]["parameters"]).decode()),
    "called": lambda: tools("required"),
    "lazy": lambda: tools("auto"),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_an_answer_that_must_match_goes_on(name: str) -> None:
    params = SamplingParams(seed=3, max_tokens=24, grammar=GRAMMARS[name]())
    check(lambda: Engine(LedgerModel(), ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS), params)


def test_a_call_goes_on_after_free_text() -> None:
    """The lazy grammar holds the answer from the marker on."""
    call = 'So: <tool_call>\n{"name": "add", "arguments": {"a": 12, "b": "yy"}}\n</tool_call>'
    params = SamplingParams(temperature=0, max_tokens=200, grammar=tools("auto"))
    events = check(lambda: scripted_engine(call)[0], params, PROMPT[:4])
    assert text(events) == call and events[-1].finish_reason == "stop"


# --- numbers: every sampler, on every kind of network ---

SAMPLERS = {
    "greedy": SamplingParams(temperature=0, repetition_penalty=1.4),
    "sampled": SamplingParams(seed=5, temperature=0.6, top_k=9),
    "min_p": SamplingParams(seed=5, min_p=0.05, frequency_penalty=0.7),
    "biased": SamplingParams(seed=6, temperature=1.7, logit_bias={7: 4.0, 8: -100.0}),
    "presence": SamplingParams(seed=7, top_p=0.7, presence_penalty=-1.5, repetition_penalty=0.8),
    "minimum": SamplingParams(seed=8, min_tokens=6, stop=("a", "e")),
    "hot": SamplingParams(seed=9, temperature=2.0, presence_penalty=2.0, frequency_penalty=-2.0),
}
HOUSES: dict[str, dict[str, Any]] = {
    "kernels": {"load_8bit": True},
    "kernels-4bit": {"load_4bit": True},
    # these round a row otherwise when there are more of them: `--deterministic`
    "torch": {},
    "fallback": {"model_type": "gpt_neox"},
}


@pytest.fixture(scope="module", params=HOUSES)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Engines whose rows are the same alone and among others."""
    options = dict(HOUSES[request.param])
    model_type = options.pop("model_type", "llama")
    policy = choose_policy("cpu", "float32", **options)
    if options and policy.kernels is None:
        pytest.skip("the CPU kernels are not here")
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder, model_type, tokenizer=False)
    checkpoint = open_checkpoint(folder)
    with closing(checkpoint.weights):
        model = load_model(checkpoint, policy)
    make = Engine if options else build_steady_engine
    return lambda: make(model, ByteTokenizer(), num_kv_tokens=2048, max_num_batched_tokens=64)


def test_tokens_go_on(house: Build) -> None:
    """All samplers in one batch, cut together at every place."""
    runs = {name: replace(params, max_tokens=12, logprobs=3) for name, params in SAMPLERS.items()}

    def run(said: Mapping[str, Sequence[TokenEvent]]) -> dict[str, list[TokenEvent]]:
        engine = house()
        again = {
            name: list(
                engine.add(
                    name, PROMPT, params, choice=number, group="all",
                    begun=begun(said[name]) if said.get(name) else None,
                )
            )
            for number, (name, params) in enumerate(runs.items())
        }  # fmt: skip
        for name, events in drain(engine).items():
            again[name] += events
        return again

    undisturbed = run({})
    for place in range(1, 13):
        cut = {name: events[:place] for name, events in undisturbed.items()}
        assert run(cut) == undisturbed, place


# --- the queue: blocks, neighbours, drafts ---


def test_blocks_that_are_there_are_not_computed_again() -> None:
    model = LedgerModel()
    engine = Engine(model, ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS, block_size=4)
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    events = whole(engine, params)
    before = model.num_computed_tokens
    assert gone_on(engine, events[:30], params) == events
    # all but the last block of what was said, and what came then
    assert model.num_computed_tokens - before <= 4 + 10


def test_it_goes_on_before_those_who_wait() -> None:
    def build() -> Engine:
        return Engine(LedgerModel(), ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS, max_num_seqs=1)

    params = SamplingParams(seed=1, max_tokens=9, ignore_eos=True)
    events = whole(build(), params)
    engine = build()
    for name in ("b", "c"):
        engine.add(name, PROMPT[:8], params)
    engine.step()
    assert len(engine.add("a", PROMPT, params, begun=begun(events[:4]))) == 4
    order = []
    while engine.has_work:
        order += [event.seq_id for event in engine.step() if event.is_last]
    assert order == ["b", "a", "c"]


@pytest.mark.parametrize("num_blocks", [18, 20, 30])
def test_it_may_be_preempted_again(num_blocks: int) -> None:
    def build(blocks: int = 500) -> Engine:
        return Engine(LedgerModel(), ByteTokenizer(), num_kv_tokens=4 * blocks, block_size=4)

    params = SamplingParams(seed=1, max_tokens=24, ignore_eos=True)
    events = whole(build(), params)
    engine = build(num_blocks)
    others = {name: replace(params, seed=number) for number, name in enumerate("bc", 2)}
    for name, other in others.items():
        engine.add(name, PROMPT[:8], other)
    engine.step()
    said = engine.add("a", PROMPT, params, begun=begun(events[:10]))
    assert [*said, *drain(engine)["a"]] == events
    assert engine.num_free_kv_tokens == 4 * num_blocks


def test_with_drafts_the_text_is_the_same() -> None:
    """How many tokens come at once depends on the drafts before."""
    params = SamplingParams(temperature=0, max_tokens=60)

    def build() -> Engine:
        return scripted_engine("to and fro and to and fro and on", eos=False, speculation=True)[0]

    events = whole(build(), params, PROMPT[:4])
    assert len(events) < 60
    for place in range(1, len(events)):
        again = gone_on(build(), events[:place], params, PROMPT[:4])
        assert text(again) == text(events)
        assert again[-1].num_generated_tokens == 60
        assert ids(again) == ids(events)


def ids(events: Sequence[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


# --- what cannot have been ---

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.mark.parametrize(
    ("units", "has_ended", "params", "why"),
    [
        ([(65,), (tiny.VOCAB_SIZE,)], False, {}, "has token 320 of 320"),
        ([(-1,)], False, {}, "has token -1"),
        ([(65,), (tiny.EOS_ID,)], False, {}, "ends where its tokens do not"),
        ([(65,), (66,)], True, {}, "ends where its tokens do not"),
        ([(65, tiny.EOS_ID, 66)], False, {}, "goes on behind its end"),
        ([(65,), (tiny.EOS_ID,), (66,)], False, {}, "goes on where they end"),
        ([(65,), (66,)], False, {"max_tokens": 1}, "goes on where they end"),
        ([(65, 66)], True, {"stop": ("A",)}, "goes on behind its end"),
        ([(65,)], False, {"grammar": digits(3)}, "has token 65"),
    ],
)
def test_a_journal_that_cannot_be_is_refused(
    units: list[tuple[int, ...]], has_ended: bool, params: dict[str, Any], why: str
) -> None:
    engine = scripted_engine("text")[0]
    told = Begun(tuple(units), tuple(() for _ in units), has_ended=has_ended)
    with pytest.raises(InvalidRequest, match=why) as caught:
        engine.add("a", PROMPT, replace(GREEDY, **params), begun=told)
    assert caught.value.param == "journal"
    # nothing is left of it
    assert not engine.has_work
    engine.add("a", PROMPT[:4], GREEDY)
    assert text(drain(engine)["a"]) == "text"


def test_one_that_does_not_fit_is_refused_before_it_is_read() -> None:
    engine = Engine(LedgerModel(), ByteTokenizer(), num_kv_tokens=64)
    with pytest.raises(ContextLengthExceeded):
        engine.add("a", PROMPT, replace(GREEDY, max_tokens=50), begun=Begun(((-1,),), ((),)))


# --- teeth: all that a sequence remembers counts ---


def fresh_state(engine: Engine, live: Live) -> None:
    sequence = live.sequence
    live.state = SamplerState(
        sequence.params, sequence.prompt_ids, seed=sequence.seed, choice=sequence.choice,
        end_ids=ByteTokenizer.eos_ids, vocab_size=tiny.VOCAB_SIZE,
    )  # fmt: skip


def fresh_output(engine: Engine, live: Live) -> None:
    live.output = OutputText(ByteTokenizer(), live.sequence.params.stop)


def fresh_seed(engine: Engine, live: Live) -> None:
    live.sequence.seed += 1
    live.state.record.stream = split_mix(live.sequence.seed, 0)


def fresh_place(engine: Engine, live: Live) -> None:
    live.state.record.position -= 1


@pytest.mark.parametrize(
    ("forget", "params", "script"),
    [
        (fresh_state, {"temperature": 0, "repetition_penalty": 1.9}, ""),
        (fresh_state, {"temperature": 0, "frequency_penalty": 2.0}, "aab"),
        (fresh_state, {"temperature": 0, "min_tokens": 9}, "ab"),
        (fresh_state, {"seed": 2, "grammar": digits(6)}, ""),
        (fresh_seed, {"seed": 2}, ""),
        (fresh_place, {"seed": 2}, ""),
        (fresh_output, {"temperature": 0}, "a🙂bö"),
        (fresh_output, {"temperature": 0, "stop": ("lo w",)}, "hello world"),
    ],
)
def test_what_is_forgotten_changes_what_comes_next(
    forget: Callable[[Engine, Live], None], params: dict[str, Any], script: str
) -> None:
    options = SamplingParams(**{"max_tokens": 12, **params})

    def build() -> Engine:
        if script:
            return scripted_engine(script, eos="frequency_penalty" not in params)[0]
        return Engine(LedgerModel(), ByteTokenizer(), num_kv_tokens=NUM_KV_TOKENS)

    events = check(build, options, PROMPT[:4])
    changed = 0
    for place in range(1, len(events)):
        engine = build()
        said = engine.add("a", PROMPT[:4], options, begun=begun(events[:place]))
        forget(engine, engine._live["a"])
        changed += [*said, *drain(engine)["a"]] != events
    assert changed
