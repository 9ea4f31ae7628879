"""GrammarCompiler and its trial process: limits, hostile specs, caching, processes that die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from chatserve.engine.grammar import Grammar
from chatserve.errors import GenerationFailed, InvalidRequest, Overloaded
from chatserve.grammar import compiler as compiler_module
from chatserve.grammar.compiler import GrammarCompiler
from chatserve.grammar.trial_process import Failed, Passed, TrialProcess
from chatserve.grammar.vocabulary import Vocabulary
from chatserve.protocol.response_format import GrammarSpec, Kind, read_grammar, read_schema
from tests.grammars import BYTES, END_ID, allowed_ids

VOCAB_SIZE = len(BYTES.tokens)
SLOW = {"allOf": [{"type": "string", "pattern": f".*a.{{{n}}}"} for n in range(10, 30)]}

AMBIGUOUS = "start: {}\n{}".format(
    " | ".join(f'r{n} "y"' for n in range(400)),
    "\n".join(f'r{n}: "x" r{n} | "x"' for n in range(400)),
)


class ByteTokenizer:
    eos_ids = frozenset({END_ID})
    forbidden_ids = frozenset({65})

    def token_bytes(self, token_id: int) -> bytes:
        return BYTES.tokens[token_id]


class CountingTrial(TrialProcess):
    """Notes what it is asked; `gate` holds it up."""

    def __init__(self, gate: threading.Event | None = None, **options: Any) -> None:
        super().__init__(lambda: BYTES, **options)
        self.sources: list[str] = []
        self.gate = gate

    def run(self, kind: str, source: str, *, after_space: bool) -> Passed | Failed:
        self.sources.append(source)
        if self.gate is not None:
            assert self.gate.wait(20)
        return super().run(kind, source, after_space=after_space)


def build(trial: TrialProcess) -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer(), VOCAB_SIZE, trial=trial)


@pytest.fixture
def trial() -> Iterator[CountingTrial]:
    trial = CountingTrial()
    yield trial
    trial.end()


@pytest.fixture
def compiler(trial: CountingTrial) -> Iterator[GrammarCompiler]:
    compiler = build(trial)
    yield compiler
    compiler.close()


def spec(source: str, kind: Kind = "regex") -> GrammarSpec:
    return GrammarSpec(kind, source, "guided_regex")


def compile_one(compiler: GrammarCompiler, spec: GrammarSpec) -> Grammar:
    return asyncio.run(compiler.compile(spec))


def refusal(compiler: GrammarCompiler, spec: GrammarSpec) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        compile_one(compiler, spec)
    assert caught.value.param == spec.param
    assert caught.value.message.startswith(spec.param) and "\n" not in caught.value.message
    return caught.value


def test_a_repeated_spec_is_tried_and_compiled_once(
    compiler: GrammarCompiler, trial: CountingTrial
) -> None:
    first = compile_one(compiler, spec("a+"))
    assert compile_one(compiler, spec("a+")) is first
    assert refusal(compiler, spec("(")).message == refusal(compiler, spec("(")).message
    assert trial.sources == ["a+", "("]


def test_requests_that_wait_for_the_same_spec_share_it(trial: CountingTrial) -> None:
    async def ask() -> None:
        compiler = build(trial)
        trial.gate = threading.Event()
        before = asyncio.create_task(compiler.compile(spec("b")))
        await asyncio.sleep(0)
        asking = [asyncio.create_task(compiler.compile(spec("a+"))) for _ in range(3)]
        await asyncio.sleep(0)
        asking[0].cancel()  # its client has left
        await asyncio.sleep(0)
        trial.gate.set()
        _, second, third = await asyncio.gather(*asking, return_exceptions=True)
        assert second is third and not isinstance(second, BaseException)
        await before
        compiler.close()

    asyncio.run(ask())
    assert trial.sources == ["b", "a+"]


def test_the_oldest_is_forgotten_by_number_and_by_size(
    compiler: GrammarCompiler, trial: CountingTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_CACHED", 2)
    for source in ("a", "b", "a", "c", "a", "b"):
        compile_one(compiler, spec(source))
    assert trial.sources == ["a", "b", "c", "b"]
    monkeypatch.setattr(compiler_module, "MAX_CACHED_BYTES", 0)
    trial.sources.clear()
    for source in ("d", "d"):
        compile_one(compiler, spec(source))
    assert trial.sources == ["d", "d"]


HOSTILE: list[tuple[Kind, str, str]] = [
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", r"a\b", "lookarounds"),
    ("regex", "[", "regex parse error"),
    ("regex", "(" * 5000 + "a" + ")" * 5000, "regex"),
    ("lark", 'x: "a"', "no start rule"),
    ("lark", 'start: "a" | foo', "foo"),
    ("lark", "start: @answer", "matches no answer"),
    ("lark", 'start: T\nT: "a" T', "circular"),
    ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
    ("lark", "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(60))
     + '\nT60: "a"', "too big"),
    ("gbnf", "root ::= missing", "missing"),
    ("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested too deeply"),
    ("json_schema", json.dumps({"$ref": "#"}), "matches no answer"),
    ("json_schema", json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
     "matches no answer"),
    ("json_schema", json.dumps({"oneOf": [{}, {}]}), "anyOf"),
    ("json_schema", json.dumps({"type": "integer", "multipleOf": 10**9 + 7}), "too large"),
    ("json_schema", json.dumps({"type": "string", "pattern": "(" * 2000 + ")" * 2000}), "regex"),
    ("json_schema", json.dumps({"enum": [f"value{n}" for n in range(60_000)]}),
     "the limit is 32 MB"),
]  # fmt: skip
HARMLESS: list[tuple[Kind, str]] = [
    ("regex", "a{1000000000}"),
    ("regex", "((a{1000}){1000}){1000}"),
    ("regex", "(a|aa)+b"),
    ("regex", "é" * 50_000),  # more than a socket holds
    ("regex", "(a|b)*a(a|b){40}"),
    ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60))
     + '\nr60: "a"'),
    ("json_schema", json.dumps({"type": "array", "items": {}, "minItems": 10**9})),
    ("json_schema", json.dumps({"type": "string", "maxLength": 10**9})),
    ("json_schema", json.dumps({"type": "object", "minProperties": 10**9})),
]  # fmt: skip


ONE_OF = {"oneOf": [{"minimum": 1}, {"maximum": 3}]}
MANY = {"properties": {"a": ONE_OF, "b": {"items": [{}, ONE_OF]}, "c": {"const": ONE_OF}}}
IN_TOOLS = (
    f'start: call_0\ncall_0: "f" arguments_0 | "g" "<b>" argument_2_1\n'
    f'arguments_0: %json {json.dumps(MANY)}\nargument_2_1: (%json {json.dumps(ONE_OF)} "x")'
)
FIRST = "tools[0].function.parameters.properties"


@pytest.mark.parametrize(
    ("kind", "source", "places"),
    [
        ("json_schema", json.dumps(ONE_OF), "oneOf"),
        ("json_schema", json.dumps(MANY), "properties.a.oneOf, properties.b.items[1].oneOf"),
        ("json_schema", json.dumps({"anyOf": [ONE_OF] * 4}),
         "anyOf[0].oneOf, anyOf[1].oneOf, anyOf[2].oneOf, ..."),
        ("tools", IN_TOOLS, f"{FIRST}.a.oneOf, {FIRST}.b.items[1].oneOf, "
         "tools[2].function.parameters.oneOf"),
    ],
)  # fmt: skip
def test_parts_of_one_of_that_overlap_are_refused_with_their_places(
    compiler: GrammarCompiler, kind: Kind, source: str, places: str
) -> None:
    message = refusal(compiler, GrammarSpec(kind, source, "field")).message
    assert message == (
        f"field has a oneOf ({places}) whose parts are not plainly disjoint; give each a property "
        "with another const, or use anyOf"
    )


def test_hostile_specs_are_refused_and_cost_the_process_nothing(
    compiler: GrammarCompiler, trial: CountingTrial
) -> None:
    compile_one(compiler, spec("a"))
    pid = trial.pid
    for kind, source, word in HOSTILE:
        assert word in refusal(compiler, spec(source, kind)).message, source[:80]
    for kind, source in HARMLESS:
        compile_one(compiler, spec(source, kind))
    assert trial.pid == pid


def test_what_takes_too_long_is_refused_and_its_process_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trial = CountingTrial(seconds=0.3)
    compiler = build(trial)
    slow = read_schema(SLOW, "response_format.json_schema.schema")
    assert "took longer than 0.3 s" in refusal(compiler, slow).message
    assert trial.pid is not None and not psutil.Process(trial.pid).children()
    refusal(compiler, slow)
    assert len(trial.sources) == 1
    # a busy machine is no reason to refuse it for ever
    monkeypatch.setattr(compiler_module, "LATE_S", -1.0)
    again = read_schema({**SLOW, "title": "other"}, "guided_json")
    for _ in range(2):
        refusal(compiler, again)
    assert len(trial.sources) == 3
    compiler.close()


def test_what_takes_too_much_memory_is_refused() -> None:
    trial = CountingTrial(num_bytes=8 << 20)
    compiler = build(trial)
    many = read_schema({"enum": [f"value{i}" for i in range(9_000)]}, "guided_json")
    assert "needs more than 8 MB" in refusal(compiler, many).message
    compile_one(compiler, spec("a"))
    compiler.close()


def test_what_stays_too_large_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_GRAMMAR_BYTES", 1 << 20)
    many = read_schema({"enum": [f"value{i}" for i in range(9_000)]}, "guided_json")
    assert "the limit is 1 MB" in refusal(compiler, many).message


def test_a_grammar_that_grows_at_each_token_is_refused(compiler: GrammarCompiler) -> None:
    ambiguous = read_grammar(AMBIGUOUS, "guided_grammar")
    assert ambiguous is not None
    assert "too ambiguous" in refusal(compiler, ambiguous).message


def test_a_process_that_died_is_replaced(compiler: GrammarCompiler, trial: CountingTrial) -> None:
    compile_one(compiler, spec("a"))
    assert trial.pid is not None
    process = psutil.Process(trial.pid)
    process.kill()
    process.wait(20)
    compile_one(compiler, spec("b"))
    assert trial.pid != process.pid


def test_a_process_that_hangs_is_killed_and_replaced() -> None:
    trial = CountingTrial(seconds=0.2, patience_s=0.2)
    compiler = build(trial)
    trial.run("regex", "a", after_space=False)
    hanging = trial.pid
    assert hanging is not None
    os.kill(hanging, signal.SIGSTOP)
    assert "took longer" in refusal(compiler, spec("b")).message
    assert not psutil.pid_exists(hanging) and trial.pid is None
    compiler.close()


def test_a_process_that_cannot_start_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/missing/python")
    compiler = build(CountingTrial())
    with pytest.raises(GenerationFailed, match="did not start"):
        compile_one(compiler, spec("a"))
    monkeypatch.undo()
    compile_one(compiler, spec("a"))
    compiler.close()


def test_too_many_specs_at_once_are_turned_away(
    trial: CountingTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_WAITING", 2)
    trial.gate = threading.Event()

    async def ask() -> None:
        compiler = build(trial)
        waiting = [asyncio.create_task(compiler.compile(spec(each))) for each in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 grammars"):
            await compiler.compile(spec("c"))
        assert trial.gate is not None
        trial.gate.set()
        await asyncio.gather(*waiting)
        await compiler.compile(spec("c"))
        compiler.close()

    asyncio.run(ask())


def test_one_key_leaves_room_for_another(
    trial: CountingTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_WAITING_OF_ONE", 2)
    gate = trial.gate = threading.Event()

    async def ask() -> None:
        compiler = build(trial)
        asked = [(each, b"me") for each in "aabb"] + [("a", b"you"), ("c", b"you")]
        asked += [(each, b"") for each in "efg"]  # nobody has keys here
        waiting = [
            asyncio.create_task(compiler.compile(spec(source), salt=salt)) for source, salt in asked
        ]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 grammars and schemas of this API key"):
            await compiler.compile(spec("d"), salt=b"me")
        for task in waiting[2:4]:
            task.cancel()
        await asyncio.wait(waiting[2:4])
        waiting[2:4] = [asyncio.create_task(compiler.compile(spec("d"), salt=b"me"))]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*waiting)
        compiler.close()

    asyncio.run(ask())
    assert trial.sources == ["a", "c", "e", "f", "g", "d"]


def test_what_nobody_waits_for_is_not_begun(trial: CountingTrial) -> None:
    gate = trial.gate = threading.Event()

    async def ask() -> None:
        compiler = build(trial)
        first = asyncio.create_task(compiler.compile(spec("a")))
        await asyncio.sleep(0)
        leaving = [asyncio.create_task(compiler.compile(spec("b"))) for _ in range(2)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        gate.set()
        await first
        await compiler.compile(spec("c"))
        assert trial.sources == ["a", "c"]
        await compiler.compile(spec("b"))
        compiler.close()

    asyncio.run(ask())


def test_closing_ends_the_process_and_fails_what_is_being_tried() -> None:
    trial = CountingTrial(seconds=60)

    async def ask() -> None:
        compiler = build(trial)
        await compiler.compile(spec("a"))
        assert trial.pid is not None
        process = psutil.Process(trial.pid)
        slow = asyncio.create_task(compiler.compile(read_schema(SLOW, "guided_json")))
        while not process.children():
            await asyncio.sleep(0.001)
        children = process.children()
        for child in children:
            child.suspend()  # it would end by itself some time
        compiler.close()
        with pytest.raises(GenerationFailed):
            await slow
        assert not process.is_running()
        assert not psutil.wait_procs(children, timeout=20)[1]

    asyncio.run(ask())


def test_the_process_ends_with_its_parent() -> None:
    code = (
        "from tests.unit.grammar.test_compiler import CountingTrial\n"
        "trial = CountingTrial()\n"
        "trial.run('regex', 'a', after_space=False)\n"
        "print(trial.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == -signal.SIGKILL
    pid = int(result.stdout)
    if psutil.pid_exists(pid):
        assert not psutil.wait_procs([psutil.Process(pid)], timeout=20)[1]


def test_the_process_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATSERVE_API_KEYS", "sk-secret")
    trial = CountingTrial()
    try:
        assert isinstance(trial.run("regex", "a+", after_space=False), Passed)
        environ = psutil.Process(trial.pid).environ()
    finally:
        trial.end()
    assert "PATH" in environ and not any("sk-secret" in value for value in environ.values())


def test_a_model_without_an_end_token_is_refused(compiler: GrammarCompiler) -> None:
    class Endless(ByteTokenizer):
        eos_ids = frozenset[int]()

    endless = GrammarCompiler(Endless(), VOCAB_SIZE)
    endless.prepare()
    assert "has an end token" in refusal(endless, spec("a")).message
    endless.close()
    # a chat template's own stop token will do
    stopped = GrammarCompiler(Endless(), VOCAB_SIZE, (END_ID,))
    matcher = compile_one(stopped, spec("a?")).matcher()
    assert allowed_ids(matcher, VOCAB_SIZE) == {ord("a"), END_ID}
    stopped.close()


def test_padding_is_never_said(compiler: GrammarCompiler) -> None:
    matcher = compile_one(compiler, spec("[A-C]")).matcher()
    assert allowed_ids(matcher, VOCAB_SIZE) == {66, 67}


def test_nothing_is_imported_or_started_before_the_first_spec() -> None:
    code = (
        "import sys, threading\n"
        "from chatserve.grammar.compiler import GrammarCompiler\n"
        "compiler = GrammarCompiler(None, 10)\n"
        "assert 'llguidance' not in sys.modules and threading.active_count() == 1\n"
        "compiler.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_all_grammars_need_is_built_once(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Vocabulary] = []
    build_one = Vocabulary.build

    def build(vocabulary: Vocabulary) -> Any:
        built.append(vocabulary)
        return build_one(vocabulary)

    monkeypatch.setattr(Vocabulary, "build", build)
    compiler.prepare()
    assert len(built) == 1
    compile_one(compiler, spec("a"))
    assert len(built) == 1


def test_what_cannot_be_prepared_costs_nothing_else(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_vocabulary: Vocabulary) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Vocabulary, "build", fail)
        compiler.prepare()
    assert "grammars cannot be prepared" in caplog.text
    compile_one(compiler, spec("a"))


def test_the_process_that_forks_has_one_thread_and_little_memory(
    compiler: GrammarCompiler, trial: CountingTrial
) -> None:
    compile_one(compiler, spec("a"))
    process = psutil.Process(trial.pid)
    assert process.num_threads() == 1
    assert process.memory_info().rss < 60 << 20
