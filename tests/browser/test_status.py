"""The operator's page: what it shows, on a phone too, and what its buttons do."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from chatserve.meter import BOUNDS
from chatserve.protocol.control import ModelCard, WorkerStatus
from chatserve.protocol.measured import HistogramCounts, Measured, RecentError
from tests.browser.conftest import Opener
from tests.browser.house import TOKEN, House, house
from tests.browser.tab import Tab, tab
from tests.browser.test_accessibility import findings

EVIL = "<img src=x onerror=alert(1)>"


def metrics() -> Measured:
    counts = [0] * (len(BOUNDS["time_to_first_token"]) + 1)
    counts[5] = 9
    return Measured(
        started_at=1.0, counters={"generation_tokens": 90}, outcomes={}, errors={},
        histograms={"time_to_first_token": HistogramCounts(counts=counts, sum=1.0)},
        num_kv_tokens=1000, rss_bytes=2_000_000_000, device="cpu", device_used_bytes=3 * 10**9,
        device_total_bytes=12 * 10**9,
        recent_errors=[RecentError(at=1e9, code="worker_stalled", message=EVIL, count=3)],
    )  # fmt: skip


def tell(home: House, name: str, **more: Any) -> None:
    """What a heartbeat brings."""
    status = WorkerStatus(
        state="ready", models=[ModelCard(name=name, created=1)], num_running=3, num_waiting=2,
        free_kv_tokens=250, metrics=metrics(), **more,
    )  # fmt: skip
    home.registry.register(name, home._workers[name], status)


@pytest.mark.parametrize("width", [1200, 360])
def test_it_shows_workers_models_and_errors(width: int, opened: Opener, home: House) -> None:
    tell(home, "alpha")
    tab = opened("/status", viewport={"width": width, "height": 800})
    card = tab.page.get_by_role("article").filter(has_text="alpha")
    expect(card).to_contain_text("ready")
    expect(card).to_contain_text("25 % of 12.0 GB")
    expect(card).to_contain_text("75 % of 1,000 tokens")
    expect(card).to_contain_text("2.0 GB")
    errors = tab.page.get_by_role("region", name="Recent errors").last
    expect(errors).to_contain_text("worker_stalled")
    expect(errors).to_contain_text(EVIL)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: str, opened: Opener, home: House) -> None:
    tell(home, "alpha")
    tab = opened("/status", color_scheme=scheme)
    expect(tab.page.get_by_role("article")).to_have_count(2)
    assert findings(tab.page) == []
    tab.button("Unload alpha").click()
    expect(tab.page.get_by_role("dialog")).to_be_visible()
    assert findings(tab.page) == []


def look(tab: Tab) -> None:
    """Now, not at the next turn."""
    tab.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")


def test_it_follows_and_says_when_the_server_is_gone(opened: Opener, home: House) -> None:
    tab = opened("/status")
    cards = tab.page.get_by_role("article")
    expect(cards).to_have_count(2)
    home.registry.remove("beta")
    look(tab)
    expect(cards).to_have_count(1)
    tab.may_be_unreachable = True
    home.stop()
    try:
        expect(tab.page.get_by_role("alert")).to_have_text("the server does not answer")
        expect(cards).to_have_count(1)  # as it was seen last
    finally:
        home.start()
    expect(tab.page.get_by_role("alert")).to_be_hidden()
    expect(cards).to_have_count(2)


def test_buttons_ask_first_and_want_a_key(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with (
        house(tmp_path_factory.mktemp("keys"), "gamma") as home,
        tab(browser, home.url, may_fail=[401]) as seen,
    ):
        seen.open("/status")
        drain = seen.page.get_by_role("button", name="Drain gamma")
        drain.click()
        dialog = seen.page.get_by_role("dialog")
        expect(dialog).to_contain_text("Let gamma finish")
        dialog.get_by_role("button", name="Cancel").click()
        expect(dialog).to_have_count(0)
        expect(drain).to_be_focused()
        assert home.registry.ready("gamma")
        drain.click()
        dialog.get_by_role("button", name="Drain").click()
        seen.page.get_by_label("API key").fill(TOKEN)
        seen.page.get_by_role("button", name="Log in").click()
        expect(seen.page.locator(".card .state")).to_have_text("draining")
        assert not home.registry.ready("gamma")
