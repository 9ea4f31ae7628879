"""A server with keys: the page is there for everybody, what is kept for those who have one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect

from chatserve.errors import StorageFull
from tests.browser.conftest import Opener
from tests.browser.house import House, Reply, house, said
from tests.browser.tab import Tab

LIST = "/page/conversations"
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


def not_listed(tab: Tab, title: str, act: Callable[[], object]) -> None:
    """Once the list that `act` asks for has come and is drawn."""
    with tab.page.expect_response(lambda each: each.url.endswith(LIST) and each.ok) as answer:
        act()
    answer.value.finished()
    tab.page.evaluate("() => new Promise((done) => setTimeout(done, 50))")
    expect(tab.chats.filter(has_text=title)).to_have_count(0)


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
    # a tab behind another is drawn once a second, which every click would wait for
    tab.page.bring_to_front()
    log_out(tab)
    expect(tab.page.get_by_label("API key")).to_be_focused()
    expect(tab.page.get_by_text("for the first alone")).to_have_count(0)
    # nor in another tab that had the same key from this browser
    expect(other.page.get_by_label("API key")).to_be_visible()
    expect(other.chats).to_have_count(0)
    other.check()
    other.page.close()
    expect(tab.chats).to_have_count(0)
    left = "() => JSON.stringify({ ...localStorage, ...sessionStorage })"
    assert KEYS[0] not in tab.page.evaluate(left)
    # another key, another list
    not_listed(tab, "whose?", lambda: log_in(tab, KEYS[1]))
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    log_out(tab)
    log_in(tab, KEYS[0])
    tab.saved("whose?")


def test_logging_out_keeps_the_answer_and_leaves_nothing_behind(
    opened: Opener, home: House
) -> None:
    home.answers(Reply(["So ", "far"], hangs=True))
    tab = opened(may_fail={401})
    log_in(tab, KEYS[0])
    expect(tab.page.get_by_role("dialog")).to_have_count(0)
    tab.button("Sampling (Alt+S)").click()
    tab.page.get_by_label("System message").fill("I am the first.")
    tab.ask("half of it?")
    expect(tab.bodies).to_have_text("So far")
    tab.question.fill("a secret draft")
    log_out(tab)
    expect(tab.page.get_by_label("API key")).to_be_focused()
    left = tab.page.evaluate("() => JSON.stringify({ ...localStorage, ...sessionStorage })")
    assert "secret" not in left and "the first" not in left and KEYS[0] not in left
    not_listed(tab, "half of it?", lambda: log_in(tab, KEYS[1]))
    expect(tab.question).to_have_value("")
    expect(tab.page.get_by_label("System message")).to_have_value("")
    log_out(tab)
    log_in(tab, KEYS[0])
    tab.chats.filter(has_text="half of it?").click()
    # as it was stopped, not as it was saved while it came
    tab.ended("So far")
    expect(tab.answers).to_contain_text("stopped by you")


def test_what_the_server_has_no_room_for_is_asked_about(
    opened: Opener, home: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in this browser, for its own key alone; logging out deletes it, once agreed to."""

    def refuse(*_: object) -> None:
        raise StorageFull("conversations cannot be kept on the server (no room)")

    monkeypatch.setattr(home.store, "put", refuse)
    tab = opened(may_fail={401, 404, 507})
    log_in(tab, KEYS[0])
    tab.ask("room?")
    tab.ended("Hello, wörld 🙂!")
    expect(tab.page.locator(".banners")).to_contain_text("(no room)")
    # with another key it is not seen
    tab.page.evaluate(f"() => sessionStorage.setItem('chatserve.key', '{KEYS[1]}')")
    tab.open("/")
    not_listed(tab, "room?", tab.page.reload)
    tab.page.evaluate(f"() => sessionStorage.setItem('chatserve.key', '{KEYS[0]}')")
    tab.page.reload()
    tab.saved("room?")
    log_out(tab)
    dialog = tab.page.get_by_role("dialog")
    expect(dialog).to_contain_text("not kept all of 1 chat")
    dialog.get_by_role("button", name="Cancel").click()
    tab.saved("room?")
    log_out(tab)
    dialog.get_by_role("button", name="Log out").click()
    not_listed(tab, "room?", lambda: log_in(tab, KEYS[0]))


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
