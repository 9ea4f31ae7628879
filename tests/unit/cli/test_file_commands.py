"""`/attach`, `/copy` and `/export`: what goes in and out of a chat, and what is refused."""

from __future__ import annotations

import base64
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from chatserve.cli import attachments, clipboard
from chatserve.cli.answer import ChatDelta
from chatserve.cli.attachments import Attachment
from chatserve.cli.code_blocks import code_blocks
from chatserve.cli.render import MAX_OSC52_LEN
from tests.unit.cli.test_chat import ADAPTED, CTRL_C, ScriptedServer, Session, contents

CODE = "Try\n```python\nprint('a')\n\n```\nor\n~~~~\n```\nb\n~~~~\ndone"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_files_go_with_the_next_question_alone(folder: Path) -> None:
    (folder / "a b.py").write_text("print(1)\r\n")
    (folder / "notes.txt").write_bytes("\ufeffeins 二\n\n".encode())
    session = Session(ScriptedServer(["1"], ["2"]))
    assert session.type("/attach 'a b.py' notes.txt", "/attach", "what?", "and?") == (
        "> /attach 'a b.py' notes.txt\n"
        "a b.py (9 bytes, 5 tokens) goes with the next question\n"
        "notes.txt (10 bytes, 5 tokens) goes with the next question\n"
        "> /attach\na b.py, notes.txt goes with the next question\n"
        "> what?\n1\n> and?\n2\n> ^D\n"
    )
    question = "a b.py:\n```py\nprint(1)\n```\n\nnotes.txt:\n```txt\neins 二\n```\n\nwhat?"
    assert contents(session.server.requests[0]) == [question]
    assert contents(session.server.requests[1]) == [question, "1", "and?"]


def test_names_may_be_patterns_of_home_and_have_blanks(folder: Path) -> None:
    (folder / "home").mkdir()
    for name in ("home/one.md", "home/two.md", "home/three.txt", "with blanks.txt", "odd*.txt"):
        (folder / name).write_text(name)
    session = Session(ScriptedServer())
    session.server.chosen = ADAPTED  # whose tokens nobody counts
    screen = session.type(
        "/attach ~/*.md", "/attach with blanks.txt", "/attach odd*.txt", "/attach none"
    )
    assert f"{folder}/home/one.md (11 bytes) goes with" in screen
    assert f"{folder}/home/two.md (11 bytes) goes with" in screen
    assert "with blanks.txt (15 bytes) goes with" in screen
    assert "odd*.txt (8 bytes) goes with" in screen
    assert screen.endswith("> /attach none\nno file goes with the next question\n> ^D\n")


def test_a_file_that_no_context_has_room_for_says_so(folder: Path) -> None:
    (folder / "a.txt").write_text("word " * 3000)
    screen = Session(ScriptedServer()).type("/attach a.txt")
    assert "a.txt (15,000 bytes, 3,003 tokens, the context has 2,048) goes with" in screen


def test_utf_16_with_its_mark_is_text(folder: Path) -> None:
    (folder / "wide.txt").write_text("größe 大", "utf-16")
    session = Session(ScriptedServer(["1"]))
    session.type("/attach wide.txt", "q")
    assert "größe 大" in contents(session.server.requests[0])[0]


