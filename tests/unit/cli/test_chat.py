"""Whole conversations: scripted lines, a scripted server, the transcript compared as one text."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from chatserve.cli.answer import Answer, ChatDelta, ModelInfo, Progress
from chatserve.cli.asking import ChatOptions, answer_once
from chatserve.cli.chat import Chat
from chatserve.cli.columns_drawer import ColumnsDrawer
from chatserve.cli.lines import ProgramLines
from chatserve.cli.render import Display, PlainDrawer
from chatserve.cli.status_bar import status_text
from chatserve.cli.transcript import Transcript
from chatserve.errors import (
    ChatserveError,
    ContextLengthExceeded,
    ModelLoadError,
    NoWorkerAvailable,
    StartupError,
    WorkerLost,
)

Piece = str | ChatDelta | BaseException
CTRL_C = KeyboardInterrupt()
STOPPED = "stopped; /continue goes on, /regen repeats, Ctrl-C leaves"
MODEL = ModelInfo("fake-1b", "cpu", "float32", 8, 2048, "vicuna_v1.1")
ADAPTED = ModelInfo("fake-1b:sql", parent="fake-1b")


class ScriptedServer:
    """Answers the n-th request with the n-th list of pieces; an exception among them is raised."""

    def __init__(self, *answers: Sequence[Piece], loading: Sequence[Progress] = ()) -> None:
        self._answers = list(answers)
        self._loading = list(loading)
        self.failure: StartupError | None = None
        self.chosen = MODEL
        self.listed: list[ModelInfo] | ChatserveError = [MODEL, ADAPTED]
        self.requests: list[list[dict[str, str]]] = []
        self.sampling: list[Mapping[str, Any]] = []
        self.num_closed = 0
        self.rivals: dict[str, ScriptedRival] = {}

    def progress(self) -> Progress | None:
        if self.failure:
            raise self.failure
        return self._loading.pop(0) if self._loading else None

    def wait(self, timeout_s: float) -> None:
        assert timeout_s > 0

    def model(self) -> ModelInfo:
        return self.chosen

    def models(self) -> list[ModelInfo]:
        if isinstance(self.listed, ChatserveError):
            raise self.listed
        return self.listed

    def choose(self, model: ModelInfo) -> None:
        self.chosen = model

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        self.requests.append(messages)
        self.sampling.append(sampling)
        try:
            for piece in self._answers.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield ChatDelta(piece) if isinstance(piece, str) else piece
        finally:
            self.num_closed += 1

    def news(self) -> str:
        return ""

    def count_tokens(self, text: str) -> int | None:
        return None if self.chosen is ADAPTED else len(text.split())

    def rival(self, model: ModelInfo) -> ScriptedRival:
        return self.rivals[model.name]


class ScriptedRival:
    """Answers the n-th request with the n-th list of pieces; after those it waits for `abort`."""

    def __init__(self, *answers: Sequence[Piece], waits: bool = False) -> None:
        self._answers = list(answers)
        self._waits = waits
        self._aborted = threading.Event()
        self.requests: list[list[dict[str, str]]] = []
        self.is_closed = False

    def stream(
        self, messages: list[dict[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[ChatDelta, None, None]:
        self.requests.append(messages)
        for piece in self._answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield ChatDelta(piece) if isinstance(piece, str) else piece
        if self._waits:
            assert self._aborted.wait(30)
            raise WorkerLost("aborted")

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        self.is_closed = True


class ScriptedLines:
    """Types lines, and shows them as a terminal would."""

    def __init__(self, screen: io.StringIO, lines: Sequence[str | BaseException]) -> None:
        self._screen = screen
        self._lines = iter(lines)
        self.prefills: list[str] = []

    def read(self, prefill: str = "") -> str:
        self.prefills.append(prefill)
        line = next(self._lines, None)
        if line is None:
            self._screen.write("> ^D\n")
            raise EOFError
        if isinstance(line, BaseException):
            self._screen.write("> ^C\n")
            raise line
        self._screen.write(f"> {line}\n")
        return line


def ticks() -> Callable[[], float]:
    """A clock that goes on by half a second at each look."""
    numbers = itertools.count()
    return lambda: next(numbers) / 2


class Session:
    def __init__(
        self, server: ScriptedServer, *, columns: int | None = None, **options: Any
    ) -> None:
        """`columns`: of a terminal."""
        self.screen = io.StringIO()
        self.server = server
        columns_drawer = None
        if columns is not None:
            size = (columns, 24)
            columns_drawer = ColumnsDrawer(self.screen, lambda: size, sleep=lambda _: None)
        display = Display(
            PlainDrawer(self.screen), self.screen, is_terminal=False,
            columns=lambda: columns, columns_drawer=columns_drawer,
        )  # fmt: skip
        transcript = Transcript(system=options.pop("system", None))
        self.chat = Chat(server, display, transcript, ChatOptions(**options), clock=ticks())
        self.lines = ScriptedLines(self.screen, ())

    @property
    def transcript(self) -> Transcript:
        return self.chat.transcript

    def type(self, *lines: str | BaseException) -> str:
        self.lines = ScriptedLines(self.screen, lines)
        self.chat.run(self.lines)
        return self.screen.getvalue()


def contents(request: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in request]


def test_two_turns_and_the_second_knows_the_first() -> None:
    session = Session(ScriptedServer(["Hel", "lo!"], ["你", "好"]))
    assert session.type("hi", "in Chinese?") == (
        "> hi\nHello!\n> in Chinese?\n你好\n> ^D\n"
    )  # fmt: skip
    assert contents(session.server.requests[1]) == ["hi", "Hello!", "in Chinese?"]


def test_empty_lines_do_nothing() -> None:
    session = Session(ScriptedServer())
    assert session.type("", "   ", "/exit", "never read") == "> \n>    \n> /exit\n"


def test_without_history_each_question_stands_alone() -> None:
    session = Session(ScriptedServer(["a"], ["b"]), with_history=False, system="be brief")
    session.type("one", "two")
    assert contents(session.server.requests[1]) == ["be brief", "two"]


def test_sampling_goes_into_each_request() -> None:
    session = Session(ScriptedServer(["a"]), sampling={"temperature": 0.7})
    session.type("one")
    assert session.server.sampling == [{"temperature": 0.7}]


def test_ctrl_c_stops_the_answer_and_keeps_what_came() -> None:
    session = Session(ScriptedServer(["half ", "an", CTRL_C], ["more"]))
    assert session.type("q", "go on") == (f"> q\nhalf an\n{STOPPED}\n> go on\nmore\n> ^D\n")
    assert session.server.num_closed == 2
    assert session.transcript.turns[1].is_partial
    assert contents(session.server.requests[1]) == ["q", "half an", "go on"]


def test_ctrl_c_before_the_first_token_keeps_the_question_for_regen() -> None:
    session = Session(ScriptedServer([CTRL_C], ["answer"], ["b"]))
    assert session.type("q", "/regen") == (
        "> q\nstopped; /regen asks again, Ctrl-C leaves\n> /regen\nanswer\n> ^D\n"
    )
    assert contents(session.server.requests[1]) == ["q"]


def test_a_second_ctrl_c_does_not_lose_the_first_ones_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session(ScriptedServer())

    def stream(messages: Any, sampling: Any) -> Generator[ChatDelta, None, None]:
        try:
            yield ChatDelta("half")
            signal.raise_signal(signal.SIGINT)
            yield ChatDelta("never")
        finally:
            signal.raise_signal(signal.SIGINT)  # the user hits the key again

    monkeypatch.setattr(session.server, "stream", stream)
    assert session.type("q") == f"> q\nhalf\n{STOPPED}\n> ^D\n"
    assert session.transcript.turns[1].content == "half"


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    session = Session(ScriptedServer())
    assert (
        session.type(KeyboardInterrupt())
        == "> ^C\nCtrl-C once more, Ctrl-D or /exit leaves\n> ^D\n"
    )


def test_a_line_typed_while_loading_waits() -> None:
    loading = [Progress("m", "loading", 1, 2), Progress("m", "loading", 2, 2)]
    session = Session(ScriptedServer(["Hi"], loading=loading))
    assert session.type("q") == "> q\nHi\n> ^D\n"


def test_errors_are_told_apart_from_answers_and_the_chat_goes_on() -> None:
    session = Session(
        ScriptedServer(
            [ContextLengthExceeded("prompt has 9 tokens")],
            ["half an", WorkerLost("the worker died")],
            [NoWorkerAvailable("none\nready")],
            ["ok"],
        )
    )
    assert session.type("one", "two", "three", "four") == (
        "> one\n"
        "error: prompt has 9 tokens\n"
        "`/set context rolling` and /regen let the oldest turns go, /clear starts over\n"
        "> two\n"
        "half an\n"
        "error: the worker died\n"
        "> three\n"
        "error: none ready\n"
        "> four\n"
        "ok\n"
        "> ^D\n"
    )
    assert contents(session.server.requests[3]) == ["two", "half an", "four"]


def test_a_question_that_failed_can_be_asked_again() -> None:
    session = Session(ScriptedServer([NoWorkerAvailable("none")], ["ok"]))
    assert session.type("q", "/regen") == "> q\nerror: none\n> /regen\nok\n> ^D\n"


def test_the_end_of_the_server_ends_the_chat() -> None:
    session = Session(ScriptedServer())
    session.server.failure = ModelLoadError("no such folder")
    with pytest.raises(ModelLoadError, match="no such folder"):
        session.type("q")


def test_an_answer_cut_by_its_limit_says_so() -> None:
    cut = ["As I was", ChatDelta("", "length", 16)]
    session = Session(ScriptedServer(cut, cut), sampling={"max_tokens": 16})
    assert "\nthe answer stopped at max_tokens 16; /continue goes on\n" in session.type("q")
    session = Session(ScriptedServer(cut))
    assert "\nthe answer stopped where the model's context of 2048 tokens ends\n" in session.type(
        "q"
    )


def test_commands_reset_remove_and_regen_in_both_spellings() -> None:
    session = Session(ScriptedServer(["1"], ["2"], ["2b"], ["3"], ["4"]))
    assert session.type(
        "a", "b", "!!regen", "/undo", "c", "!!reset", "d", "!!remove", "/remove", "/regen"
    ) == (
        "> a\n1\n"
        "> b\n2\n"
        "> !!regen\n2b\n"
        "> /undo\nremoved the last question\n"
        "> c\n3\n"
        "> !!reset\nthe conversation is empty\n"
        "> d\n4\n"
        "> !!remove\nremoved the last question\n"
        "> /remove\nnothing to remove\n"
        "> /regen\nno question to ask again\n"
        "> ^D\n"
    )  # fmt: skip
    assert contents(session.server.requests[2]) == ["a", "1", "b"]
    assert contents(session.server.requests[3]) == ["a", "1", "c"]
    assert contents(session.server.requests[4]) == ["d"]


def test_model_lists_and_chooses_who_answers() -> None:
    session = Session(ScriptedServer(["1"], ["2"]))
    assert session.type("/model", "/model fake-1b:sql", "a", "/model", "/model x") == (
        "> /model\nfake-1b answers; there is fake-1b, fake-1b:sql\n"
        "> /model fake-1b:sql\nfake-1b:sql answers from now on\n"
        "> a\n1\n"
        "> /model\nfake-1b:sql answers; there is fake-1b, fake-1b:sql\n"
        "> /model x\nerror: x is not served; there is fake-1b, fake-1b:sql\n"
        "> ^D\n"
    )
    assert session.server.model() == ADAPTED


def test_model_of_a_server_that_loads_or_cannot_be_asked() -> None:
    loading = Progress(name="fake-1b", state="loading", loaded_bytes=1, total_bytes=4)
    session = Session(ScriptedServer(loading=[loading]))
    session.server.listed = NoWorkerAvailable("the server is gone")
    screen = session.type("/model", "/model")
    assert "loading" in screen and "the server is gone" in screen
    assert session.server.model() == MODEL


def test_system_message_is_set_shown_and_sent() -> None:
    session = Session(ScriptedServer(["a"]))
    assert session.type("/system", "/system be brief", "q") == (
        "> /system\nsystem message: none\n"
        "> /system be brief\nsystem message: be brief\n"
        "> q\na\n> ^D\n"
    )  # fmt: skip
    assert session.server.requests[0][0] == {"role": "system", "content": "be brief"}


def test_unknown_commands_are_never_sent_and_a_leading_space_sends_them() -> None:
    session = Session(ScriptedServer(["a file"]))
    text = session.type("/usr/bin/env?", "!!frobnicate", " /usr/bin/env?")
    assert text.count("error: unknown command") == 2
    assert [contents(request) for request in session.server.requests] == [["/usr/bin/env?"]]


def test_help_lists_the_commands() -> None:
    text = Session(ScriptedServer()).type("/help")
    assert "/regen" in text
    assert "Ctrl-D leaves" in text


def test_save_and_load_in_fastchats_format(tmp_path: Path) -> None:
    file = tmp_path / "talk"
    first = Session(ScriptedServer(["Hi\x1b[2J"]), system="be brief")
    assert first.type("hello", f"!!save {file}") == (
        f"> hello\nHi\n> !!save {file}\nsaved to {file}.json\n> ^D\n"
    )
    assert json.loads((tmp_path / "talk.json").read_text()) == {
        "template_name": "vicuna_v1.1",
        "system_message": "be brief",
        "roles": ["USER", "ASSISTANT"],
        "messages": [["USER", "hello"], ["ASSISTANT", "Hi\x1b[2J"]],
        "offset": 0,
    }
    second = Session(ScriptedServer(["ok"]))
    assert second.type(f"!!load {file}", "next") == (
        f"> !!load {file}\nUSER: hello\nASSISTANT: Hi\n> next\nok\n> ^D\n"
    )
    assert contents(second.server.requests[0]) == ["be brief", "hello", "Hi\x1b[2J", "next"]


def test_save_and_load_tell_what_went_wrong(tmp_path: Path) -> None:
    session = Session(ScriptedServer())
    text = session.type("/save", "/load", f"/load {tmp_path}/none", f"/save {tmp_path}/no/dir")
    assert text.count("error: ") == 4
    assert "/save needs a file name" in text
    assert "cannot load" in text
    assert "cannot save" in text


def test_status_says_model_device_and_speed() -> None:
    session = Session(ScriptedServer(["a", "b", "c", ChatDelta("", "stop", 3)]))
    assert session.chat.status(80) == "fake-1b · cpu · float32 · 8-bit"
    session.type("q")
    assert session.chat.status(80) == "fake-1b · cpu · float32 · 8-bit · 2.0 tokens/s"


def test_status_while_loading_and_after_the_end() -> None:
    session = Session(ScriptedServer(loading=[Progress("m", "loading", 1, 4)]))
    assert session.chat.status(80).startswith("loading m ")
    session.server.failure = StartupError("gone")
    with pytest.raises(StartupError):
        session.chat.status(80)


def test_a_models_name_cannot_forge_the_status_line() -> None:
    assert status_text(ModelInfo("a\x1b[2J\nb"), Answer()) == "a b"


def test_no_speed_is_invented() -> None:
    answer = Answer()
    answer.take(ChatDelta("text"), 1.0)
    assert answer.tokens_per_s is None  # no usage from the server
    answer.take(ChatDelta("", "stop", 5), 2.0)
    assert answer.tokens_per_s is None  # all of it came at once


def programmatic(stdin: str, *answers: Sequence[Piece]) -> tuple[str, ScriptedServer]:
    out, server = io.StringIO(), ScriptedServer(*answers)
    display = Display(PlainDrawer(out, "[!OP:ASSISTANT]: "), out)
    chat = Chat(server, display, Transcript(), ChatOptions(is_typed=False))
    chat.run(ProgramLines(io.StringIO(stdin), out, "USER"))
    return out.getvalue(), server


def test_programmatic_style_speaks_fastchats_protocol() -> None:
    end = " __END_OF_A_MESSAGE_47582648__\n"
    text, server = programmatic(f"hi\nthere{end}/no command{end}!!exit{end}", ["Hel", "lo"], ["b"])
    assert text == (
        "[!OP:USER]: hi\nthere\n[!OP:ASSISTANT]: Hello\n"
        "[!OP:USER]: /no command\n[!OP:ASSISTANT]: b\n"
        "[!OP:USER]: !!exit\n"
    )  # fmt: skip
    assert contents(server.requests[1]) == ["hi\nthere", "Hello", "/no command"]


def test_a_programmed_chat_is_told_of_no_command() -> None:
    end = " __END_OF_A_MESSAGE_47582648__\n"
    text, _ = programmatic(f"hi{end}!!exit{end}", [ContextLengthExceeded("too long")])
    assert "error: too long\n" in text and "/clear" not in text


def test_ctrl_c_ends_a_programmed_chat() -> None:
    class Interrupted:
        def read(self, prefill: str = "") -> str:
            raise KeyboardInterrupt

    display = Display(PlainDrawer(io.StringIO()), io.StringIO())
    chat = Chat(ScriptedServer(), display, Transcript(), ChatOptions(is_typed=False))
    with pytest.raises(KeyboardInterrupt):
        chat.run(Interrupted())


def once(*pieces: Piece, show_status: bool = False) -> tuple[str, str, ScriptedServer]:
    out, err, server = io.StringIO(), io.StringIO(), ScriptedServer(pieces)
    transcript = Transcript(system="be brief")
    transcript.ask("q")
    display = Display(PlainDrawer(out), err)
    with contextlib.suppress(WorkerLost, KeyboardInterrupt):
        answer_once(
            server, display, transcript, ChatOptions(), show_status=show_status, clock=ticks()
        )
    return out.getvalue(), err.getvalue(), server


def test_one_answer_and_nothing_else_on_stdout() -> None:
    out, err, server = once("Hel", "lo", ChatDelta("", "stop", 2))
    assert (out, err) == ("Hello\n", "")
    assert contents(server.requests[0]) == ["be brief", "q"]


def test_one_answer_with_its_status_and_limit_on_stderr() -> None:
    out, err, _ = once("a", "b", ChatDelta("", "length", 2), show_status=True)
    assert out == "ab\n"
    assert err == (
        "the answer stopped where the model's context of 2048 tokens ends\n"
        "fake-1b · cpu · float32 · 8-bit · 2.0 tokens/s\n"
    )


def thought(*words: str) -> list[ChatDelta]:
    return [ChatDelta(reasoning=word) for word in words]


def test_what_a_model_thinks_is_no_part_of_the_answer_but_of_its_times() -> None:
    out, err, _ = once(*thought("Hm", "m. "), "Hi", ChatDelta("", "stop", 3), show_status=True)
    assert (out, err) == ("Hi\n", "fake-1b · cpu · float32 · 8-bit · 2.0 tokens/s\n")


def test_a_model_that_only_thinks_is_told_of() -> None:
    out, err, _ = once(*thought("Hm", "m. "), ChatDelta("", "stop", 2))
    assert out.strip() == ""
    assert err == "the model has thought (5 characters) and not answered\n"


@pytest.mark.parametrize("end", [CTRL_C, WorkerLost("died")])
def test_one_answer_that_breaks_off_ends_its_line_and_closes_its_stream(
    end: BaseException,
) -> None:
    out, _, server = once("half an", end)
    assert out == "half an\n"
    assert server.num_closed == 1


def no_room(param: str = "max_tokens") -> ContextLengthExceeded:
    return ContextLengthExceeded("no room", param=param)


def test_the_default_limit_is_sent_and_named() -> None:
    cut = ["As I was", ChatDelta("", "length", 512)]
    session = Session(ScriptedServer(cut, cut), wished_max_tokens=512)
    note = (
        "\nthe answer stopped at 512 tokens; /set max_tokens N raises the limit; "
        "/continue goes on\n"
    )
    assert note in session.type("q")
    assert session.server.sampling == [{"max_tokens": 512}]
    session = Session(ScriptedServer(cut), sampling={"max_tokens": 5}, wished_max_tokens=512)
    session.type("q")
    assert session.server.sampling == [{"max_tokens": 5}]


@pytest.mark.parametrize("num_tokens", [100, None])
def test_a_default_limit_without_room_is_dropped_once(num_tokens: int | None) -> None:
    server = ScriptedServer([no_room()], ["ok", ChatDelta("", "length", num_tokens)])
    session = Session(server, sampling={"seed": 1}, wished_max_tokens=512)
    assert session.type("q") == (
        "> q\nok\nthe answer stopped where the model's context of 2048 tokens ends\n> ^D\n"
    )
    assert server.sampling == [{"seed": 1, "max_tokens": 512}, {"seed": 1}]
    assert server.requests[0] == server.requests[1]


@pytest.mark.parametrize(
    ("answers", "sampling", "num_requests"),
    [
        ([[no_room()]], {"max_tokens": 512}, 1),
        ([[no_room("messages")]], {}, 1),
        ([["text", no_room()]], {}, 1),
        ([[no_room()], [no_room()]], {}, 2),
    ],
)
def test_other_errors_of_length_are_shown(
    answers: list[list[Piece]], sampling: dict[str, Any], num_requests: int
) -> None:
    session = Session(ScriptedServer(*answers), sampling=sampling, wished_max_tokens=512)
    assert "error: no room\n" in session.type("q")
    assert len(session.server.requests) == num_requests


def test_saving_over_a_file_says_so(tmp_path: Path) -> None:
    text = Session(ScriptedServer()).type(f"/save {tmp_path}/talk", f"/save {tmp_path}/talk")
    assert f"saved to {tmp_path}/talk.json\n" in text
    assert f"\nreplaced {tmp_path}/talk.json\n" in text
