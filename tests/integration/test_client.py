"""The client against a server that does everything a server may do to it."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from chatserve.cli.answer import ChatDelta, ModelInfo, Progress
from chatserve.cli.client import MAX_EVENT_BYTES, ChatClient
from chatserve.cli.joined_server import JoinedServer
from chatserve.cli.terminal import interruptible
from chatserve.errors import (
    BadStream,
    ChatserveError,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidAPIKey,
    ModelNotFound,
    NoWorkerAvailable,
    Overloaded,
    ShuttingDown,
    UnsupportedParameter,
    UsageError,
    WorkerLost,
)
from tests.fake_openai import REFUSALS, FakeOpenAI, Stream


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as server:
        yield server


@pytest.fixture
def client(server: FakeOpenAI) -> Iterator[ChatClient]:
    client = ChatClient(server.url, sleep=lambda _: None)
    yield client
    client.close()


def ask(client: ChatClient, question: str, **sampling: Any) -> list[ChatDelta]:
    return list(client.stream([{"role": "user", "content": question}], "fake-1b", **sampling))


def text_of(deltas: list[ChatDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def failure(client: ChatClient, question: str) -> tuple[str, ChatserveError]:
    """What came before the error, and the error."""
    pieces: list[str] = []
    with pytest.raises(ChatserveError) as caught:
        for delta in client.stream([{"role": "user", "content": question}], "fake-1b"):
            pieces.append(delta.text)
    return "".join(pieces), caught.value


def test_an_answer_comes_in_deltas_with_reason_and_usage(client: ChatClient) -> None:
    assert [delta for delta in ask(client, "hello") if delta != ChatDelta()] == [
        ChatDelta("Hel"),
        ChatDelta("lo"),
        ChatDelta(" there."),
        ChatDelta(finish_reason="stop"),
        ChatDelta(num_completion_tokens=3, num_prompt_tokens=5),
    ]


def test_chinese_and_emoji_come_whole(client: ChatClient) -> None:
    assert text_of(ask(client, "chinese")) == "你好，世界🌍"


def test_the_request_is_openais(client: ChatClient, server: FakeOpenAI) -> None:
    ask(client, "hello", temperature=0.7, max_tokens=5)
    assert server.bodies == [
        {
            "model": "fake-1b",
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.7,
            "max_tokens": 5,
        }
    ]


def test_a_byte_that_is_no_character_is_sent_as_a_replacement_character(
    client: ChatClient, server: FakeOpenAI
) -> None:
    typed = b"caf\xe9 \xf0\x9f\x8c\x8d".decode("utf-8", "surrogateescape")
    assert text_of(ask(client, typed))
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "caf\ufffd 🌍"}]
    client.count_tokens(typed, "fake-1b")  # neither does this raise


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_events_may_be_cut_anywhere(size: int, client: ChatClient, server: FakeOpenAI) -> None:
    deltas = [{"choices": [{"delta": {"content": char}}]} for char in "你a🌍"]
    events = [json.dumps(delta, ensure_ascii=False) for delta in deltas] + ["[DONE]"]
    whole = b"".join(f"data: {event}\r\n\r\n: ping\r\n\r\n".encode() for event in events)

    def cut(stream: Stream) -> None:
        for start in range(0, len(whole), size):
            stream.raw(whole[start : start + size])

    server.scripts["cut anywhere"] = cut
    assert text_of(ask(client, "cut anywhere")) == "你a🌍"


def test_half_a_surrogate_pair_becomes_a_replacement_character(
    client: ChatClient, server: FakeOpenAI
) -> None:
    def half(stream: Stream) -> None:
        stream.raw(b'data: {"choices": [{"delta": {"content": "a\\ud83d"}}]}\n\n')
        stream.raw(b"data: [DONE]\n\n")

    server.scripts["half"] = half
    assert text_of(ask(client, "half")) == "a\ufffd"


def test_closing_the_stream_closes_the_connection(client: ChatClient, server: FakeOpenAI) -> None:
    stream = client.stream([{"role": "user", "content": "endless"}], "fake-1b")
    assert [next(stream).text for _ in range(3)] == ["one ", "two ", "three"]
    assert not server.cancelled.is_set()
    stream.close()
    assert server.cancelled.wait(5)
    assert text_of(ask(client, "hello")) == "Hello there."


@pytest.mark.parametrize(
    ("question", "before", "kind", "message"),
    [
        ("die", "half an", WorkerLost, "lost the connection"),
        ("cut", "half an", WorkerLost, "the answer broke off"),
        ("failing", "half an", WorkerLost, "worker"),
        ("junk", "", BadStream, "no chat answer"),
        ("ten megabytes", "before", BadStream, str(MAX_EVENT_BYTES)),
        ("too long", "", ContextLengthExceeded, "prompt has 9 tokens"),
        ("busy", "", Overloaded, "queue is full"),
        ("stopping", "", ShuttingDown, "drains"),
        ("parameter", "", UnsupportedParameter, "no"),
        ("html", "", BadStream, "text/html"),
        ("gzip", "", BadStream, "compressed"),
        ("bare 500", "", GenerationFailed, "status 500"),
        ("bare 404", "", ModelNotFound, "status 404"),
        ("huge error", "", GenerationFailed, "status 500"),
        ("redirect", "", GenerationFailed, "status 307"),
    ],
)
def test_whatever_the_server_does_is_an_error_and_never_text(
    question: str, before: str, kind: type[ChatserveError], message: str, client: ChatClient
) -> None:
    text, error = failure(client, question)
    assert text == before
    assert type(error) is kind
    assert message in error.message
    assert text_of(ask(client, "hello")) == "Hello there."


@pytest.mark.parametrize(
    "event",
    ["7", "[]", "null", '"x"', '{"choices": 5}', '{"choices": [5]}', '{"choices": [{"delta": 5}]}',
     '{"choices": [{"delta": {"content": 5}}]}', '{"choices": [{"finish_reason": 5}]}',
     '{"usage": 7}', "[" * 100_000, '{"choices": {"a": 1}}'],
)  # fmt: skip
def test_an_event_of_another_shape_is_a_bad_stream(
    event: str, client: ChatClient, server: FakeOpenAI
) -> None:
    server.scripts["shape"] = lambda stream: stream.raw(f"data: {event}\n\n".encode())
    text, error = failure(client, "shape")
    assert (text, type(error)) == ("", BadStream)
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ({"message": "m", "code": "out_of_space"}, GenerationFailed, "m"),
        ("just text", GenerationFailed, "just text"),
        ({"message": 5}, GenerationFailed, "the server failed"),
        ({"message": "m", "code": "startup_error"}, GenerationFailed, "m"),
        ({"message": "m", "code": "rate_limit_exceeded"}, Overloaded, "m"),
    ],
)
def test_error_events_of_any_shape(
    body: Any, kind: type[ChatserveError], message: str, client: ChatClient, server: FakeOpenAI
) -> None:
    server.scripts["error"] = lambda stream: stream.event({"error": body})
    _, error = failure(client, "error")
    assert (type(error), error.message) == (kind, message)


def test_details_of_an_error_arrive(client: ChatClient) -> None:
    assert failure(client, "parameter")[1].param == "top_k"
    error = failure(client, "busy")[1]
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 7


def test_a_connection_that_fails_before_the_first_token_is_tried_again(
    server: FakeOpenAI,
) -> None:
    delays: list[float] = []
    client = ChatClient(server.url, sleep=delays.append)
    assert text_of(ask(client, "flaky")) == "Hello there."
    client.close()
    assert len(server.bodies) == 3
    assert len(delays) == 2
    assert sum(delays) < 1.0


def test_nothing_is_tried_again_after_the_first_token_or_an_answer_that_says_no(
    client: ChatClient, server: FakeOpenAI
) -> None:
    for question in ("die", "cut", "full", "failing", "junk", "bare 500", "too long"):
        failure(client, question)
        assert len(server.bodies) == 1
        server.bodies.clear()


@pytest.mark.parametrize(
    ("question", "kind", "note"),
    [
        ("busy", Overloaded, "the server is too busy: asking again in 7 s (%d of 2)"),
        ("stopping", ShuttingDown, "the server cannot answer now: asking again in 5 s (%d of 2)"),
    ],
)
def test_a_server_that_says_when_to_come_back_is_asked_again_and_no_more(
    question: str, kind: type[ChatserveError], note: str, server: FakeOpenAI
) -> None:
    delays: list[float] = []
    client = ChatClient(server.url, sleep=delays.append)
    notes: list[str] = []
    with pytest.raises(kind):
        for delta in client.stream([{"role": "user", "content": question}], "fake-1b"):
            notes.append(delta.note)
    client.close()
    assert notes == [note % number for number in (1, 2)]
    assert delays == [int(note.split(" in ")[1].split()[0])] * 2
    assert len(server.bodies) == 3


def test_and_has_an_answer_then(client: ChatClient) -> None:
    deltas = ask(client, "later")
    assert deltas[0].note == "the server is too busy: asking again in 1 s (1 of 2)"
    assert text_of(deltas) == "user: later"


@pytest.mark.parametrize("retry_after", ["", "soon", "-1", "31", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_one_that_does_not_say_when_or_says_too_late_is_not_asked_again(
    retry_after: str, client: ChatClient, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, body = REFUSALS["busy"]
    monkeypatch.setitem(REFUSALS, "busy", (status, {"retry-after": retry_after}, body))
    assert type(failure(client, "busy")[1]) is Overloaded
    assert len(server.bodies) == 1


def test_an_answer_that_goes_on_after_comments_is_one_answer(client: ChatClient) -> None:
    """Behind a controller a stream outlives its worker; meanwhile there are comments."""
    assert text_of(ask(client, "relieved")) == "half an answer"


def test_a_server_that_falls_silent_for_ever_is_given_up_once(
    client: ChatClient, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatserve.cli.client.SILENCE_S", 0.5)
    text, error = failure(client, "endless")
    assert text == "one two three"
    assert error.message == f"{server.url} said nothing for 0.5 s"
    assert server.cancelled.wait(10)
    assert failure(client, "silent")[0] == ""
    assert len(server.bodies) == 2


def test_a_machine_that_is_gone_is_noticed(client: ChatClient, server: FakeOpenAI) -> None:
    """The kernel asks, where a connection is silent, whether there is anybody."""
    stream = client.stream([{"role": "user", "content": "endless"}], "fake-1b")
    next(stream)
    (connection,) = client._http._transport._pool.connections  # type: ignore[attr-defined]
    own = connection._connection._network_stream.get_extra_info("socket")
    assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    stream.close()
    assert server.cancelled.wait(10)


def test_no_server_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    client = ChatClient(url)
    _, error = failure(client, "hello")
    client.close()
    assert type(error) is NoWorkerAvailable
    assert error.message == (
        f"cannot reach {url}/v1 (Connection refused); is the server running? "
        "`chatserve serve` starts one"
    )


def test_a_server_that_says_nothing_is_given_up_where_no_answer_is_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatserve.cli.client.CONTROL_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = ChatClient(f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(NoWorkerAvailable, match=r"said nothing for 0\.05 s"):
            client.models()
        client.close()


def test_models_with_and_without_details(client: ChatClient, server: FakeOpenAI) -> None:
    assert client.models() == [ModelInfo("fake-1b", "cpu", "float32", 8, 2048, "vicuna_v1.1")]
    server.models = b'{"data": [{"id": "plain"}, {"id": "x", "chatserve": {"dtype": 5}}, 7]}'
    assert client.models() == [ModelInfo("plain"), ModelInfo("x")]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"data": 7}', b"[" * 100_000])
def test_a_list_of_models_that_is_none(body: bytes, client: ChatClient, server: FakeOpenAI) -> None:
    server.models = body
    with pytest.raises(BadStream):
        client.models()


def test_progress_of_a_loading_server(client: ChatClient, server: FakeOpenAI) -> None:
    assert client.progress() is None
    server.progress = {"loaded_bytes": 1, "total_bytes": 2}
    assert client.progress() == Progress("fake-1b", "loading", 1, 2)
    server.progress = {"loaded_bytes": -1, "total_bytes": "x"}  # type: ignore[dict-item]
    assert client.progress() == Progress("fake-1b", "loading", 0, 0)


def test_the_key_is_sent_and_its_lack_explained(server: FakeOpenAI) -> None:
    server.key = "sk-right"
    right, wrong = ChatClient(server.url, "sk-right"), ChatClient(server.url)
    assert text_of(ask(right, "hello")) == "Hello there."
    _, error = failure(wrong, "hello")
    assert type(error) is InvalidAPIKey
    assert "CHATSERVE_API_KEY" in error.message
    with pytest.raises(InvalidAPIKey):
        wrong.models()
    right.close()
    wrong.close()


@pytest.mark.parametrize(
    ("url", "base_url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://example.invalid/openai/v1", "https://example.invalid/openai/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_base_urls(url: str, base_url: str) -> None:
    client = ChatClient(url)
    assert client.base_url == base_url
    client.close()


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://x", "http://", "http://x:99999", "http://x:0", "/weights",
     "http://[::1", "http://user:pass@127.0.0.1:8000"],
)  # fmt: skip
def test_what_is_no_server_url(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        ChatClient(url)
    assert "pass" not in caught.value.message


@pytest.mark.parametrize("key", ["line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    with pytest.raises(UsageError, match="the API key"):
        ChatClient("http://127.0.0.1:1", key)


def test_a_proxy_never_stands_before_this_machine(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    client = ChatClient(server.url)
    assert client.models()
    client.close()


def test_joining_chooses_the_only_model_or_the_named_one(server: FakeOpenAI) -> None:
    joined = JoinedServer(ChatClient(server.url), None)
    assert joined.progress() is None
    joined.wait(0)
    assert joined.model().name == "fake-1b"
    deltas = joined.stream([{"role": "user", "content": "hello"}], {"temperature": 0})
    assert text_of(list(deltas)) == "Hello there."
    assert [model.name for model in joined.models()] == ["fake-1b"]
    joined.choose(ModelInfo("other"))
    assert joined.model().name == "other"
    joined.close()
    server.models = b'{"data": [{"id": "a:sql", "parent": "a"}, {"id": "a", "parent": null}]}'
    beside = JoinedServer(ChatClient(server.url), None)
    assert beside.model() == ModelInfo("a")
    assert beside.models()[0] == ModelInfo("a:sql", parent="a")
    beside.close()
    alias = JoinedServer(ChatClient(server.url), "an alias")
    assert alias.model() == ModelInfo("an alias")
    alias.close()


@pytest.mark.parametrize(
    ("models", "kind", "message"),
    [
        (b'{"data": []}', NoWorkerAvailable, "serves no model now"),
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', UsageError, "serves a, b; choose one"),
    ],
)
def test_joining_needs_one_model(
    models: bytes, kind: type[ChatserveError], message: str, server: FakeOpenAI
) -> None:
    server.models = models
    client = ChatClient(server.url)
    with pytest.raises(kind, match=message):
        JoinedServer(client, None)
    client.close()


def test_a_stalled_answer_ends_when_its_stream_is_interrupted(
    client: ChatClient, server: FakeOpenAI
) -> None:
    """Ctrl-C while no byte comes: the signal's exception closes the connection.

    A signal that comes between Python's look at its signals and the system call that then sleeps
    wakes nobody. Here the sender waits for the very lock that is free just then, so that this
    happens; like a person it sends again.
    """
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def stall(stream: Stream) -> None:
        while not stream.has_news(within_s=0.05):
            signal.pthread_kill(main_thread, signal.SIGINT)
        stream.wait_for_disconnect()

    server.scripts["stall"] = stall
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            ask(client, "stall")
        # still deaf to further signals
        assert server.cancelled.wait(5)
    assert text_of(ask(client, "hello")) == "Hello there."


def test_ctrl_c_where_nobody_owns_the_response_still_closes_the_connection(
    client: ChatClient, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = httpx.Client.send

    def interrupted(self: httpx.Client, *args: Any, **options: Any) -> httpx.Response:
        lost = send(self, *args, **options)
        assert lost.status_code == 200
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(httpx.Client, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(client, "silent")
    assert server.cancelled.wait(5)
    assert text_of(ask(client, "hello")) == "Hello there."


def test_places_in_the_queue_come_before_the_answer(client: ChatClient) -> None:
    deltas = ask(client, "queue")
    assert [each.place for each in deltas if each.place is not None] == [3, 2]
    assert text_of(deltas) == "Hello there." and ChatDelta(place=3) in deltas[:3]


def test_how_far_the_model_is_comes_before_the_answer(client: ChatClient) -> None:
    [told] = [each.loading for each in ask(client, "queue") if each.loading is not None]
    assert (told.state, told.loaded_bytes, told.total_bytes) == ("loading", 1, 4)


def test_prompt_and_cached_tokens_are_read(client: ChatClient, server: FakeOpenAI) -> None:
    usage = {
        "prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}
    }  # fmt: skip

    def tell(stream: Stream) -> None:
        stream.text("a")
        stream.event({"choices": [], "usage": usage})
        stream.raw(b"data: [DONE]\n\n")

    server.scripts["tell"] = tell
    assert ask(client, "tell")[-1] == ChatDelta(
        num_completion_tokens=2, num_prompt_tokens=9, num_cached_tokens=8
    )
    for junk in ([1], {"prompt_tokens_details": 7}):
        usage = junk  # type: ignore[assignment]
        assert isinstance(failure(client, "tell")[1], BadStream)


@pytest.mark.parametrize(
    ("header", "places"),
    [("0-2,5", (0, 1, 2, 5)), ("3", (3,)), ("x", ()), ("5-", (5,)), ("0-99999999", ()), ("", ())],
)
def test_messages_that_were_left_out_are_told_before_the_first_text(
    header: str, places: tuple[int, ...], client: ChatClient, server: FakeOpenAI
) -> None:
    server.dropped["hello"] = header
    first = ask(client, "hello")[0]
    assert first.messages_dropped == places
    assert first.text == ("" if places else "Hel")


def test_tokens_are_counted_where_the_server_can(client: ChatClient, server: FakeOpenAI) -> None:
    joined = JoinedServer(client, "fake-1b")
    assert joined.count_tokens("one two three") == 3
    assert server.bodies == [
        {"model": "fake-1b", "prompt": "one two three", "add_special_tokens": False}
    ]
    refusing = ChatClient(server.url.replace("/v1", "/elsewhere/v1"))
    nobody = ChatClient("http://127.0.0.1:9")
    for other in (refusing, nobody):
        assert other.count_tokens("one", "fake-1b") is None
        other.close()


@pytest.mark.parametrize("question", ["silent", "endless"])
def test_another_thread_stops_an_answer_at_once(
    question: str, client: ChatClient, server: FakeOpenAI
) -> None:
    rival = JoinedServer(client, "fake-1b").rival(ModelInfo("fake-1b"))
    ends: list[ChatserveError] = []
    has_begun = threading.Event()

    def read() -> None:
        try:
            for delta in rival.stream([{"role": "user", "content": question}], {}):
                if delta.text:
                    has_begun.set()
        except ChatserveError as error:
            ends.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    if question == "endless":
        assert has_begun.wait(30)
    while not server.bodies:
        thread.join(0.01)
    rival.abort()
    thread.join(30)
    assert not thread.is_alive()
    rival.close()
    assert [type(error) for error in ends] == [WorkerLost]
    assert server.cancelled.wait(30)
    assert len(server.bodies) == 1, "it is not tried again"
