"""Whatever a model writes is shown, and nothing else: no script of it runs, nobody hears of it."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import expect

from chatserve.errors import GenerationFailed
from tests.browser.conftest import Opener
from tests.browser.house import House, Reply
from tests.browser.payloads import HOST, PAYLOADS
from tests.browser.tab import Tab

OWNER = b""
_ARMED = "window.hits = 0; window.hit = () => { window.hits += 1; };"
_LEFT = """() => {
  const inside = [...document.querySelectorAll(
    ".answer .markdown *, .question-text *, .chats *, .file *, h1 *")];
  const known = new Set([
    "A", "B", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DETAILS", "DIV", "EM", "FIGCAPTION",
    "FIGURE", "H2", "H3", "H4", "H5", "H6", "HR", "I", "KBD", "LI", "OL", "P", "PRE", "S", "SMALL",
    "SPAN", "STRONG", "SUB", "SUMMARY", "SUP", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "U",
    "UL", "svg", "path", "use", "circle", "rect", "line", "polyline", "g",
  ]);
  const bad = new Set([
    "style", "src", "srcset", "background", "ping", "action", "formaction", "name", "xlink:href",
    "srcdoc",
  ]);
  const found = [];
  for (const element of inside) {
    if (!known.has(element.tagName)) found.push(`<${element.tagName}>`);
    for (const { name, value } of element.attributes) {
      if (name.startsWith("on") || bad.has(name)) found.push(`${name}=${value}`);
      if (name === "id" && !element.closest("svg")) found.push(`id=${value}`);
      if (name === "href" && element.tagName === "A" && !element.closest(".chats")
        && !/^(https?:|mailto:)/i.test(element.href)) found.push(`href=${value}`);
    }
  }
  return found;
}"""


def check_nothing_ran(tab: Tab) -> None:
    assert tab.page.evaluate("window.hits") == 0
    # the sanitizer comes first: the policy had nothing to stop
    assert tab.page.evaluate("window.seen") == []
    assert tab.page.evaluate(_LEFT) == []
    assert not [url for url in tab.requests if "other.example" in url]
    assert tab.page.url.startswith(tab.url)


def conversation(texts: list[str]) -> dict[str, Any]:
    """A chat in which a model has said all of them."""
    messages: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        parent = messages[-1]["id"] if messages else None
        messages.append(
            {"id": f"q{index}", "parent": parent, "role": "user", "content": text[:200],
             "created_at": 1.0 + index, "files": [{"name": text[:80], "text": text}]}
        )  # fmt: skip
        messages.append(
            {"id": f"a{index}", "parent": f"q{index}", "role": "assistant", "content": text,
             "created_at": 1.5 + index, "model": text[:80], "finish_reason": text[:80],
             "error": text[:200] if index % 5 == 0 else ""}
        )  # fmt: skip
    return {
        "id": "hostile-chat", "title": PAYLOADS[6], "revision": 0, "created_at": 1.0,
        "changed_at": 2.0, "models": [PAYLOADS[6]], "system": PAYLOADS[0], "sampling": {},
        "messages": messages, "heads": [messages[-1]["id"]],
    }  # fmt: skip


def test_there_are_enough() -> None:
    assert len(set(PAYLOADS)) >= 150


def test_what_is_kept_is_shown_and_does_nothing(opened: Opener, home: House) -> None:
    texts = [text.replace("\x00", "") for text in PAYLOADS]
    assert home.store is not None
    home.store.put(OWNER, conversation(texts))
    tab = opened("/")
    tab.page.add_init_script(_ARMED)
    tab.open("/#/c/hostile-chat")
    tab.page.reload()
    expect(tab.answers).to_have_count(len(texts))
    tab.page.wait_for_load_state("networkidle")
    # what waits for a pointer or a tap
    tab.page.evaluate(
        """() => {
          for (const each of document.querySelectorAll(".answer *, .question *")) {
            for (const name of ["mouseover", "pointerenter", "focus", "animationstart", "toggle"]) {
              each.dispatchEvent(new Event(name, { bubbles: true }));
            }
          }
        }"""
    )
    check_nothing_ran(tab)
    # and it is there to be read: all but comments and a few tags that only format
    shown = tab.page.locator("article.answer > .markdown").all_text_contents()
    assert sum("hit" in text for text in shown) > 100


@pytest.mark.parametrize("part", range(4))
def test_while_it_streams_nothing_of_it_works(part: int, opened: Opener, home: House) -> None:
    """Each may end in the middle of a tag, an attribute, a link, and be drawn so."""
    mine = PAYLOADS[part::4]
    text = "\n\n".join(f"{index}.\n\n{payload}\n" for index, payload in enumerate(mine))
    pieces = [text[start : start + 7] for start in range(0, len(text), 7)]
    home.answers(Reply([*pieces, "\n\nthe end"], step_s=0.0005))
    tab = opened("/")
    tab.page.add_init_script(_ARMED)
    tab.page.reload()
    tab.ask("hostile?")
    expect(tab.page.locator("article.answer[aria-busy=true]")).to_have_count(0)
    expect(tab.answers).to_contain_text("the end")
    check_nothing_ran(tab)
    tab.page.reload()
    expect(tab.answers).to_contain_text("the end")
    check_nothing_ran(tab)


def test_one_piece_at_a_time_with_a_look_at_each(opened: Opener, home: House) -> None:
    """What stands there when a stream stops right inside of something."""
    cuts = (
        "<img src=x onerror=hit(", "<img src=x onerror='hit()'", "[tap](javascript:hit(",
        "<scr", "<svg onload=hit()", '<a href="javascript:hit()"', "```html\n<script>hit()",
        "![x](http://other.example/p", "<iframe srcdoc='<script>parent.hit()</script>",
    )  # fmt: skip
    tab = opened("/")
    tab.page.add_init_script(_ARMED)
    tab.page.reload()
    for cut in cuts:
        home.answers(Reply(["x ", cut], hangs=True))
        tab.ask("cut?")
        last = tab.answers.last
        expect(last.locator("> .markdown")).to_contain_text("x")
        check_nothing_ran(tab)
        tab.button("Stop").click()
        expect(tab.page.locator("article.answer[aria-busy=true]")).to_have_count(0)
        check_nothing_ran(tab)


def test_names_and_errors_of_the_server_are_text(opened: Opener, home: House) -> None:
    home.answers(Reply(["x"], error=GenerationFailed(f"{PAYLOADS[6]} {PAYLOADS[0]}")))
    tab = opened("/")
    tab.page.add_init_script(_ARMED)
    tab.page.reload()
    tab.ask(PAYLOADS[6])
    expect(tab.answers).to_contain_text("<img src=x onerror=hit()>")
    tab.saved(PAYLOADS[6])
    check_nothing_ran(tab)


def test_these_checks_would_see_it(opened: Opener, home: House) -> None:
    """Each of them fails where the page would let one through."""
    tab = opened("/")
    tab.page.add_init_script(_ARMED)
    tab.page.reload()
    expect(tab.question).to_be_visible()
    page = tab.page
    # text as HTML is stopped by the browser itself
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<img src=x onerror=hit()>'; }")
    assert page.evaluate("window.seen.length") == 1
    # another host is asked for nothing
    page.evaluate(
        f"() => {{ document.body.append(Object.assign(new Image(), {{src: '{HOST}/p'}})); }}"
    )
    page.wait_for_function("() => window.seen.length === 2")
    # so is an attribute that runs; one that does not is found
    attribute = """name => {
      const planted = document.createElement("b");
      planted.setAttribute(name, "hit()");
      document.querySelector(".chats").append(planted);
    }"""
    with pytest.raises(Exception, match="TrustedScript"):
        page.evaluate(attribute, "onclick")
    page.evaluate(attribute, "ping")
    assert page.evaluate(_LEFT) == ["ping=hit()"]
    assert page.evaluate("window.hits") == 0
    page.evaluate("hit()")
    with pytest.raises(AssertionError):
        check_nothing_ran(tab)
    with pytest.raises(AssertionError):
        tab.check()
    tab.faults.clear()
    tab.requests.clear()