def test_what_is_no_text_file_is_refused_with_all_that_came_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(attachments, "MAX_BYTES", 150)
    monkeypatch.setattr(attachments, "MAX_FILES", 3)
    (folder / "good.txt").write_text("good")
    (folder / "zero.bin").write_bytes(b"a\0b")
    (folder / "latin.txt").write_bytes(b"gr\xf6\xdfe")
    (folder / "large.txt").write_text("x" * 101)
    (folder / "most.txt").write_text("x" * 100)
    (folder / "secret.txt").mkdir()
    os.mkfifo(folder / "pipe")
    refused = {
        "/attach good.txt nowhere.txt": "cannot attach nowhere.txt: No such file or directory",
        "/attach *.pdf": "cannot attach *.pdf: no file has such a name",
        "/attach zero.bin": "cannot attach zero.bin: it is a binary file, not text",
        "/attach latin.txt": "cannot attach latin.txt: it is no UTF-8 text (byte 2)",
        "/attach large.txt": "cannot attach large.txt: it is over 100 bytes",
        "/attach secret.txt": "cannot attach secret.txt: Is a directory",
        "/attach pipe": "cannot attach pipe: it is no file",
        "/attach 'open": '/attach: "\'open" cannot be read: No closing quotation',
        "/attach a\0b": "cannot attach",
        "/attach most.txt most.txt": "200 bytes wait then, the limit is 150; ask first",
        "/attach good.txt good.txt good.txt good.txt": "4 files wait then, the limit is 3; ask",
    }
    for line, error in refused.items():
        session = Session(ScriptedServer())
        assert f"error: {error}" in session.type(line), line
        assert session.chat.waiting.files == []


@pytest.mark.parametrize(
    ("text", "ticks"), [("plain", 3), ("a ``` b", 4), ("`````\n```", 6), ("``", 3)]
)
def test_no_text_ends_its_own_fence(text: str, ticks: int) -> None:
    fenced = Attachment("evil\nname.p`y", text).fenced()
    assert fenced == f"evil name.p`y:\n{'`' * ticks}\n{text}\n{'`' * ticks}"
    assert code_blocks(fenced) == [text]


def test_an_attached_chat_is_asked_again_as_it_was(folder: Path) -> None:
    (folder / "a.txt").write_text("text")
    session = Session(ScriptedServer([CTRL_C], ["1"]))
    session.type("/attach a.txt", "q", "/regen")
    assert contents(session.server.requests[1]) == ["a.txt:\n```txt\ntext\n```\n\nq"]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        (CODE, ["print('a')\n", "```\nb"]),
        ("no code, `inline` only", []),
        ("```\ncut off", ["cut off"]),
        ("```a`b```\nno fence", []),
        ("  ```c\n x\n  ```", [" x"]),
        ("    ```\nindented", []),
        ("```\n``\n````\nb", ["``"]),
        ("```\n```", [""]),
    ],
)
def test_code_blocks_are_those_of_commonmark(text: str, blocks: list[str]) -> None:
    assert code_blocks(text) == blocks


