"""`chatserve chat [WEIGHTS]`: flags to a chat on a private or a running server.

The composition root of the terminal client; what it puts together is in `chatserve.cli`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from chatserve import environment
from chatserve.cli.asking import ChatOptions, Server, answer_once, wait_until_ready
from chatserve.cli.attachments import Attachments, read_attachment
from chatserve.cli.chat import Chat
from chatserve.cli.columns_drawer import ColumnsDrawer
from chatserve.cli.json_answer import JsonAnswer
from chatserve.cli.lines import ProgramLines
from chatserve.cli.piped_input import read_piped
from chatserve.cli.private_server import PrivateServer
from chatserve.cli.render import AnswerDrawer, Display, MarkdownDrawer, MarkdownPrinter, PlainDrawer
from chatserve.cli.terminal import columns_of, exits_on_signals, keys_unseen
from chatserve.cli.theme import Theme, theme_of
from chatserve.cli.transcript import Transcript
from chatserve.config import DEFAULT_WEIGHTS, ChatConfig, build
from chatserve.errors import ChatserveError, StartupError, UsageError
from chatserve.flags import CommandParser
from chatserve.options import ModelOptions
from chatserve.settings import fields_of, flags_of

if TYPE_CHECKING:
    from chatserve.cli.kept_chat import KeptChat
    from chatserve.cli.line_editor import LineEditor

CHAT_TEMPERATURE = 0.7
MAX_NEW_TOKENS = 512
HISTORY_FILE = "lines.jsonl"
MOST_SHOWN = 4  # turns of a chat that is gone on with

ServerCommand = Callable[[ChatConfig], Sequence[str]]


def server_command(config: ChatConfig) -> list[str]:
    """The command line of the private server for the weights that `config` names."""
    weights = [] if config.model is None else [config.model]
    debug = ["--debug"] if config.debug else []
    return [
        # -P: no file of the folder that it is started in is ever imported
        sys.executable, "-P", "-m", "chatserve.server", "--host=127.0.0.1", "--port=0",
        # nothing else that a chat asks for needs them
        *(["--no-prepare-grammars"] if config.schema is None else []),
        *_model_flags(config), *debug, "--", *weights,
    ]  # fmt: skip


def _model_flags(config: ChatConfig) -> list[str]:
    # the system message travels in each request, so that /system can change it
    return flags_of(dataclasses.replace(config, conv_system_msg=None), ModelOptions)


def main(argv: Sequence[str], *, server_command: ServerCommand = server_command) -> int:
    """Chat until the user leaves, or answer once. Raises `ChatserveError`, `KeyboardInterrupt`."""
    parser = CommandParser(
        "chatserve chat",
        "Chat in the terminal; with -p or piped input answer once. Starts a private server, "
        "or joins one with --base-url. Without WEIGHTS: the embedded default model.",
        ChatConfig,
    )
    parser.add_argument("weights", metavar="WEIGHTS", nargs="?", help="folder, .gguf, alias or id")
    parser.let_agree("weights", "weights", "model")
    flags = _with_weights(parser.flags(argv))
    config = build(ChatConfig, flags, file=environment.settings_file())
    _check(config, flags)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a locale that lacks a character must not end the answer
        sys.stdout.reconfigure(errors="replace")
    is_program = config.style == "programmatic"
    is_person = _is_terminal(sys.stdin) and sys.stdout.isatty() and not is_program
    if config.prompt is None and (is_person or is_program):
        _check_is_chat(config)
    if config.prompt is None and is_person:
        # before the server: a chat that is not there must not cost the loading of a model
        person = _Person(config)
        with exits_on_signals(), _server(config, server_command, person.tell) as server:
            person.chat(server)
        return 0
    if config.resume is not None:
        raise UsageError("--resume is for a chat in a terminal, not for -p, pipes and programs")
    if config.prompt is None and is_program:
        with exits_on_signals(), _server(config, server_command, _tell_nobody) as server:
            _chat_with_program(server, config)
    else:
        _answer_once(config, server_command)
    return 0


def _with_weights(flags: dict[str, Any]) -> dict[str, Any]:
    """The positional WEIGHTS is another spelling of `--model`."""
    weights = flags.pop("weights")
    return flags if weights is None else {**flags, "model": weights}


def _check(config: ChatConfig, flags: dict[str, Any]) -> None:
    """Refuse at once what the server would only refuse after it has loaded the model."""
    if config.base_url is not None:
        here = {field.name for field in fields_of(ModelOptions)} - {"conv_system_msg"}
        if unused := sorted(here & flags.keys()):
            name = unused[0].replace("_", "-")
            raise UsageError(
                f"--{name} is a matter of the server that --base-url joins; set it there"
            )
    elif config.ssl_ca_certs is not None and "ssl_ca_certs" in flags:
        raise UsageError("--ssl-ca-certs is for a server that --base-url https://... joins")
    if config.raw and config.style == "rich":
        raise UsageError("--style rich owns the cursor and cannot show --raw escapes; use simple")


def _check_is_chat(config: ChatConfig) -> None:
    for name in ("json", "stream_json", "no_stream"):
        if getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is for one answer; give the question by -p or a pipe")


@contextlib.contextmanager
def _server(
    config: ChatConfig, server_command: ServerCommand, tell: Callable[[str], None]
) -> Iterator[Server]:
    server: Server
    if config.base_url is None:
        start_own = partial(PrivateServer, server_command(config), sys.stderr, debug=config.debug)
        server = _shared_server(config, start_own, tell) or start_own()
    else:
        from chatserve.cli.client import ChatClient
        from chatserve.cli.joined_server import JoinedServer

        key = environment.client_api_key(config.base_url)
        client = ChatClient(config.base_url, key, ca_certs=config.ssl_ca_certs)
        server = JoinedServer(client, config.model)
    with contextlib.closing(server):
        yield server


def _tell_nobody(_text: str) -> None:
    """Whoever started this is no person."""


def _shared_server(
    config: ChatConfig, start_own: Callable[[], Server], tell: Callable[[str], None]
) -> Server | None:
    """One of this user's that serves the weights already, in the same form."""
    from chatserve.cli import shared_server

    if config.private:
        return None
    weights = DEFAULT_WEIGHTS if config.model is None else config.model
    found = shared_server.running_with(weights, _model_flags(config))
    if found is None:
        return None
    key = environment.client_api_key(found[0].url)
    return shared_server.join(*found, key, start_own, tell)


