"""A chat in a real browser: asked, streamed, stopped, made anew, and what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from chatserve.errors import ContextLengthExceeded, GenerationFailed, Overloaded
from tests.browser.conftest import Opener
from tests.browser.house import House, Reply, said

MARKDOWN = """\
## Heading

Some **bold**, *slanted*, `code` and ~~old~~ words.

1. one
2. two
   - inside

| a | b |
|---|---|
| 1 | 2 |

> quoted

```python
def f(x):
    return "<b>" + x
```

[a link](https://example.com/path)
"""


def put(home: House, id: str, question: str) -> None:
    """A chat that is kept already."""
    asked = {"id": "q", "parent": None, "role": "user", "content": question, "created_at": 1.0}
    answer = {"id": "a", "parent": "q", "role": "assistant", "content": "said", "created_at": 2.0}
    assert home.store is not None
    home.store.put(
        b"",
        {
            "id": id, "title": question, "revision": 0, "created_at": 1.0, "changed_at": 2.0,
            "models": ["alpha"], "system": "", "sampling": {}, "messages": [asked, answer],
            "heads": ["a"],
        },
    )  # fmt: skip


def test_a_question_is_answered_and_the_next_knows_it(opened: Opener, home: House) -> None:
    home.answers(said("First."), said("Second."))
    tab = opened()
    expect(tab.question).to_be_focused()
    tab.ask("one?")
    tab.ended("First.")
    tab.ask("two?")
    tab.ended("First.", "Second.")
    expect(tab.questions).to_have_count(2)
    assert home.engines["alpha"].prompts[-1] == "<user>one?<assistant>First.<user>two?"
    expect(tab.page).to_have_title("one? · chatserve")
    tab.saved("one?")


def test_words_are_there_before_the_answer_is_over(opened: Opener, home: House) -> None:
    home.answers(Reply(["It ", "goes ", "on"], hangs=True))
    tab = opened()
    tab.ask("go on?")
    expect(tab.bodies).to_have_text("It goes on")
    expect(tab.answers).to_have_attribute("aria-busy", "true")
    expect(tab.button("Send")).to_be_hidden()
    tab.button("Stop").click()
    expect(tab.answers).to_have_attribute("aria-busy", "false")
    # the engine works for nobody, and what was said stays and can go on
    home.engines["alpha"].wait_for(lambda engine: bool(engine.aborted))
    tab.ended("It goes on")
    expect(tab.answers).to_contain_text("stopped by you")
    home.answers(said(" to the end."))
    tab.button("Continue the answer").click()
    tab.ended("It goes on to the end.")
    assert home.engines["alpha"].prompts[-1].endswith("<assistant>It goes on...")


def test_escape_stops(opened: Opener, home: House) -> None:
    home.answers(Reply(["Word"], hangs=True))
    tab = opened()
    tab.ask("stop?")
    expect(tab.bodies).to_have_text("Word")
    tab.page.keyboard.press("Escape")
    tab.ended("Word")


def test_an_answer_made_anew_stands_beside_the_first(opened: Opener, home: House) -> None:
    home.answers(said("first"), said("second"))
    tab = opened()
    tab.ask("again?")
    tab.ended("first")
    tab.button("Answer again").click()
    tab.ended("second")
    assert [each.count("<user>") for each in home.engines["alpha"].prompts] == [1, 1]
    tab.button("Version before").click()
    tab.ended("first")
    expect(tab.page.get_by_text("1/2")).to_be_visible()


def test_a_question_that_is_edited_is_asked_anew(opened: Opener, home: House) -> None:
    home.answers(said("one"), said("two"), said("three"))
    tab = opened()
    tab.ask("what is 1+1?")
    tab.ended("one")
    tab.ask("sure?")
    tab.ended("one", "two")
    tab.questions.first.get_by_role("button", name="Edit the question").click()
    area = tab.page.get_by_role("textbox", name="Edit the question")
    area.fill("what is 1+2?")
    area.press("Enter")
    tab.ended("three")
    assert home.engines["alpha"].prompts[-1] == "<user>what is 1+2?"
    tab.button("Version before").click()
    tab.ended("one", "two")


def test_markdown_is_drawn(opened: Opener, home: House) -> None:
    home.answers(said(MARKDOWN))
    tab = opened()
    tab.ask("all of it?")
    expect(tab.page.get_by_role("heading", name="Heading")).to_be_visible()
    answer = tab.answers
    for selector in ("strong", "em", "del", "ol li ul li", "blockquote", "pre code", "table td"):
        expect(answer.locator(selector).first).to_be_visible()
    link = answer.get_by_role("link", name="a link")
    expect(link).to_have_attribute("href", "https://example.com/path")
    expect(link).to_have_attribute("target", "_blank")
    expect(link).to_have_attribute("rel", re.compile("noopener.*noreferrer|noreferrer.*noopener"))
    expect(answer.locator("pre code")).to_have_text(
        'def f(x):\n    return "<b>" + x', use_inner_text=True
    )


def test_code_is_copied_as_it_is(opened: Opener, home: House) -> None:
    home.answers(said(MARKDOWN))
    tab = opened(permissions=["clipboard-read", "clipboard-write"])
    tab.ask("code?")
    tab.button("Copy code").click()
    copied = "() => navigator.clipboard.readText()"
    assert tab.page.evaluate(copied).strip() == 'def f(x):\n    return "<b>" + x'
    tab.button("Copy the answer").click()
    tab.page.wait_for_function("() => navigator.clipboard.readText().then(t => t.includes('##'))")
    assert tab.page.evaluate(copied) == MARKDOWN


def test_sampling_and_the_system_message_are_sent(opened: Opener, home: House) -> None:
    tab = opened()
    tab.button("Sampling (Alt+S)").click()
    tab.page.get_by_label("System message").fill("Be brief.")
    tab.page.get_by_label("Temperature").fill("0.25")
    tab.page.get_by_label("Max tokens").fill("3")
    tab.ask("settings?")
    tab.ended("Hello, wörld")
    expect(tab.answers).to_contain_text("cut at its limit of tokens")
    submitted = home.engines["alpha"].submitted[-1]
    assert (submitted.params.temperature, submitted.params.max_tokens) == (0.25, 3)
    assert home.engines["alpha"].prompts[-1] == "<system>Be brief.<user>settings?"


def test_a_file_is_attached_and_what_is_no_text_is_refused(opened: Opener, home: House) -> None:
    tab = opened()
    picker = tab.page.get_by_label("Files to attach")
    picker.set_input_files(
        [
            {"name": "notes.txt", "mimeType": "text/plain", "buffer": "ünter\n```\n".encode()},
            {"name": "photo.bin", "mimeType": "image/png", "buffer": b"\x89PNG\x00\xff"},
        ]
    )
    expect(tab.page.get_by_text("photo.bin is no text in UTF-8")).to_be_visible()
    tab.ask("what is in it?")
    tab.ended("Hello, wörld 🙂!")
    prompt = home.engines["alpha"].prompts[-1]
    assert "what is in it?" in prompt and "notes.txt" in prompt and "ünter\n```" in prompt
    assert "photo" not in prompt
    expect(tab.questions.get_by_text("notes.txt")).to_be_visible()


def test_an_error_in_the_middle_keeps_what_was_said(opened: Opener, home: House) -> None:
    home.answers(Reply(["Half ", "of it"], error=GenerationFailed("the engine has failed")))
    tab = opened()
    tab.ask("break?")
    expect(tab.answers).to_contain_text("broke off: the engine has failed")
    tab.ended("Half of it")
    tab.saved("break?")
    tab.page.reload()
    tab.ended("Half of it")
    expect(tab.answers).to_contain_text("broke off")
    home.answers(said("All of it"))
    tab.button("Answer again").click()
    tab.ended("All of it")


def test_a_server_that_is_too_busy_says_when(opened: Opener, home: House) -> None:
    busy = Overloaded("the queue is full", retry_after_s=7)
    home.answers(Reply(refusal=busy), said("Now."))
    tab = opened(may_fail={429})
    tab.ask("now?")
    failure = tab.page.get_by_role("alert").filter(has_text="queue is full")
    expect(failure).to_contain_text("Try again in")
    expect(tab.questions).to_have_count(1)
    failure.get_by_role("button", name="Try again").click()
    tab.ended("Now.")


def test_the_place_in_the_queue_is_told(opened: Opener, home: House) -> None:
    home.answers(Reply([], hangs=True, place=3))
    tab = opened()
    tab.ask("when?")
    expect(tab.answers).to_contain_text("place 3 in the queue")
    tab.button("Stop").click()
    expect(tab.page.locator("[aria-busy=true]")).to_have_count(0)


def test_a_chat_that_is_too_long_offers_ways_out(opened: Opener, home: House) -> None:
    long = ContextLengthExceeded("prompt has 2,310 tokens, alpha holds 2,048; shorten it")
    home.answers(Reply(refusal=long), said("Fits."))
    tab = opened(may_fail={400})
    tab.ask("fits?")
    expect(tab.page.get_by_role("alert").filter(has_text="2,310 tokens")).to_be_visible()
    tab.button("Leave out the oldest turns").click()
    tab.ended("Fits.")


def test_a_model_that_is_still_loading(opened: Opener, home: House) -> None:
    home.loading("alpha", 25, 100)
    home.loading("beta", 0, 100)
    tab = opened(may_fail={503})
    state = tab.page.locator(".model-state")
    expect(state).to_have_text("loading 25 % of 100 B")
    home.reset()
    expect(state).to_have_text("")
    tab.ask("ready?")
    tab.ended("Hello, wörld 🙂!")


@pytest.mark.parametrize("turn", ["waits", "Escape", "typing", "another chat"])
def test_a_question_before_the_models_are_known(turn: str, opened: Opener, home: House) -> None:
    """It goes out by itself as soon as there is somebody to ask, unless it was taken back."""
    put(home, "kept-chat", "before")
    tab = opened("/assets/licences.txt")
    held: list[Route] = []
    tab.page.route("**/v1/models", lambda route: held.append(route))
    tab.open()
    tab.ask("too soon?")
    told = tab.page.get_by_role("status").filter(has_text="as soon as a model is there")
    expect(told).to_be_visible()
    expect(tab.button("Waiting to be sent")).to_be_visible()
    tab.question.press("Enter")
    if turn == "Escape":
        tab.page.keyboard.press("Escape")
    elif turn == "typing":
        tab.question.press_sequentially("!")
    elif turn == "another chat":
        tab.chats.filter(has_text="before").click()
        expect(tab.questions).to_have_text("before")
    if turn != "waits":
        expect(told).to_have_count(0)
    for route in held:
        route.fallback()
    if turn == "waits":
        tab.ended("Hello, wörld 🙂!")
        expect(tab.question).to_have_value("")
        expect(tab.questions).to_have_text("too soon?")
        assert home.engines["alpha"].prompts == ["<user>too soon?"]
        return
    expect(tab.page.locator(".picker select").first).to_have_value("alpha")
    expect(tab.button("Send")).to_be_visible()
    assert not home.engines["alpha"].prompts
    if turn == "another chat":
        tab.button("New chat").click()
    expect(tab.question).to_have_value("too soon?!" if turn == "typing" else "too soon?")


def test_a_question_before_its_chat_is_there_goes_into_that_chat(
    opened: Opener, home: House
) -> None:
    put(home, "kept-chat", "before")
    tab = opened("/assets/licences.txt")
    held: list[Route] = []
    tab.page.route("**/page/conversations/kept-chat", lambda route: held.append(route))
    tab.open("/#/c/kept-chat")
    expect(tab.page.locator(".picker select").first).to_have_value("alpha")
    tab.ask("and now?")
    expect(tab.page.get_by_role("status").filter(has_text="this chat is open")).to_be_visible()
    tab.page.unroute("**/page/conversations/kept-chat")
    for route in held:
        route.fallback()
    expect(tab.questions).to_have_text(["before", "and now?"])
    tab.ended("said", "Hello, wörld 🙂!")
    assert home.engines["alpha"].prompts == ["<user>before<assistant>said<user>and now?"]


def test_a_look_at_the_models_leaves_alone_who_reads(opened: Opener, home: House) -> None:
    """Nothing of the page is touched where nothing of the models has changed."""
    home.answers(said("x"))
    tab = opened(may_fail={503})
    tab.page.get_by_label("Files to attach").set_input_files(
        [{"name": "a.txt", "mimeType": "text/plain", "buffer": b"in it"}]
    )
    tab.ask("look?")
    tab.ended("x")
    tab.saved("look?")
    tab.questions.locator("summary").click()
    copy = tab.button("Copy the question")
    copy.focus()
    tab.page.evaluate(
        """() => {
          window.changes = [];
          new MutationObserver((all) => window.changes.push(...all.map((each) => each.type)))
            .observe(document.body, {
              subtree: true, childList: true, attributes: true, characterData: true });
        }"""
    )
    look = "() => dispatchEvent(new Event('online'))"
    for _ in range(2):
        with tab.page.expect_response("**/v1/models") as answer:
            tab.page.evaluate(look)
        answer.value.finished()
        # the page has read it, and drawn what it would draw
        tab.page.evaluate(
            """() => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 20))"""
        )
    assert tab.page.evaluate("window.changes") == []
    expect(copy).to_be_focused()
    expect(tab.questions.locator("details")).to_have_attribute("open", "")
    # what has changed is seen
    home.loading("beta", 1, 2)
    with tab.page.expect_response("**/v1/models"):
        tab.page.evaluate(look)
    model = tab.page.locator(".picker select").first
    expect(model.locator("option").last).to_have_text("beta (loading 50 % of 2 B)")
    assert tab.page.evaluate("window.changes.length") > 0


def test_what_is_asked_while_the_page_starts_stays_in_view(opened: Opener, home: House) -> None:
    tab = opened("/assets/licences.txt")
    waiting: list[Route] = []
    tab.page.route("**/page/conversations", lambda route: waiting.append(route))
    tab.open()
    tab.page.get_by_role("combobox", name="Model", exact=True).select_option("beta")
    tab.ask("early?")
    tab.ended("Hello, wörld 🙂!")
    for route in waiting:
        route.fallback()
    tab.saved("early?")
    tab.ended("Hello, wörld 🙂!")
    expect(tab.page.get_by_role("combobox", name="Model", exact=True)).to_have_value("beta")


def test_right_to_left(opened: Opener, home: House) -> None:
    home.answers(said("שלום עולם\n\n- אחד\n- שתיים\n\nand English"))
    tab = opened()
    tab.ask("مرحبا؟")
    tab.ended("שלום עולם אחד שתיים and English")
    direction = "element => getComputedStyle(element).direction"
    assert tab.questions.locator(".question-text").evaluate(direction) == "rtl"
    assert tab.answers.locator("p").first.evaluate(direction) == "rtl"
    assert tab.answers.locator("p").last.evaluate(direction) == "ltr"
    # the page around it stays as it is
    assert tab.page.locator("main").evaluate(direction) == "ltr"


def test_on_a_phone_all_is_reached_without_scrolling_sideways(opened: Opener, home: House) -> None:
    home.answers(said(MARKDOWN + "\n\n`" + "long" * 100 + "`\n\n" + "x" * 300))
    tab = opened(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    tab.question.fill("phone?")
    tab.button("Send").click()
    expect(tab.page.get_by_role("heading", name="Heading")).to_be_visible()
    width = "() => [document.documentElement.scrollWidth, innerWidth]"
    scrolled, shown = tab.page.evaluate(width)
    assert scrolled <= shown == 360
    expect(tab.page.get_by_role("navigation", name="Chats")).not_to_be_in_viewport()
    tab.page.get_by_role("button", name="List of chats").click()
    expect(tab.page.get_by_role("navigation", name="Chats")).to_be_in_viewport()
    tab.chats.first.click()
    expect(tab.page.get_by_role("navigation", name="Chats")).not_to_be_in_viewport()
    for button in tab.page.get_by_role("button").all():
        box = button.bounding_box()
        if box is not None and button.is_visible():
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_colours_are_those_of_the_system_until_chosen(
    scheme: str, opened: Opener, home: House
) -> None:
    tab = opened(color_scheme=scheme)
    tab.ask("colours?")
    tab.ended("Hello, wörld 🙂!")
    # a reload asks the server for it
    tab.saved("colours?")
    brightness = """() => {
      const colour = getComputedStyle(document.documentElement).backgroundColor;
      const [r, g, b] = colour.match(/[\\d.]+/g);
      return (Number(r) + Number(g) + Number(b)) / 3;
    }"""
    assert (tab.page.evaluate(brightness) < 100) == (scheme == "dark")
    tab.button("Settings").click()
    other = "Light" if scheme == "dark" else "Dark"
    tab.page.get_by_role("radio", name=other, exact=True).check()
    assert (tab.page.evaluate(brightness) < 100) == (scheme == "light")
    tab.page.reload()
    assert (tab.page.evaluate(brightness) < 100) == (scheme == "light")


def test_with_the_keyboard_alone(opened: Opener, home: House) -> None:
    home.answers(said("one"), said("two"), said("three"))
    tab = opened()
    keyboard = tab.page.keyboard
    expect(tab.question).to_be_focused()
    keyboard.type("first line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    tab.ended("one")
    assert home.engines["alpha"].prompts[-1] == "<user>first line\nsecond line"
    tab.saved("first line")
    keyboard.press("Alt+r")
    tab.ended("two")
    # an empty question and up: the last one, to be changed
    expect(tab.question).to_be_focused()
    keyboard.press("ArrowUp")
    expect(tab.page.get_by_role("textbox", name="Edit the question")).to_be_focused()
    keyboard.press("Escape")
    keyboard.press("Control+Shift+O")
    expect(tab.answers).to_have_count(0)
    expect(tab.question).to_be_focused()
    keyboard.press("Control+k")
    expect(tab.page.get_by_role("searchbox", name="Search chats")).to_be_focused()
    keyboard.type("second line")
    expect(tab.chats).to_have_count(1)
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    tab.ended("two")
    # every control is reached by Tab, with a ring around it, and none holds the focus
    tab.page.locator("body").click(position={"x": 640, "y": 300})
    seen: list[str] = []
    for _ in range(60):
        keyboard.press("Tab")
        name = tab.page.evaluate(
            """() => {
              const at = document.activeElement;
              if (!at || at === document.body) return "";
              const ring = getComputedStyle(at);
              const frame = getComputedStyle(at.closest(".composer, .search") ?? at);
              const isSeen = [ring, frame].some(
                (each) => each.outlineStyle !== "none" && parseFloat(each.outlineWidth) > 0
                  || each.boxShadow !== "none");
              const name = at.getAttribute("aria-label") || at.textContent.trim() || at.id;
              return isSeen ? name : `no ring: ${name}`;
            }"""
        )
        if name in seen and name == seen[0]:
            break
        seen.append(name)
    assert not [name for name in seen if name.startswith("no ring")]
    for control in ("New chat", "Search chats", "Settings", "Model", "Sampling (Alt+S)",
                    "Your question", "Copy the answer", "Answer again"):  # fmt: skip
        assert control in seen, control


def test_a_chat_is_exported_and_read_in_again(opened: Opener, home: House, tmp_path: Path) -> None:
    tab = opened()
    tab.ask("export me?")
    tab.saved("export me?")
    tab.page.get_by_role("button", name="More for export me?").click()
    with tab.page.expect_download() as download:
        tab.page.get_by_role("menuitem", name="Export as JSON").click()
    file = tmp_path / "chat.json"
    download.value.save_as(file)
    assert "Hello, wörld 🙂!" in json.dumps(json.loads(file.read_text()), ensure_ascii=False)
    # it is kept already, and joined with itself
    other = opened(may_fail={409})
    other.page.get_by_label("Files to import").set_input_files(file)
    other.ended("Hello, wörld 🙂!")