@pytest.fixture
def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, the only one; a screen of each kind."""
    (folder / "bin").mkdir()
    monkeypatch.setenv("PATH", str(folder / "bin"))
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    return folder / "bin"


def install(folder: Path, name: str, code: str = "") -> Path:
    """A program that keeps what it gets in the file that this returns."""
    out = folder.parent / f"{name}.out"
    script = (
        f'#!/bin/sh\necho "$@" > {out}.args\nwhile read -r line; do echo "$line" >> {out}; done\n'
    )
    (folder / name).write_text(script + code)
    (folder / name).chmod(0o755)
    return out


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pbcopy", ""),
        ("wl-copy", ""),
        ("xclip", "-selection clipboard"),
        ("xsel", "--clipboard --input"),
    ],
)
def test_an_answer_is_copied_by_the_program_that_is_there(
    name: str, arguments: str, programs: Path
) -> None:
    out = install(programs, name)
    session = Session(ScriptedServer(["first\n"], ["größe 大\n"]))
    screen = session.type("a", "b", "/copy", "/copy 1")
    assert f"> /copy\ncopied the last answer (8 characters) by {name}\n" in screen
    assert f"> /copy 1\ncopied answer 1 (6 characters) by {name}\n" in screen
    assert out.read_text("utf-8") == "größe 大\nfirst\n"
    assert Path(f"{out}.args").read_text().strip() == arguments


def test_code_is_copied_without_what_is_around_it(programs: Path) -> None:
    out = install(programs, "pbcopy")
    session = Session(ScriptedServer([CODE + "\n"], ["no code"]))
    screen = session.type("a", "/copy code 1", "/copy code", "/copy code 3", "b", "/copy code")
    assert out.read_text() == "print('a')\n" + "```\n"  # the shell's `read` leaves the rest
    assert "error: there is no code block of the last answer 3; there are 1 to 2" in screen
    assert screen.endswith("> /copy code\nerror: the last answer has no code block\n> ^D\n")


def test_a_program_without_a_screen_is_left_aside(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(programs, "wl-copy")
    install(programs, "xsel")
    monkeypatch.delenv("WAYLAND_DISPLAY")
    assert clipboard.copy("x\n") == "xsel"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (None, "error: there is no pbcopy, wl-copy, xclip or xsel with a screen; `/set clipboard"),
        ("exit 4", "error: xclip failed (exit code 4); `/set clipboard terminal` lets"),
        ("exec sleep 60", "error: xclip failed (no end within 0.2 s); `/set"),
    ],
)
def test_a_clipboard_that_fails_is_told(
    code: str | None, told: str, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipboard, "TIMEOUT_S", 0.2)
    if code is not None:
        install(programs, "xclip", code.replace("sleep", "/bin/sleep"))
    assert told in Session(ScriptedServer(["1"])).type("a", "/copy")


def test_nothing_else_than_an_answer_is_copied(programs: Path) -> None:
    session = Session(ScriptedServer(["1"]))
    screen = session.type("/copy", "a", "/copy 2", "/copy all")
    assert screen.count("error: there is no answer") == 3


def test_the_terminal_copies_when_it_is_told_to(programs: Path) -> None:
    session = Session(ScriptedServer(["größe\x1b[2J"]), columns=200)
    screen = session.type(
        "a", "/set clipboard terminal", "/copy", "/set clipboard default", "/copy"
    )
    data = base64.b64encode("größe\x1b[2J".encode()).decode()
    assert screen.count("\x1b") == 1
    assert (
        f"> /copy\n\x1b]52;c;{data}\x07copied the last answer (9 characters) by the terminal"
        in screen
    )
    assert "clipboard is auto" in screen and "error: there is no pbcopy" in screen


@pytest.mark.parametrize(
    ("columns", "text", "told"),
    [
        (None, "a", "error: standard error is no terminal that could copy"),
        (
            999,
            "x" * MAX_OSC52_LEN,
            "characters are too many for a terminal: 99,992 bytes in base64",
        ),
    ],
)
def test_a_terminal_that_could_not_copy_is_not_asked(
    columns: int | None, text: str, told: str
) -> None:
    session = Session(ScriptedServer([text]), columns=columns)
    screen = session.type("a", "/set clipboard terminal", "/copy")
    assert told in screen and "\x1b" not in screen


def test_an_export_is_markdown_or_a_request(folder: Path) -> None:
    session = Session(ScriptedServer(["**Hi**"], ["half", CTRL_C]), system="be\nbrief")
    screen = session.type("hello\nyou", "more", "/export a.md", "/export a.JSON", "/export a.md")
    assert "exported to a.md\n" in screen and "replaced a.md\n" in screen
    assert (folder / "a.md").read_text() == (
        "# hello you\n\nModel: `fake-1b`\n\n## System\n\nbe\nbrief\n\n"
        "## Question\n\nhello\nyou\n\n## Answer\n\n**Hi**\n\n"
        "## Question\n\nmore\n\n## Answer (broke off)\n\nhalf\n"
    )
    assert json.loads((folder / "a.JSON").read_text()) == {
        "model": "fake-1b",
        "messages": [
            {"role": "system", "content": "be\nbrief"},
            {"role": "user", "content": "hello\nyou"},
            {"role": "assistant", "content": "**Hi**"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "half"},
        ],
    }


def test_an_export_that_cannot_be_is_told(folder: Path) -> None:
    session = Session(ScriptedServer(["1"]))
    screen = session.type("a", "/export", "/export a.pdf", "/export none/a.md")
    assert "error: /export needs a file name that ends in .md, .html or .json" in screen
    assert "error: cannot export to a.pdf: the name must end in .md (Markdown)" in screen
    assert "error: cannot export to none/a.md: No such file or directory" in screen


class Page(HTMLParser):
    """What a browser would make of a page: its text, and each tag with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def exported_page(folder: Path, question: str, answer: str) -> Page:
    session = Session(ScriptedServer([answer]))
    assert "exported to a.html\n" in session.type(question, "/export a.html")
    return Page((folder / "a.html").read_text("utf-8"))