class _Person:
    """Somebody at a terminal, with what is kept of their chats."""

    def __init__(self, config: ChatConfig) -> None:
        """Raises `UsageError` when the chat to go on with is not there."""
        from chatserve.cli.kept_chat import KeptChat
        from chatserve.cli.session_store import SessionStore

        self._config = config
        self._files = _files(config)
        columns_drawer = ColumnsDrawer(sys.stdout, _terminal_size)
        self._display = _display(_drawer(config), config, columns_drawer)
        self._transcript = _transcript(config)
        self._kept: KeptChat | None = None
        if not config.no_save or config.resume is not None:
            kept = KeptChat(SessionStore.of_user(), self._display.note)
            if config.resume is not None:
                self._transcript = kept.resume(config.resume)
                self._transcript.system = config.conv_system_msg or self._transcript.system
            self._kept = None if config.no_save else kept

    def tell(self, text: str) -> None:
        self._display.note(text)

    def chat(self, server: Server) -> None:
        chat = Chat(
            server, self._display, self._transcript, _options(self._config, CHAT_TEMPERATURE),
            kept=self._kept, hush=lambda: keys_unseen(sys.stdin, sys.stdout),
        )  # fmt: skip
        chat.waiting = self._files
        self._display.note("/help lists commands, Ctrl-D leaves")
        chat.show_turns(MOST_SHOWN)
        try:
            chat.run(_line_editor(chat, self._display, self._config, self._kept))
        except StartupError:
            self._tell_name()
            raise
        self._tell_name()

    def _tell_name(self) -> None:
        if self._kept is not None and (name := self._kept.name) is not None:
            again = shlex.join(["chatserve", "chat", *_whom(self._config), "--resume", name])
            self._display.note(f"{again} goes on with this chat")


def _whom(config: ChatConfig) -> list[str]:
    """The words of the command line that say who answers."""
    if config.base_url is None:
        return [] if config.model is None else [config.model]
    model = [] if config.model is None else ["--model", config.model]
    return ["--base-url", config.base_url, *model]


def _drawer(config: ChatConfig) -> AnswerDrawer:
    if _is_rich(config):
        return MarkdownDrawer(
            sys.stdout,
            _terminal_size,
            theme=_theme(config),
            blank_line_after=True,
        )
    return PlainDrawer(sys.stdout, blank_line_after=True, columns=_wrap_columns(config))


def _line_editor(
    chat: Chat, display: Display, config: ChatConfig, kept: KeptChat | None = None
) -> LineEditor:
    # late: prompt_toolkit takes a seventh of a second to import, and only people need it
    from prompt_toolkit.history import History, InMemoryHistory

    from chatserve.cli.completion import ChatCompleter, FreshNames
    from chatserve.cli.history import HistoryFile
    from chatserve.cli.line_editor import LineEditor

    history: History = InMemoryHistory()
    if not config.no_save:
        history = HistoryFile(environment.home() / HISTORY_FILE, display.note)
    sessions = partial(_session_names, kept)
    return LineEditor(
        chat.status,
        history,
        ChatCompleter(FreshNames(partial(_model_names, chat.server)), sessions),
        _theme(config).editor,
        is_multiline=config.multiline,
        has_mouse=config.mouse,
    )


def _theme(config: ChatConfig) -> Theme:
    name = config.theme if environment.is_color_wanted() else "none"
    return theme_of(name, environment.terminal_background())


def _model_names(server: Server) -> list[str]:
    """In a thread: all models, or none where the server cannot say now."""
    try:
        return [model.name for model in server.models()] if server.progress() is None else []
    except ChatserveError:
        return []


def _session_names(kept: KeptChat | None) -> list[str]:
    return [] if kept is None else kept.names()


