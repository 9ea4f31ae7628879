"""The process that renders a model's own template: what ends it, and what becomes of chats then."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from chatserve.engine.prompt import Message
from chatserve.errors import GenerationFailed, InvalidRequest, ModelLoadError
from chatserve.models.chat_template import (
    WeightsFacts,
    choose_template,
    load_template_sources,
)
from chatserve.models.special_tokens import AddedToken, SpecialTokens
from chatserve.models.templates import render_process
from chatserve.models.templates.jinja import JinjaTemplate
from chatserve.models.templates.jinja_sandbox import CannotRender
from chatserve.models.templates.render_process import RenderProcess
from chatserve.models.templates.tools import with_tools
from tests.hostile_templates import ALL_BOMBS, BOMBS, CHOSEN_BOMB, DOUBLING, ENDLESS
from tests.unit.models.test_chat_template_jinja import FAMILIES, HONEST, chat, folder_of, ours_of
from tests.unit.models.test_tool_templates import CHAT, SOURCES, TOOLS
from tests.unit.models.test_tool_templates import ours_of as ours_with_tools

ROOT = Path(__file__).parents[3]
WAIT_S = 30.0
MAX_CHARS = 1 << 20
MARKERS = SpecialTokens((AddedToken("<|end|>", 1, True),))
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory, has /proc")
# as the kernel alone tells them, what it tells of, and a few that are none to it
SAMPLE = [0, 3, 6, 40, 55]
USER = [Message("user", "hi")]
TOO_LONG, TOO_LARGE = "it computes for more than", "it needs more than 256 MB"
TOO_MUCH_TEXT = "it writes more than"

Start = Callable[..., RenderProcess]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a process that holds a template; without bounds of its own where that is asked for."""
    started: list[RenderProcess] = []

    def start(source: str, *, is_bounded: bool = True, **limits: Any) -> RenderProcess:
        if not is_bounded:
            monkeypatch.setenv("PYTHONPATH", str(ROOT))
            limits["module"] = "tests.unbounded_render"
        process = RenderProcess(**limits)
        started.append(process)
        process.compile(source)
        return process

    yield start
    for process in started:
        process.close()


def ask(process: RenderProcess, content: str) -> str:
    return process.render(MAX_CHARS, {"messages": [{"role": "user", "content": content}]})


def outcome(process: RenderProcess, content: str) -> str:
    try:
        return ask(process, content)
    except CannotRender as error:
        return str(error)


def process_of(process: RenderProcess) -> psutil.Process:
    assert process.pid is not None
    return psutil.Process(process.pid)


@pytest.mark.parametrize("family", FAMILIES)
def test_chats_are_rendered_as_without_it(family: str, start: Start) -> None:
    _, here = ours_of(family)
    there = copy.copy(here)
    there._renderer = start(load_template_sources(folder_of(family))["default"])
    for contents in HONEST:
        messages = chat(family, contents)
        for add in (True, False):
            assert there.render(messages, add_generation_prompt=add) == here.render(
                messages, add_generation_prompt=add
            )


@pytest.mark.parametrize("family", SOURCES)
def test_tools_are_rendered_as_without_it(family: str, start: Start) -> None:
    _, here = ours_with_tools(family)
    there = copy.copy(here)
    there._renderer = start(SOURCES[family])
    for tools in (TOOLS, []):
        for count in (1, 3, 5):
            messages = CHAT[:count]
            assert with_tools(there, tools).render(messages) == with_tools(here, tools).render(
                messages
            )


def test_long_texts_and_any_character_come_back(start: Start) -> None:
    process = start("{{ messages[0].content }}")
    template = JinjaTemplate("own", "{{ messages[0].content }}", MARKERS, {}, process)
    for text in ("word " * 600_000 + "🙂", "\x00\n\x1b" * 9, "\ufdd0<|end|>", "中" * 100_000):
        assert template.render([Message("user", text)]) == [text]
    with pytest.raises(InvalidRequest, match="surrogate"):
        JinjaTemplate("own", "{{ '\\ud800' }}", MARKERS, {}, process).render(USER)


def test_bombs_are_refused_in_the_words_of_the_bounds(start: Start) -> None:
    process = start(CHOSEN_BOMB)
    pid = process.pid
    for number in range(len([*BOMBS, *DOUBLING])):
        said = outcome(process, str(number))
        assert not said.startswith((TOO_LONG, TOO_LARGE, str(number))), ALL_BOMBS[number]
    # nothing had to be killed
    assert process.pid == pid and ask(process, "hi") == "hi"


