"""`chatserve top`: a running server, live in the terminal. `q` leaves."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from chatserve import config
from chatserve.cli.escapes import one_line
from chatserve.cli.operated_server import OperatedServer, OperatorOptions, find_server
from chatserve.cli.status_view import in_seconds, status_lines
from chatserve.cli.terminal import exits_on_signals
from chatserve.errors import BadStream, ChatserveError, UsageError
from chatserve.flags import CommandParser
from chatserve.protocol.measured import STATUS_PATH
from chatserve.settings import setting

if sys.platform != "win32":
    import termios
    import tty

_LOOK_S = 0.1
PLAIN_WIDTH = 200
"""Where a table goes into a pipe."""
Status = dict[str, Any]


@dataclass(frozen=True)
class News:
    """A look at the server at `url`; or, without a status, `trouble`: why there is none."""

    url: str
    status: Status | None = None
    trouble: str = ""


@dataclass(frozen=True)
class TopConfig(OperatorOptions):
    """Settings of `chatserve top`."""

    once: bool = setting(False, "print what there is now, and leave")
    json: bool = setting(False, "print it as JSON, as `GET /admin/status` says it, and leave")
    interval_s: float = setting(1.0, "seconds from one look to the next", ge=0.2, le=3600)


def main(argv: list[str]) -> int:
    """Draw until `q`. Raises `UsageError` where no server runs, and what a first look raises."""
    parser = CommandParser(
        "chatserve top",
        "Watch a running server: workers, memory, queue, tokens a second, latencies, errors. "
        "`q` leaves.",
        TopConfig,
    )
    options = config.build(TopConfig, parser.flags(argv))
    console = Console(highlight=False)
    with contextlib.closing(find_server(options)) as server:
        url, status = server.url, _look(server)
    if options.json:
        print(json.dumps(status, indent=1))
    elif options.once or not console.is_terminal:
        width = console.width if console.is_terminal else PLAIN_WIDTH
        for line in status_lines(status, width):
            console.print(line, soft_wrap=True)
    else:
        with exits_on_signals(), contextlib.closing(Watch(options, options.interval_s)) as watch:
            _Screen(console, url, status).run(watch)
    return 0


def _look(server: OperatedServer) -> Status:
    """Raises `ChatserveError`."""
    status = server.client.get(STATUS_PATH, below_v1=False)
    if not isinstance(status, dict) or "workers" not in status:
        raise BadStream(f"{server.url} does not tell how it is; is it chatserve?")
    return status


class Watch:
    """Looks again and again, in a thread of its own; to be closed.

    A server that is found by itself is looked for anew when it is gone: it may come back elsewhere.
    """

    def __init__(self, options: OperatorOptions, interval_s: float) -> None:
        self._options = options
        self._interval_s = interval_s
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def news(self) -> News | None:
        """The latest, if there is any."""
        latest = None
        with contextlib.suppress(queue.Empty):
            while True:
                latest = self._news.get_nowait()
        return latest

    def close(self) -> None:
        self._is_closed.set()

    def _run(self) -> None:
        server: OperatedServer | None = None
        while not self._is_closed.wait(self._interval_s):
            try:
                server = server or find_server(self._options)
                self._news.put(News(server.url, _look(server)))
            except ChatserveError as error:
                # that none of ours runs is no news of the one that did
                is_gone = isinstance(error, UsageError)
                self._news.put(News("", trouble="it is gone" if is_gone else error.message))
                if server is not None:
                    server.close()
                server = None
        if server is not None:
            server.close()


class _Screen:
    """What is drawn of the last status, and of how long ago that was."""

    def __init__(self, console: Console, url: str, status: Status) -> None:
        self._console = console
        self._url = url
        self._status = status
        self._seen_at = time.monotonic()
        self._trouble = ""

    def run(self, watch: Watch) -> None:
        with (
            Live(console=self._console, screen=True, auto_refresh=False) as live,
            _keys() as pressed,
        ):
            size = self._console.size
            live.update(self._drawn(), refresh=True)
            while True:
                if pressed(_LOOK_S) in ("q", "Q", "\x04"):
                    return
                news = watch.news()
                if news is None and self._console.size == size:
                    continue
                if news is not None:
                    self._take(news)
                size = self._console.size
                live.update(self._drawn(), refresh=True)

    def _take(self, news: News) -> None:
        self._trouble = news.trouble
        if news.status is not None:
            self._url, self._status, self._seen_at = news.url, news.status, time.monotonic()

    def _drawn(self) -> Text:
        width, height = self._console.size
        lines = status_lines(self._status, width)
        head = Text(one_line(self._url), style="cyan")
        if self._trouble:
            ago = in_seconds(time.monotonic() - self._seen_at)
            words = one_line(f"{self._trouble} ({self._url})")
            head = Text(f"not seen for {ago}: {words}", style="bold red")
            for line in lines:
                line.stylize("dim")
        shown = [head, *lines]
        foot = Text("q leaves", style="dim")
        if len(shown) > height - 1:
            shown = shown[: max(1, height - 2)]
            foot = Text("… more does not fit here; q leaves", style="dim")
        for line in (head, foot):
            line.truncate(max(1, width), overflow="ellipsis")
        return Text("\n").join([*shown, foot])


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key. Keys do not show meanwhile."""
    keyboard = sys.stdin
    if sys.platform == "win32" or not keyboard.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    descriptor = keyboard.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)

    def key(seconds: float) -> str:
        if not select.select([descriptor], [], [], seconds)[0]:
            return ""
        # an end of the terminal is a wish to leave
        return os.read(descriptor, 1).decode("ascii", "replace") or "q"

    try:
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
