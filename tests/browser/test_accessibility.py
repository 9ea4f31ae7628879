"""axe judges every view of the page, in light and in dark: nothing serious, nothing critical."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Opener
from tests.browser.house import House, Reply, house, said
from tests.browser.tab import Tab, tab
from tests.browser.test_chat import MARKDOWN
from tests.browser.test_side_by_side import beside

AXE = Path(sys.prefix) / "node" / "node_modules" / "axe-core" / "axe.min.js"


@cache
def axe() -> str:
    if not AXE.exists():
        pytest.skip("axe-core is not there: make judges (it needs npm)")
    return AXE.read_text("utf-8")


def findings(page: Page, level: tuple[str, ...] = ("serious", "critical")) -> list[str]:
    """Rule, and the first place that breaks it."""
    source = axe()
    page.evaluate(f"() => {{ {source}; window.axe = axe; }}")
    result = page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{each['id']}: {each['nodes'][0]['target']} {each['nodes'][0]['html'][:150]}"
        for each in result["violations"]
        if each["impact"] in level
    ]


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> Iterator[str]:
    axe()
    return request.param


def test_chat(scheme: str, opened: Opener, home: House) -> None:
    home.answers(said(MARKDOWN), Reply(["half"], hangs=True))
    tab = opened(color_scheme=scheme)
    expect(tab.question).to_be_focused()
    assert findings(tab.page) == []
    tab.ask("all of it?")
    expect(tab.page.locator("article.answer[aria-busy=true]")).to_have_count(0)
    assert findings(tab.page) == []
    # settings, shortcuts, menus, the panel; an answer that comes
    tab.button("Settings").click()
    assert findings(tab.page) == []
    tab.button("Close").click()
    tab.button("Sampling (Alt+S)").click()
    tab.page.get_by_role("button", name="More for all of it?").click()
    assert findings(tab.page) == []
    tab.page.keyboard.press("Escape")
    tab.ask("more?")
    expect(tab.bodies.last).to_have_text("half")
    assert findings(tab.page) == []


def test_side_by_side(scheme: str, opened: Opener, home: House) -> None:
    tab = opened(color_scheme=scheme)
    beside(tab)
    tab.ask("who?")
    tab.ended("Hello, wörld 🙂!", "Hello, wörld 🙂!")
    assert findings(tab.page) == []


def test_login(scheme: str, browser: Browser, tmp_path: Path) -> None:
    with (
        house(tmp_path, "alpha", api_keys=["k"]) as home,
        tab(browser, home.url, may_fail={401}, color_scheme=scheme) as found,
    ):
        found.open()
        expect(found.page.get_by_label("API key")).to_be_focused()
        assert findings(found.page) == []


def test_on_a_phone(scheme: str, opened: Opener, home: House) -> None:
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    tab = opened(color_scheme=scheme, **phone)
    tab.question.fill("phone?")
    tab.button("Send").click()
    tab.ended("Hello, wörld 🙂!")
    assert findings(tab.page) == []
    tab.page.get_by_role("button", name="List of chats").click()
    assert findings(tab.page) == []


def test_what_axe_finds_is_told(opened: Opener, home: House) -> None:
    axe()
    tab: Tab = opened()
    tab.page.evaluate(
        "() => document.querySelector('main').append(document.createElement('button'))"
    )
    assert [each.partition(":")[0] for each in findings(tab.page)] == ["button-name"]