@LINUX
@pytest.mark.parametrize(
    "numbers",
    [SAMPLE, pytest.param(range(len(ALL_BOMBS)), marks=pytest.mark.soak)],
    ids=["sample", "all"],
)
def test_without_bounds_the_kernel_stops_them(numbers: Sequence[int], start: Start) -> None:
    process = start(CHOSEN_BOMB, is_bounded=False, seconds=0.2)
    said = [outcome(process, str(number)) for number in numbers]
    for number, words in zip(numbers, said, strict=True):
        # some are none where nothing counts but time and memory
        assert len(words) < 100, ALL_BOMBS[number]
    for reason in (TOO_LONG, TOO_LARGE, TOO_MUCH_TEXT):
        assert any(words.startswith(reason) for words in said), reason
    assert ask(process, "hi") == "hi"
    print(Counter(words if words.startswith("it ") else "harmless" for words in said))


@LINUX
def test_without_a_limit_of_memory_it_is_taken(start: Start) -> None:
    """Teeth: what is refused above is there to be had."""
    source = "{{ ('a' * 400000000)|length }}"
    assert outcome(start(source, is_bounded=False), "").startswith(TOO_LARGE)
    assert outcome(start(source, is_bounded=False, num_bytes=1 << 30), "") == "400000000"


def test_native_code_is_stopped(start: Start) -> None:
    process = start("{{ 9 ** (9 ** 9) }}", is_bounded=False, seconds=0.1)
    assert outcome(process, "") == "it computes for more than 0.1 s"


def test_the_template_is_named_and_the_chat_refused(start: Start) -> None:
    process = start(CHOSEN_BOMB, is_bounded=False, seconds=0.1)
    template = JinjaTemplate("own", CHOSEN_BOMB, MARKERS, {}, process)
    with pytest.raises(InvalidRequest, match=r"own chat template .* more than 0\.1 s$") as caught:
        template.render([Message("user", "3")])
    assert caught.value.param == "messages"
    assert template.render(USER) == ["hi"]


def test_others_wait_for_their_turn_and_get_their_own_text(start: Start) -> None:
    process = start(CHOSEN_BOMB, is_bounded=False, seconds=0.3)
    endless = str(ALL_BOMBS.index(ENDLESS[0]))
    contents = [endless, "a", "b", endless, "c", "d"]
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda content: outcome(process, content), contents))
    late = "it computes for more than 0.3 s"
    assert said == [late, "a", "b", late, "c", "d"]


def test_one_that_was_killed_between_two_chats_is_replaced(start: Start) -> None:
    process = start(CHOSEN_BOMB)
    killed = process_of(process)
    killed.kill()
    killed.wait(WAIT_S)
    assert ask(process, "hi") == "hi"
    assert process.pid != killed.pid


def rendering(process: RenderProcess, content: str, into: list[Any]) -> threading.Thread:
    def run() -> None:
        try:
            into.append(ask(process, content))
        except (CannotRender, GenerationFailed) as error:
            into.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_chat_whose_process_is_killed_is_rendered_by_the_next(start: Start) -> None:
    process = start(CHOSEN_BOMB)
    held, said = process_of(process), list[Any]()
    held.suspend()
    thread = rendering(process, "hi", said)
    wait_until(lambda: process._lock.locked())
    held.kill()
    thread.join(WAIT_S)
    assert said == ["hi"] and process.pid != held.pid


def test_a_chat_that_is_killed_twice_fails_and_the_next_does_not(start: Start) -> None:
    process = start(CHOSEN_BOMB, is_bounded=False, seconds=60)
    said: list[Any] = []
    thread = rendering(process, str(ALL_BOMBS.index(ENDLESS[0])), said)
    for _ in range(2):
        wait_until(lambda: process._is_compiled)
        at_work = process_of(process)
        before = sum(at_work.cpu_times()[:2])
        wait_until(lambda at_work=at_work, before=before: sum(at_work.cpu_times()[:2]) > before)
        at_work.kill()
        wait_until(lambda at_work=at_work: process.pid not in (None, at_work.pid) or bool(said))
    thread.join(WAIT_S)
    assert isinstance(said[0], GenerationFailed) and "ended by itself" in said[0].message
    assert ask(process, "hi") == "hi"


def test_one_that_has_stopped_is_replaced(start: Start) -> None:
    process = start(CHOSEN_BOMB)
    stopped = process_of(process)
    stopped.suspend()
    process._wall_s = 0.1
    with pytest.raises(GenerationFailed, match=r"has not answered for 0\.1 s"):
        ask(process, "hi")
    process._wall_s = WAIT_S
    assert ask(process, "hi") == "hi"
    assert not stopped.is_running()