def _chat_with_program(server: Server, config: ChatConfig) -> None:
    transcript = _transcript(config)
    question_role, answer_role = transcript.roles
    drawer = PlainDrawer(sys.stdout, prefix=f"[!OP:{answer_role}]: ")
    options = dataclasses.replace(_options(config, CHAT_TEMPERATURE), is_typed=False)
    chat = Chat(server, _display(drawer, config), transcript, options)
    chat.run(ProgramLines(sys.stdin, sys.stdout, question_role))


def _answer_once(config: ChatConfig, server_command: ServerCommand) -> None:
    is_json = config.json or config.stream_json
    report = JsonAnswer(sys.stdout, has_pieces=config.stream_json)
    with report.reported() if is_json else contextlib.nullcontext():
        files, options = _files(config), _options(config, 0.0)
        if config.no_stream:
            options = dataclasses.replace(options, sampling={**options.sampling, "stream": False})
        if is_json:
            # JSON escapes whatever needs it
            display = _display(report, dataclasses.replace(config, raw=True))
        else:
            display = _display(_script_drawer(config), config)
        is_watched = sys.stdout.isatty() and sys.stderr.isatty() and not is_json
        # a script's log is no place for what has gone well
        tell = display.note if sys.stderr.isatty() else _tell_nobody
        with exits_on_signals(), _server(config, server_command, tell) as server:
            transcript = _transcript(config)
            transcript.ask(files.before(_question(config, display)))
            wait_until_ready(server, display)
            report.model = server.model().name
            answer_once(
                server, display, transcript, options, answer=report.answer, show_status=is_watched
            )


def _script_drawer(config: ChatConfig) -> AnswerDrawer:
    if config.style == "programmatic":
        return PlainDrawer(sys.stdout, prefix=f"[!OP:{Transcript().roles[1]}]: ")
    if not _is_rich(config):
        return PlainDrawer(sys.stdout, columns=_wrap_columns(config))
    if sys.stdout.isatty():
        return MarkdownDrawer(sys.stdout, _terminal_size, theme=_theme(config))
    return MarkdownPrinter(sys.stdout, _terminal_size()[0], theme=_theme(config))


def _question(config: ChatConfig, display: Display) -> str:
    """`--prompt` and what is piped in, one after the other."""
    piped = ""
    if config.prompt is None or not _is_terminal(sys.stdin):
        piped = read_piped(sys.stdin, display.note, errors=config.input_errors)
    question = "\n\n".join(part for part in (config.prompt, piped) if part)
    if not question.strip():
        raise UsageError("there is no prompt: -p is empty and so is standard input")
    return question


def _files(config: ChatConfig) -> Attachments:
    files = Attachments()
    files.add([read_attachment(name, errors=config.input_errors) for name in config.file])
    return files


def _display(
    drawer: AnswerDrawer, config: ChatConfig, columns_drawer: ColumnsDrawer | None = None
) -> Display:
    is_terminal = sys.stderr.isatty() and environment.is_color_wanted()
    return Display(
        drawer, sys.stderr, is_raw=config.raw, is_terminal=is_terminal,
        has_free_line=config.style != "programmatic",
        columns=lambda: columns_of(sys.stderr), columns_drawer=columns_drawer,
        has_color=_theme(config).has_color,
    )  # fmt: skip


def _wrap_columns(config: ChatConfig) -> Callable[[], int | None]:
    """Where plain answers are wrapped: in a terminal, unless its cursor obeys the model."""
    return lambda: None if config.raw else columns_of(sys.stdout)


def _is_rich(config: ChatConfig) -> bool:
    """Markdown is drawn where there is a terminal to draw on, unless colours are unwanted."""
    if config.style == "auto":
        return sys.stdout.isatty() and environment.is_color_wanted() and not config.raw
    return config.style == "rich"


def _is_terminal(stream: TextIO | None) -> bool:
    # a process may be started without a standard input
    return stream is not None and stream.isatty()


def _terminal_size() -> tuple[int, int]:
    try:
        return os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 80, 24


def _transcript(config: ChatConfig) -> Transcript:
    return Transcript(system=config.conv_system_msg, template_name=config.conv_template or "")


def _options(config: ChatConfig, temperature: float) -> ChatOptions:
    """What requests carry: settings that were made, and a default where the API's is another."""
    if config.temperature is not None:
        sampling: dict[str, Any] = {"temperature": config.temperature}
    elif config.use_generation_config:
        sampling = {}
    else:
        sampling = {"temperature": temperature}
    asked = {
        "top_p": config.top_p,
        "repetition_penalty": config.repetition_penalty,
        "max_tokens": config.max_new_tokens,
        "seed": config.seed,
    }
    sampling |= {name: value for name, value in asked.items() if value is not None}
    if config.schema is not None:
        sampling["response_format"] = _response_format(config.schema)
    return ChatOptions(
        sampling, wished_max_tokens=MAX_NEW_TOKENS, with_history=not config.no_history
    )


def _response_format(file: str) -> dict[str, Any]:
    """Raises `UsageError` when `file` holds no JSON Schema."""
    try:
        schema = json.loads(Path(file).expanduser().read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read --schema {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema {file} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"--schema {file} holds no JSON object")
    described = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": described}
