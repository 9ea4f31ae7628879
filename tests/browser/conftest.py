"""One Chromium and one house of servers for each module of tests of the page."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from chatserve.server.page import built
from tests.browser.house import House, house
from tests.browser.tab import Tab, tab

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
"""What tabs look like at the end of each test."""
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

Opener = Callable[..., Tab]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Gone before the next module: its driver has a loop in this thread, and so nobody else may."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no chromium here")
    if built()["/"].status != 200:
        pytest.skip("the page was not built: make page")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=executable, headless=True, args=[*FLAGS])
        yield found
        found.close()


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Two models, no keys. `home` is the same, in order again for each test."""
    with house(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture
def home(site: House) -> House:
    site.reset()
    return site


@pytest.fixture
def opened(browser: Browser, home: House, request: pytest.FixtureRequest) -> Iterator[Opener]:
    """`opened(path, **context)`: a tab of a browser that knows nothing yet, checked at the end."""
    with contextlib.ExitStack() as stack:
        tabs: list[Tab] = []

        def open_one(path: str = "/", *, at: House = home, **context: Any) -> Tab:
            found = stack.enter_context(tab(browser, at.url, **context))
            tabs.append(found)
            return found.open(path)

        yield open_one
        name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower())
        for index, each in enumerate(tabs):
            each.look(f"{name}-{index}" if index else name, SHOTS)
