"""What was said stays: over reloads, in two tabs, while the server is gone, on a full disk."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from chatserve.errors import StorageFull, StorageUnavailable
from tests.browser.conftest import Opener
from tests.browser.house import House, Reply, house, said
from tests.browser.tab import WAIT_MS, Tab, tab

OF_ALL = b""
"""Whose conversations they are on a server without keys."""


def kept(home: House) -> list[str]:
    assert home.store is not None
    return [each["title"] for each in home.store.summaries(OF_ALL)]


def wait_for_kept(home: House, tab: Tab, *words: str) -> None:
    """Until the server has a chat in which all of these were said."""
    assert home.store is not None
    deadline = time.monotonic() + WAIT_MS / 1000
    while True:
        for summary in home.store.summaries(OF_ALL):
            document = home.store.find(OF_ALL, summary["id"]) or {"messages": []}
            if set(words) <= {each["content"] for each in document["messages"]}:
                return
        assert time.monotonic() < deadline, words
        tab.page.wait_for_timeout(50)


def only_in_the_browser(tab: Tab) -> None:
    choose(tab, "only in this browser")


def choose(tab: Tab, place: str) -> None:
    tab.button("Settings").click()
    tab.page.get_by_role("radio", name=place).check()
    tab.button("Close").click()


@pytest.mark.parametrize("place", ["server", "browser"])
def test_a_reload_keeps_the_chat(place: str, opened: Opener, home: House) -> None:
    home.answers(said("first"), said("second"))
    tab = opened()
    if place == "browser":
        only_in_the_browser(tab)
    tab.ask("kept?")
    tab.ended("first")
    tab.saved("kept?")
    if place == "server":
        wait_for_kept(home, tab, "first")
    else:
        tab.page.wait_for_timeout(600)  # there is nothing to see of it
    tab.page.reload()
    tab.ended("first")
    tab.ask("and this?")
    tab.ended("first", "second")
    assert home.engines["alpha"].prompts[-1] == "<user>kept?<assistant>first<user>and this?"
    # a new chat, and back by the list
    tab.button("New chat").click()
    expect(tab.answers).to_have_count(0)
    tab.chats.first.click()
    tab.ended("first", "second")
    assert kept(home) == (["kept?"] if place == "server" else [])


def test_a_reload_in_the_middle_keeps_what_had_come(opened: Opener, home: House) -> None:
    home.answers(Reply(["So ", "far"], hangs=True))
    tab = opened()
    tab.ask("reload?")
    expect(tab.bodies).to_have_text("So far")
    tab.saved("reload?")
    tab.page.reload()
    tab.ended("So far")
    home.engines["alpha"].wait_for(lambda engine: bool(engine.aborted))
    home.answers(said(" and on"))
    tab.button("Continue the answer").click()
    tab.ended("So far and on")


def test_what_is_typed_is_there_after_a_reload(opened: Opener, home: House) -> None:
    tab = opened()
    tab.question.press_sequentially("half a quest")
    tab.page.wait_for_function("() => JSON.stringify(localStorage).includes('half a quest')")
    tab.page.reload()
    expect(tab.question).to_have_value("half a quest")


def test_files_wait_in_their_chat_until_they_are_sent(opened: Opener, home: House) -> None:
    tab = opened()
    tab.ask("first?")
    tab.ended("Hello, wörld 🙂!")
    tab.saved("first?")
    tab.page.get_by_label("Files to attach").set_input_files(
        [{"name": "notes.txt", "mimeType": "text/plain", "buffer": b"what they are"}]
    )
    attached = tab.page.get_by_role("list", name="Attached files")
    expect(attached).to_contain_text("notes.txt")
    tab.question.fill("and these?")
    tab.button("New chat").click()
    expect(tab.answers).to_have_count(0)
    expect(attached).to_be_hidden()
    expect(tab.question).to_have_value("")
    tab.chats.first.click()
    expect(attached).to_contain_text("notes.txt")
    expect(tab.question).to_have_value("and these?")
    tab.question.press("Enter")
    tab.ended("Hello, wörld 🙂!", "Hello, wörld 🙂!")
    assert "what they are" in home.engines["alpha"].prompts[-1]
    expect(attached).to_be_hidden()


@pytest.mark.parametrize("first", ["server", "browser"])
def test_an_answer_ends_where_its_chat_is_kept(first: str, opened: Opener, home: House) -> None:
    """Also when chats of the other place are looked at while it comes."""
    home.answers(Reply(["It ", "goes "], hangs=True))
    tab = opened()
    if first == "browser":
        only_in_the_browser(tab)
    tab.ask("where?")
    expect(tab.bodies).to_have_text("It goes")
    tab.saved("where?")
    choose(tab, "only in this browser" if first == "server" else "on the server")
    expect(tab.page.locator(".banners")).to_contain_text("goes on, and is kept")
    expect(tab.page.get_by_text("No chats yet")).to_be_visible()
    choose(tab, "on the server" if first == "server" else "only in this browser")
    tab.chats.filter(has_text="where?").click()
    expect(tab.answers).to_have_attribute("aria-busy", "true")
    tab.button("Stop").click()
    tab.ended("It goes")
    expect(tab.answers).to_contain_text("stopped by you")
    assert kept(home) == (["where?"] if first == "server" else [])
    tab.page.reload()
    tab.ended("It goes")
    expect(tab.answers).to_contain_text("stopped by you")


def test_two_tabs_of_a_browser_show_the_same(opened: Opener, home: House) -> None:
    home.answers(said("one"), said("two"))
    tab = opened()
    tab.ask("shared?")
    tab.ended("one")
    tab.saved("shared?")
    other = Tab(tab.context, home.url).open(tab.page.url.removeprefix(home.url))
    other.ended("one")
    other.ask("more?")
    other.ended("one", "two")
    other.button("New chat").click()
    expect(other.answers).to_have_count(0)
    other.check()
    # a tab behind another is drawn once a second
    tab.page.bring_to_front()
    tab.ended("one", "two")


def test_two_browsers_that_change_the_same_chat_lose_nothing(opened: Opener, home: House) -> None:
    home.answers(said("one"), said("of the first"), said("of the second"))
    tab = opened(may_fail={409})
    tab.ask("both?")
    tab.ended("one")
    tab.saved("both?")
    # it knows nothing of the tab before but what the server keeps
    other = opened(tab.page.url.removeprefix(home.url), may_fail={409})
    other.ended("one")
    tab.ask("asked in the first")
    tab.ended("one", "of the first")
    other.ask("asked in the second")
    other.ended("one", "of the second")

    wait_for_kept(
        home, other, "asked in the first", "of the first", "asked in the second", "of the second"
    )


def test_a_chat_that_is_deleted_can_come_back_at_once(opened: Opener, home: House) -> None:
    tab = opened()
    tab.ask("delete me?")
    tab.saved("delete me?")
    tab.ended("Hello, wörld 🙂!")
    tab.page.get_by_role("button", name="More for delete me?").click()
    tab.page.get_by_role("menuitem", name="Delete").click()
    expect(tab.chats).to_have_count(0)
    expect(tab.answers).to_have_count(0)
    assert kept(home) == []
    tab.button("Undo").click()
    tab.saved("delete me?")
    assert kept(home) == ["delete me?"]


def test_one_that_was_deleted_elsewhere_and_goes_on_here(opened: Opener, home: House) -> None:
    """What this tab still has is its user's: it is kept anew, not lost and not asked for ever."""
    home.answers(said("one"), said("two"))
    tab = opened(may_fail={404})
    tab.ask("gone?")
    tab.ended("one")
    tab.saved("gone?")
    assert home.store is not None
    (summary,) = home.store.summaries(OF_ALL)
    home.store.delete(OF_ALL, summary["id"])
    tab.ask("still?")
    tab.ended("one", "two")
    expect(tab.page.get_by_text("Not saved yet")).to_have_count(0)
    wait_for_kept(home, tab, "gone?", "one", "still?", "two")


