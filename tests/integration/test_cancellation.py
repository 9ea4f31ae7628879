"""Whoever leaves costs the engine at most the step that was running: counted, not timed.

The engine stands at a turnstile: no step runs unless the test lets it. A server that noticed the
client's absence only when it had a token to send would never notice it here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from chatserve.engine.prompt import PromptBuilder
from tests import tiny
from tests.servers import reset
from tests.turnstile import WAIT_S, House, read_tokens, wait_for

DOORS = ["worker", "controller"]


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder)
    with ExitStack() as stack:
        yield House(stack, folder)


@pytest.fixture
def house(open_house: House) -> Iterator[House]:
    open_house.close_turnstile()
    yield open_house
    # what a failed test has left behind runs to its limit
    open_house.turnstile.open()
    wait_for(open_house.is_free)
    open_house.wait_until_servers_are_done()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 9], ids=["prefill", "decode"])
def test_no_step_begins_after_the_one_in_which_the_client_left(
    house: House, door: str, stream: bool, n: int, num_steps: int
) -> None:
    with house.open(door, stream=stream, n=n) as sock:
        house.turnstile.run_until_next(num_steps)
        if stream and num_steps > 1:
            read_tokens(sock, 3)
        reset(sock)
        house.wait_until_servers_are_done()
    assert house.num_steps() == num_steps and not house.is_free()
    house.turnstile.admit(1)
    wait_for(house.is_free, "the step that was running was not the last")
    assert house.num_steps() == num_steps + 1 == len(house.turnstile.batches)
    assert house.registry._workers["w"].num_ejections == 0


@pytest.mark.parametrize("door", DOORS)
def test_who_stays_goes_on_and_who_waits_is_forgotten(house: House, door: str) -> None:
    with house.open(door, stream=True, n=2) as stays:
        house.turnstile.run_until_next(9)
        with ExitStack() as stack:
            # the first of these is admitted in the next step, the other finds all places taken
            leaves = stack.enter_context(house.open(door, stream=True))
            wait_for(lambda: house.engine.stats().num_waiting == 1)
            waits = stack.enter_context(house.open(door, stream=False))
            wait_for(lambda: house.engine.stats().num_waiting == 2)
            house.turnstile.run_until_next(3)
            assert house.turnstile.batches[-1] == 3
            reset(waits)
            house.wait_until_servers_are_done(num_left=2)
            reset(leaves)
            house.wait_until_servers_are_done(num_left=1)
        house.turnstile.run_until_next(1)
        assert house.turnstile.batches[-1] == 2
        assert house.engine.stats().num_waiting == 0
        house.turnstile.run_until_next(4)
        assert house.turnstile.batches[-5:] == [2] * 5
        read_tokens(stays, 2 * 10)
        reset(stays)
        house.wait_until_servers_are_done()
    house.turnstile.admit(1)
    wait_for(house.is_free)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_leaving_while_the_prompt_is_prepared_costs_one_step_at_most(
    house: House, monkeypatch: pytest.MonkeyPatch, door: str, stream: bool
) -> None:
    is_prepared, has_left = threading.Event(), threading.Event()
    chat = PromptBuilder.chat

    def slow_chat(self: PromptBuilder, *arguments: Any, **options: Any) -> list[int]:
        is_prepared.set()
        assert has_left.wait(WAIT_S)
        return chat(self, *arguments, **options)

    monkeypatch.setattr(PromptBuilder, "chat", slow_chat)
    with house.open(door, stream=stream) as sock:
        assert is_prepared.wait(WAIT_S)
        reset(sock)
        if door == "controller":
            wait_for(lambda: house.controller.edge.num_in_flight == 0)
    has_left.set()
    house.wait_until_servers_are_done()
    # its first step may have begun before the server knew; whoever comes next is alone
    with house.open(door, stream=stream) as sock:
        house.turnstile.run_until_next(9)
        assert set(house.turnstile.batches) == {1}
        reset(sock)
        house.wait_until_servers_are_done()
    house.turnstile.admit(1)
    wait_for(house.is_free)
