"""A tab of a real browser on the page, which nothing may go wrong in unseen.

Requests to any other origin, errors of scripts, messages in the console and what the content
security policy had to stop are written down; a test fails at its end over each that it has not
allowed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect

WAIT_MS = 20_000
expect.set_options(timeout=WAIT_MS)
_VIOLATIONS = """
window.seen = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.seen.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
  console.error(`violation: ${event.violatedDirective} ${event.blockedURI}`);
});
"""
_STATUS = re.compile(r"Failed to load resource: .* status of (\d+)")
_REFUSED = "net::ERR_"


class Tab:
    """`may_fail`: statuses of answers that the browser may report in its console."""

    def __init__(self, context: BrowserContext, url: str, may_fail: Iterable[int] = ()) -> None:
        self.context = context
        self.url = url
        self.page: Page = context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.may_fail = set(may_fail)
        self.may_be_unreachable = False
        self.page.add_init_script(_VIOLATIONS)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(f"script: {error}"))
        self.page.on("crash", lambda _: self.faults.append("the tab crashed"))
        self.page.on("dialog", self._opened)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda socket: self.faults.append(f"socket: {socket.url}"))
        context.on("page", self._more)

    def open(self, path: str = "/") -> Tab:
        self.page.goto(self.url + path)
        return self

    def check(self) -> None:
        """What has to hold at the end of every test."""
        own = urlsplit(self.url)[:2]
        foreign = [
            url
            for url in self.requests
            if urlsplit(url)[:2] != own and not url.startswith(("data:", f"blob:{self.url}"))
        ]
        assert foreign == [], foreign
        assert self.faults == [], self.faults

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        status = _STATUS.match(message.text)
        if status is not None and int(status[1]) in self.may_fail:
            return
        if self.may_be_unreachable and _REFUSED in message.text:
            return
        self.faults.append(f"console: {message.text} ({message.location.get('url')})")

    def _opened(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _more(self, page: Page) -> None:
        if page is not self.page and page.opener() is self.page:
            self.faults.append(f"opened: {page.url}")

    # what people see and do

    @property
    def question(self) -> Locator:
        return self.page.get_by_role("textbox", name="Your question", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.locator("article.answer")

    @property
    def bodies(self) -> Locator:
        """What each answer says, without what was thought before it."""
        return self.page.locator("article.answer > .markdown")

    @property
    def questions(self) -> Locator:
        return self.page.locator("article.question")

    @property
    def chats(self) -> Locator:
        return self.page.locator(".chats").get_by_role("link")

    def button(self, name: str, **options: Any) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True, **options)

    def ask(self, text: str) -> None:
        self.question.fill(text)
        self.question.press("Enter")

    def ended(self, *texts: str) -> None:
        """All answers are over, and those are them."""
        expect(self.bodies).to_have_text(list(texts), use_inner_text=True)
        expect(self.page.locator("article.answer[aria-busy=true]")).to_have_count(0)

    def saved(self, title: str) -> None:
        """The chat of that title is in the list, which only what is kept comes into."""
        expect(self.chats.filter(has_text=title)).to_have_count(1)

    def look(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png")


@contextlib.contextmanager
def tab(
    browser: Browser, url: str, *, may_fail: Iterable[int] = (), **context: Any
) -> Iterator[Tab]:
    """With a profile of its own; checked at the end."""
    found = browser.new_context(**{"locale": "en-US", **context})
    try:
        opened = Tab(found, url, may_fail)
        yield opened
        opened.check()
    finally:
        found.close()