def test_a_restart_in_the_middle_of_an_answer(opened: Opener, home: House) -> None:
    home.answers(Reply(["Half ", "a word"], hangs=True))
    tab = opened(may_fail={503})
    tab.may_be_unreachable = True
    tab.ask("restart?")
    expect(tab.bodies).to_have_text("Half a word")
    tab.saved("restart?")
    home.stop()
    try:
        expect(tab.answers).to_contain_text("broke off")
        expect(tab.page.get_by_text("The server does not answer.")).to_be_visible()
        tab.ended("Half a word")
        # a question to nobody is kept, with what to do about it
        tab.ask("anybody?")
        expect(tab.page.get_by_role("alert").filter(has_text="does not answer")).to_be_visible()
    finally:
        home.start()
    expect(tab.page.get_by_text("The server does not answer. Nothing")).to_have_count(0)
    home.answers(said("I am."))
    tab.button("Try again").click()
    tab.ended("Half a word", "I am.")
    wait_for_kept(home, tab, "Half a word", "I am.")
    tab.page.reload()
    tab.ended("Half a word", "I am.")


def test_a_restart_between_two_questions_is_not_noticed(opened: Opener, home: House) -> None:
    home.answers(said("before"), said("after"))
    tab = opened(may_fail={503})
    tab.may_be_unreachable = True
    tab.ask("before?")
    tab.ended("before")
    tab.saved("before?")
    home.stop()
    home.start()
    tab.ask("after?")
    tab.ended("before", "after")


@pytest.mark.parametrize("status", [507, 503])
def test_a_disk_that_takes_nothing(
    status: int, opened: Opener, home: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat goes on, the reason is told, and a reload does not lose what was said."""
    kind = StorageFull if status == 507 else StorageUnavailable

    def refuse(*_: object) -> None:
        raise kind("conversations cannot be kept on the server (no room)")

    monkeypatch.setattr(home.store, "put", refuse)
    tab = opened(may_fail={status, 404})
    tab.ask("room?")
    tab.ended("Hello, wörld 🙂!")
    expect(tab.page.locator(".banners")).to_contain_text("(no room)")
    tab.page.reload()
    tab.ended("Hello, wörld 🙂!")


def test_a_server_that_keeps_none(browser: Browser, tmp_path: Path) -> None:
    with house(tmp_path, "alpha", keeps=False) as home, tab(browser, home.url) as found:
        found.open()
        found.ask("kept here?")
        found.ended("Hello, wörld 🙂!")
        found.saved("kept here?")
        found.page.reload()
        found.ended("Hello, wörld 🙂!")
        found.button("Settings").click()
        expect(found.page.get_by_role("radio", name="on the server")).to_be_disabled()
