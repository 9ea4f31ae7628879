"""A server with keys: the page is there for everybody, what is kept for those who have one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.conftest import Opener
from tests.browser.house import House, house, said
from tests.browser.tab import Tab

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("home"), "alpha", api_keys=KEYS) as found:
        yield found


def log_in(tab: Tab, key: str, *, remember: bool = False) -> None:
    dialog = tab.page.get_by_role("dialog")
    dialog.get_by_label("API key").fill(key)
    if remember:
        dialog.get_by_label("Remember it in this browser").check()
    dialog.get_by_role("button", name="Log in").click()


def log_out(tab: Tab) -> None:
    tab.button("Settings").click()
    tab.button("Log out").click()


def test_the_page_asks_for_a_key_and_goes_on_with_it(opened: Opener, home: House) -> None:
    tab = opened(may_fail={401})
    expect(tab.page.get_by_label("API key")).to_be_focused()
    log_in(tab, "wrong-key")
    expect(tab.page.get_by_role("dialog")).to_contain_text("missing or wrong")
    log_in(tab, KEYS[0])
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    tab.ask("let in?")
    tab.ended("Hello, wörld 🙂!")
    tab.saved("let in?")
    # it is known in this tab until it is closed, and nowhere else
    tab.page.reload()
    tab.ended("Hello, wörld 🙂!")
    other = Tab(tab.context, home.url, may_fail={401}).open()
    expect(other.page.get_by_label("API key")).to_be_focused()
    other.check()
    # never in an address
    assert not [url for url in (*tab.requests, *other.requests) if "key" in url]


def test_after_logging_out_nothing_is_left_to_see(opened: Opener, home: House) -> None:
    home.answers(said("for the first alone"))
    tab = opened(may_fail={401})
    log_in(tab, KEYS[0], remember=True)
    tab.ask("whose?")
    tab.ended("for the first alone")
    tab.saved("whose?")
    # remembered, as asked for
    other = Tab(tab.context, home.url, may_fail={401}).open()
    other.saved("whose?")
    other.check()
    log_out(tab)
    expect(tab.page.get_by_label("API key")).to_be_focused()
    expect(tab.page.get_by_text("for the first alone")).to_have_count(0)
    expect(tab.chats).to_have_count(0)
    left = "() => JSON.stringify({ ...localStorage, ...sessionStorage })"
    assert KEYS[0] not in tab.page.evaluate(left)
    # another key, another list
    log_in(tab, KEYS[1])
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    expect(tab.page.get_by_text("No chats yet")).to_be_visible()
    log_out(tab)
    log_in(tab, KEYS[0])
    tab.saved("whose?")


def test_who_closes_the_dialog_can_open_it_again(opened: Opener, home: House) -> None:
    tab = opened(may_fail={401})
    expect(tab.page.get_by_label("API key")).to_be_focused()
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    tab.page.locator(".banners").get_by_role("button", name="Log in").click()
    log_in(tab, KEYS[1])
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    tab.ask("in?")
    tab.ended("Hello, wörld 🙂!")