def test_closing_ends_it_whatever_it_does(start: Start) -> None:
    process = start(CHOSEN_BOMB)
    held, said = process_of(process), list[Any]()
    held.suspend()
    thread = rendering(process, "hi", said)
    wait_until(lambda: process._lock.locked())
    process.close()
    thread.join(WAIT_S)
    assert isinstance(said[0], GenerationFailed) and "about to stop" in said[0].message
    assert not held.is_running() and process.pid is None
    with pytest.raises(GenerationFailed, match="about to stop"):
        ask(process, "hi")


ORPHAN = """
import os, signal, sys, threading, psutil
from chatserve.models.templates.render_process import RenderProcess
from chatserve.models.templates.tools import with_tools
from tests.hostile_templates import CHOSEN_BOMB
process = RenderProcess()
process.compile(CHOSEN_BOMB)
def ask(): process.render(100, {"messages": [{"content": sys.argv[1]}]})
print(process.pid, flush=True)
if sys.argv[1]:
    child = psutil.Process(process.pid)
    before = sum(child.cpu_times()[:2])
    threading.Thread(target=ask, daemon=True).start()
    while sum(child.cpu_times()[:2]) < before + 0.1: pass
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("content", ["", str(ALL_BOMBS.index(ENDLESS[0]))], ids=["idle", "at work"])
def test_it_ends_with_its_parent(content: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, content], capture_output=True, text=True, timeout=60,
        cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    if psutil.pid_exists(pid):
        assert not psutil.wait_procs([psutil.Process(pid)], timeout=WAIT_S)[1]


def test_it_is_small_and_apart_and_knows_no_keys(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHATSERVE_API_KEYS", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "sk-secret")
    process = start("{{ 1 }}")
    assert ask(process, "") == "1"
    it = process_of(process)
    print(f"{it.memory_info().rss >> 10} KiB")
    assert it.num_threads() == 1 and it.memory_info().rss < 40 << 20
    assert it.num_fds() <= 5
    assert os.getsid(it.pid) == it.pid
    assert "PATH" in it.environ() and "sk-secret" not in str(it.environ())


def test_it_imports_no_tokenizer_and_no_torch() -> None:
    code = (
        "import sys; import chatserve.models.templates.render\n"
        "from chatserve.models.templates.jinja_sandbox import Sandbox\n"
        "Sandbox().compile('{{ 1 }}'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "tokenizers", "transformers", "numpy"}


def test_a_source_that_takes_long_to_compile_is_refused() -> None:
    process = RenderProcess(compile_s=0.3)
    try:
        with pytest.raises(ModelLoadError, match=r"takes more than 0\.3 s to compile; choose"):
            JinjaTemplate("own", "{{ x }}" * 100_000, MARKERS, {}, process)
        assert process.pid is None
    finally:
        process.close()


@LINUX
def test_a_source_that_takes_much_memory_to_compile_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(render_process, "COMPILE_BYTES", 32 << 20)
    process = RenderProcess()
    try:
        with pytest.raises(ModelLoadError, match="takes more than 32 MB to compile"):
            JinjaTemplate("own", "{{ x }}" * 50_000, MARKERS, {}, process)
    finally:
        process.close()


def test_what_is_no_jinja_is_refused_as_without_it() -> None:
    process = RenderProcess()
    for source in ("{% for %}", "{{ 'a'|pprint }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"):
        with pytest.raises(ModelLoadError) as here:
            JinjaTemplate("own", source, MARKERS, {})
        with pytest.raises(ModelLoadError) as there:
            JinjaTemplate("own", source, MARKERS, {}, process)
        assert there.value.message == here.value.message
        assert process.pid is None


def test_one_that_cannot_start_is_an_error_of_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/missing/python")
    with pytest.raises(ModelLoadError, match="did not start"):
        JinjaTemplate("own", "x", MARKERS, {}, RenderProcess())


def test_builtin_templates_start_none() -> None:
    process = RenderProcess()
    tokenizer, _ = ours_of("smol")
    facts = WeightsFacts("x")
    choose_template("zero_shot", facts, tokenizer, {"default": "{{ 1 }}"}, process)
    assert process.pid is None
    choose_template(None, facts, tokenizer, {"default": "{{ 1 }}"}, process)
    assert process.pid is not None
    process.close()


@pytest.mark.parametrize(
    "answer", [{"text": "x" * 101}, {"text": 1}, {}, [], "x", {"failure": None}], ids=str
)
def test_what_it_may_not_say_is_not_believed(
    answer: Any, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start("{{ 1 }}")
    with monkeypatch.context() as patched:
        patched.setattr(process, "_ask", lambda *_: answer)
        with pytest.raises(GenerationFailed, match="ended by itself"):
            process.render(100, {"messages": []})
    assert ask(process, "") == "1"
