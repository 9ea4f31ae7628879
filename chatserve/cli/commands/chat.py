"""`chatserve chat [WEIGHTS]`: flags to a chat on a private or a running server.

The composition root of the terminal client; what it puts together is in `chatserve.cli`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TextIO

from chatserve import environment
from chatserve.cli.asking import Server, answer_once, wait_until_ready
from chatserve.cli.chat import Chat
from chatserve.cli.json_answer import JsonAnswer
from chatserve.cli.lines import ProgramLines
from chatserve.cli.person import CHAT_TEMPERATURE, Person
from chatserve.cli.piped_input import read_piped
from chatserve.cli.private_server import PrivateServer
from chatserve.cli.render import Display, PlainDrawer
from chatserve.cli.request_settings import files_of, options_of, transcript_of
from chatserve.cli.screens import display_of, script_drawer
from chatserve.cli.terminal import exits_on_signals
from chatserve.config import DEFAULT_WEIGHTS, ChatConfig, build
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.options import ModelOptions
from chatserve.settings import fields_of, flags_of

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
        person = Person(config)
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


def _chat_with_program(server: Server, config: ChatConfig) -> None:
    transcript = transcript_of(config)
    question_role, answer_role = transcript.roles
    drawer = PlainDrawer(sys.stdout, prefix=f"[!OP:{answer_role}]: ")
    options = dataclasses.replace(options_of(config, CHAT_TEMPERATURE), is_typed=False)
    chat = Chat(server, display_of(drawer, config), transcript, options)
    chat.run(ProgramLines(sys.stdin, sys.stdout, question_role))


def _answer_once(config: ChatConfig, server_command: ServerCommand) -> None:
    is_json = config.json or config.stream_json
    report = JsonAnswer(sys.stdout, has_pieces=config.stream_json)
    with report.reported() if is_json else contextlib.nullcontext():
        files, options = files_of(config), options_of(config, 0.0)
        if config.no_stream:
            options = dataclasses.replace(options, sampling={**options.sampling, "stream": False})
        if is_json:
            # JSON escapes whatever needs it
            as_is = dataclasses.replace(config, raw=True)
            display = display_of(report, as_is, take_thought=report.think)
        else:
            display = display_of(script_drawer(config), config)
        is_watched = sys.stdout.isatty() and sys.stderr.isatty() and not is_json
        # a script's log is no place for what has gone well
        tell = display.note if sys.stderr.isatty() else _tell_nobody
        with exits_on_signals(), _server(config, server_command, tell) as server:
            transcript = transcript_of(config)
            transcript.ask(files.before(_question(config, display)))
            wait_until_ready(server, display)
            report.model = server.model().name
            answer_once(
                server, display, transcript, options, answer=report.answer, show_status=is_watched
            )


def _question(config: ChatConfig, display: Display) -> str:
    """`--prompt` and what is piped in, one after the other."""
    piped = ""
    if config.prompt is None or not _is_terminal(sys.stdin):
        piped = read_piped(sys.stdin, display.note, errors=config.input_errors)
    question = "\n\n".join(part for part in (config.prompt, piped) if part)
    if not question.strip():
        raise UsageError("there is no prompt: -p is empty and so is standard input")
    return question


def _is_terminal(stream: TextIO | None) -> bool:
    # a process may be started without a standard input
    return stream is not None and stream.isatty()
