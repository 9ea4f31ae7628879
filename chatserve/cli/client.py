"""The HTTP client of any OpenAI-compatible server: models, readiness, streamed chat answers.

Knows URLs, keys and events; no terminal and no server code. Whatever the server does, callers see
text deltas or one of the errors in `chatserve.errors`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from chatserve.cli.address import is_loopback, keepalive, normalised, trust_of
from chatserve.cli.answer import ChatDelta, ModelInfo, Progress
from chatserve.cli.foreign_ways import adapted, foreign_way
from chatserve.cli.lean_httpx import httpx
from chatserve.cli.server_json import (
    error_body,
    read_delta,
    read_dropped,
    read_error,
    read_models,
    read_progress,
    read_token_count,
    read_whole,
    scalar_values,
)
from chatserve.errors import (
    BadStream,
    ChatserveError,
    InvalidRequest,
    NoWorkerAvailable,
    Overloaded,
    ShuttingDown,
    UsageError,
    WorkerLost,
)
from chatserve.protocol.sse import DONE, SSEDecoder, read_loading, read_place

CONNECT_TIMEOUT_S = 5.0
CONTROL_TIMEOUT_S = 10.0
SILENCE_S = 600.0
MAX_EVENT_BYTES = 1024 * 1024
MAX_BODY_BYTES = 4 * 1024 * 1024
RETRY_DELAYS_S = (0.1, 0.4)
MAX_RETRY_AFTER_S = 30
DROPPED_HEADER = "x-chatserve-messages-dropped"


class _Refusal(Exception):
    """An answer other than 200, behind the error that tells of it."""

    def __init__(self, retry_after: str) -> None:
        super().__init__()
        self.retry_after_s = int(retry_after) if retry_after.isdecimal() else None


class ChatClient:
    """Talks to one server. `base_url` may end in `/v1` or stop before it."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        ca_certs: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
        is_abortable: bool = False,
    ) -> None:
        """`ca_certs`: a PEM file with the authorities that an https server's certificate is from.
        `is_abortable`: another thread may call `abort`.

        Raises `UsageError` when `base_url` is not an http or https address, or the file is no use.
        """
        self.base_url = normalised(base_url)
        self._trust = trust_of(ca_certs)
        self._ca_certs = ca_certs
        self._api_key = api_key
        self._sleep = sleep
        self._sockets: list[socket.socket] | None = [] if is_abortable else None
        self._is_aborted = False
        self._foreign_ways: set[str] = set()
        headers = {"accept-encoding": "identity"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()):
                raise UsageError("the API key has characters that no HTTP header can hold")
            headers["authorization"] = f"Bearer {api_key}"
        self._headers = headers
        self._http = self._connect()

    def close(self) -> None:
        self._http.close()

    def again(self) -> ChatClient:
        """Another client of the same server, for a thread of its own, which `abort` can stop."""
        return ChatClient(self.base_url, self._api_key, ca_certs=self._ca_certs, is_abortable=True)

    def abort(self) -> None:
        """Break what another thread waits for here: it raises `WorkerLost` at once."""
        self._is_aborted = True
        for each in self._sockets or ():
            with contextlib.suppress(OSError):
                # that of the base class: TLS says no farewell in another thread's stream
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def models(self) -> list[ModelInfo]:
        """What the server serves. Raises `ChatserveError`."""
        with self._request("GET", "/models") as response:
            self._check(response)
            models = read_models(self._json(response))
        if models is None:
            raise BadStream(f"{self.base_url} does not list its models; is it an OpenAI API?")
        return models

    def progress(self, model: str | None = None) -> Progress | None:
        """How far the server is, or `model` there; None when it is ready.

        Raises `ChatserveError`.
        """
        root = self.base_url.removesuffix("/v1")
        with self._request("GET", "/health/ready", root=root) as response:
            if response.status_code == 200:
                return None
            if response.status_code != 503:
                self._check(response)
            return read_progress(self._json(response), model)

    def count_tokens(self, text: str, model: str) -> int | None:
        """How many tokens `text` is for `model`; None where the server cannot say."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        root = self.base_url.removesuffix("/v1")
        try:
            with self._request("POST", "/tokenize", root=root, body=body) as response:
                self._check(response)
                return read_token_count(self._json(response))
        except ChatserveError:
            return None

    def get(self, path: str, *, below_v1: bool = True) -> Any:
        """The JSON that is found there. Raises `ChatserveError`."""
        root = None if below_v1 else self.base_url.removesuffix("/v1")
        with self._request("GET", path, root=root) as response:
            self._check(response)
            return self._json(response)

    def post(self, path: str, body: Mapping[str, Any], *, below_v1: bool = True) -> Any:
        """The JSON that answers `body`; however long it takes. Raises `ChatserveError`."""
        root = None if below_v1 else self.base_url.removesuffix("/v1")
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        with self._request("POST", path, root=root, body=body, timeout=timeout) as response:
            self._check(response)
            return self._json(response)

    def stream(
        self, messages: Sequence[Mapping[str, str]], model: str, **sampling: Any
    ) -> Generator[ChatDelta, None, None]:
        """Ask for an answer and yield it as it comes; closing the generator cancels the request.

        Before the first text, a connection that fails is tried again, and so is a server that says
        when to come back, unless that is too long; a note tells of it. Raises `WorkerLost` when
        the stream ends before the answer is complete, `BadStream` when it is no stream of OpenAI
        events, else the error that the server names. With `stream=False` it comes in one piece.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **sampling}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        for num_tries, delay_s in enumerate((*RETRY_DELAYS_S, None), 1):
            has_begun = False
            try:
                with contextlib.closing(self._stream_adapted(body)) as deltas:
                    for delta in deltas:
                        has_begun = has_begun or delta.has_begun
                        yield delta
                return
            except KeyboardInterrupt:
                # it may strike between any two lines of httpx, where nobody owns the response yet
                self._http.close()
                self._http = self._connect()
                raise
            except (NoWorkerAvailable, Overloaded, ShuttingDown, WorkerLost) as error:
                if self._is_aborted or has_begun or delay_s is None or not _is_worth_a_try(error):
                    raise
                if isinstance(error.__cause__, _Refusal):
                    delay_s = error.__cause__.retry_after_s or 1
                    yield ChatDelta(note=_again_text(error, delay_s, num_tries))
                self._sleep(delay_s)

    def _connect(self) -> httpx.Client:
        # no TLS, no authorities: reading them takes as long as a tenth of all until a first prompt
        trust = self._trust if self.base_url.startswith("https:") else False
        return httpx.Client(
            headers=self._headers,
            timeout=httpx.Timeout(CONTROL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            # a proxy of the environment never stands between two processes of this machine
            trust_env=not is_loopback(self.base_url),
            verify=self._trust,
            transport=httpx.HTTPTransport(verify=trust, socket_options=keepalive()),
        )

    def _stream_adapted(self, body: dict[str, Any]) -> Generator[ChatDelta, None, None]:
        """Other servers know less, or by other names: what one refuses it is not sent again."""
        while True:
            sent = adapted(body, self._foreign_ways)
            try:
                yield from self._stream_once(sent)
                return
            except InvalidRequest as error:  # never in the middle of an answer
                way = foreign_way(sent, error)
                if way is None or not isinstance(error.__cause__, _Refusal):
                    raise
                self._foreign_ways.add(way)

    def _stream_once(self, body: dict[str, Any]) -> Generator[ChatDelta, None, None]:
        # the server decides when a worker is stalled, and sends comments until then; what comes in
        # one piece comes without them
        silence_s = SILENCE_S if body["stream"] else None
        timeout = httpx.Timeout(silence_s, connect=CONNECT_TIMEOUT_S)
        places: deque[ChatDelta] = deque()
        decoder = SSEDecoder(
            max_event_bytes=MAX_EVENT_BYTES, on_comment=partial(_note_place, places, body["model"])
        )
        with self._request("POST", "/chat/completions", body=body, timeout=timeout) as response:
            self._check(response)
            content_type = response.headers.get("content-type", "")
            if content_type.startswith("application/json"):
                yield read_whole(self._json(response))
                return
            if not content_type.startswith("text/event-stream"):
                raise BadStream(
                    f"{self.base_url} answered {content_type or 'nothing'}, not a stream"
                )
            if dropped := read_dropped(response.headers.get(DROPPED_HEADER, "")):
                yield ChatDelta(messages_dropped=dropped)
            has_ended = False
            for chunk in response.iter_raw():
                events = decoder.feed(chunk)
                while places:
                    yield places.popleft()
                for event in events:
                    if event.data == DONE:
                        return
                    delta = read_delta(event.data)
                    has_ended = has_ended or delta.finish_reason is not None
                    yield delta
            if has_ended:  # some servers leave it at that
                return
        raise WorkerLost(
            f"the answer broke off: {self.base_url} closed the connection before its end"
        ) from httpx.RemoteProtocolError(f"no {DONE}")

    @contextlib.contextmanager
    def _request(
        self,
        method: str,
        path: str,
        *,
        root: str | None = None,
        body: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[httpx.Response]:
        """One request with httpx's failures told in our words."""
        url = (root if root is not None else self.base_url) + path
        if body is not None:
            options |= {"content": _encoded(body), "headers": {"content-type": "application/json"}}
        if self._sockets is not None:
            options["extensions"] = {"trace": self._note_socket}
        try:
            with self._http.stream(method, url, **options) as response:
                if "content-encoding" in response.headers:
                    raise BadStream(
                        f"{self.base_url} sends compressed answers, which were not asked for"
                    )
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if "certificate verify failed" in str(error):
                raise NoWorkerAvailable(
                    f"{self.base_url} shows a certificate that nobody here vouches for "
                    f"({_cause(error)}); name its authority by --ssl-ca-certs"
                ) from error
            raise NoWorkerAvailable(
                f"cannot reach {self.base_url} ({_cause(error)}); is the server running? "
                f"`chatserve serve` starts one"
            ) from error
        except httpx.TimeoutException as error:
            limit_s = options.get("timeout", self._http.timeout).read
            raise NoWorkerAvailable(f"{self.base_url} said nothing for {limit_s:g} s") from error
        except httpx.TransportError as error:
            raise WorkerLost(f"lost the connection to {self.base_url} ({_cause(error)})") from error
        except httpx.InvalidURL as error:
            raise UsageError(f"{self.base_url} is not a URL: {error}") from error

    def _note_socket(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by httpcore at each step; each new connection is remembered for `abort`."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            assert self._sockets is not None
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self._is_aborted:
                self.abort()

    def _check(self, response: httpx.Response) -> None:
        """Raise what an answer other than 200 says."""
        if response.status_code == 200:
            return
        try:
            table = self._json(response)
        except BadStream:
            table = None
        error = error_body(table)
        retry_after = response.headers.get("retry-after", "")
        otherwise = f"{self.base_url} answered with status {response.status_code}"
        told = read_error(error, response.status_code, retry_after, otherwise=otherwise)
        raise told from _Refusal(retry_after)

    def _json(self, response: httpx.Response) -> Any:
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise BadStream(f"{self.base_url} sent an answer over {MAX_BODY_BYTES} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise BadStream(f"{self.base_url} sent an answer that is not JSON") from None


def _encoded(body: Mapping[str, Any]) -> bytes:
    """A terminal, a command line or a file's name may hold a byte that is no character."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return scalar_values(text).encode()


def _is_worth_a_try(error: ChatserveError) -> bool:
    """Whether nobody has begun to answer, and somebody soon may."""
    cause = error.__cause__
    if isinstance(cause, _Refusal):
        wait_s = cause.retry_after_s
        return wait_s is not None and wait_s <= MAX_RETRY_AFTER_S
    return isinstance(cause, httpx.TransportError) and not isinstance(cause, httpx.ReadTimeout)


def _again_text(error: ChatserveError, delay_s: float, num_tries: int) -> str:
    what = "is too busy" if isinstance(error, Overloaded) else "cannot answer now"
    return (
        f"the server {what}: asking again in {delay_s:g} s ({num_tries} of {len(RETRY_DELAYS_S)})"
    )


def _cause(error: Exception) -> str:
    return (
        str(error).removeprefix("[Errno ").partition("] ")[2] or str(error) or type(error).__name__
    )


def _note_place(places: deque[ChatDelta], model: str, comment: str) -> None:
    if (place := read_place(comment)) is not None:
        places.append(ChatDelta(place=place))
    elif (loading := read_loading(comment)) is not None:
        places.append(ChatDelta(loading=Progress(model, "loading", *loading)))