def test_an_export_is_a_page(folder: Path) -> None:
    answer = "**Hi** you:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nif a < b:\n```\n"
    page = exported_page(folder, "a < b?\n\n\n  * really *", answer)
    assert "a < b?\n\n\n  * really *" in page.text  # what was asked is as it was typed
    assert "fake-1b" in page.text and "if a < b:\n" in page.text
    names = [name for name, _ in page.tags]
    assert {"strong", "table", "code", "title"} <= set(names)
    assert (
        names.count("section") == 2 and {"name": "viewport"}.items() <= page.of("meta")[2].items()
    )


HOSTILE = """\
<script>alert(1)</script> <img src=x onerror=alert(1)> <b onclick="alert(1)">b</b>

<iframe src="https://there.example"></iframe>

![seen](https://there.example/seen.png) ![d](data:image/png;base64,AAAA "t")
[a](javascript:alert(1)) [b](<JaVaScRiPt:alert(1)>) [c](vbscript:x) [d](data:text/html,x)
[e](https://there.example/"onmouseover="alert(1)) <javascript:alert(1)> <https://there.example>
[f]: https://there.example/f "x\" onload=\"alert(1)"
[f] [g](/etc/passwd) [h](file:///etc/passwd) [\x00] \x1b]0;owned\x07 \u202egnp.exe

```"><script>alert(1)</script>
</code></pre><script>alert(1)</script>
```
</main></body></html><!-- <style>*{background:url(https://there.example)}</style>
"""


@pytest.mark.parametrize("from_model", [True, False])
def test_nothing_in_a_page_runs_or_asks_another_host(folder: Path, from_model: bool) -> None:
    words = " " + HOSTILE  # the blank: it is no command
    page = exported_page(folder, *(("q", words) if from_model else (words, "a")))
    known = (
        "html head meta title style body main header h1 p section h2 div pre code a strong em br"
    )
    assert {name for name, _ in page.tags} <= set(known.split())
    policy = page.of("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert str(policy["content"]).startswith("default-src 'none'; ")
    attributes = {name for _, each in page.tags for name in each}
    assert attributes <= {
        "charset", "http-equiv", "content", "name", "lang", "dir", "class", "href", "title", "rel",
    }  # fmt: skip
    assert all(str(a["href"]).startswith("https://there.example") for a in page.of("a"))
    assert all(a["rel"] == "noopener noreferrer nofollow" for a in page.of("a"))
    assert not set("\x00\x1b\x07\u202e") & set((folder / "a.html").read_text("utf-8"))
    assert len(page.of("style")) == 1


@pytest.mark.parametrize("nesting", ["> ", "- ", "*a "])
def test_no_nesting_is_too_deep_for_a_page(folder: Path, nesting: str) -> None:
    assert "the end" in exported_page(folder, "q", f"{nesting * 300}the end{' b*' * 300}").text


def test_what_was_loaded_is_exported_whole(folder: Path) -> None:
    first = Session(ScriptedServer(["Hi", ChatDelta("", "stop", 1)]))
    first.type("hello", "/save talk")
    second = Session(ScriptedServer())
    second.type("/load talk", "/export talk.md")
    assert "## Answer\n\nHi\n" in (folder / "talk.md").read_text()


def test_of_too_many_files_none_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "MAX_FILES", 2)
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
    (folder / "a.txt").write_bytes(b"\xff")  # who reads it says so
    screen = Session(ScriptedServer()).type("/attach *.txt", "/attach b.txt c.txt", "/attach b.txt")
    assert screen.count("3 files wait then, the limit is 2; ask first") == 2


def test_an_export_to_the_home_of_nobody_is_told(folder: Path) -> None:
    screen = Session(ScriptedServer()).type("/export ~nosuchuser/chat.md")
    assert "cannot export to ~nosuchuser/chat.md" in screen
