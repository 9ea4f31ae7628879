"""docs/images/chat.svg and top.svg: a chat with the default model, and `chatserve top` beside it.

    python docs/record_terminal.py chat|top [FILE]

Types into a real program in a pty. For `top` a `chatserve serve` of yours must run on this machine;
it is asked a few questions meanwhile. The picture moves by CSS alone and asks no other host
for anything: frames lie side by side, and each distinct line is there once.
"""

from __future__ import annotations

import subprocess
import sys
import time
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import pexpect
import pyte

COLUMNS, ROWS = 84, 22
FRAME_S = 0.15
MAX_FRAMES = 110
MAX_BYTES = 150_000
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 120.0, 60.0
KEY_S, HOLD_S = 0.04, 3.0
TOP_QUESTIONS = 4
QUESTION = "Give me three reasons to like Python, as a list, and a line of code."
CHAR_W, LINE_H, MARGIN = 8.4, 18, 14
BACKGROUND, FOREGROUND = "#1c1e26", "#d5d8da"
COLORS = {
    "black": "#3b3f51", "red": "#e95678", "green": "#29d398", "brown": "#fab795",
    "blue": "#26bbd9", "magenta": "#ee64ac", "cyan": "#59e1e3", "white": FOREGROUND,
}  # fmt: skip
Row = tuple[tuple[str, str, bool, int], ...]  # text, colour, bold, column
Frame = tuple[Row, ...]


class Recording:
    """A program in a pty, and what its screen showed, with the seconds it did."""

    def __init__(self, argv: list[str]) -> None:
        self._child: pexpect.spawn[bytes] = pexpect.spawn(
            argv[0], argv[1:], dimensions=(ROWS, COLUMNS)
        )
        child = self._child

        class Screen(pyte.Screen):
            """Tells the program where its cursor is, which it asks for."""

            def write_process_input(self, data: str) -> None:
                child.send(data)

        self._screen = Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self.frames: list[tuple[float, Frame]] = []

    def wait_for(self, text: str, timeout_s: float, *, is_gone: bool = False) -> None:
        """Record until `text` is on the screen, or no longer."""
        deadline = time.monotonic() + timeout_s
        while (text in "\n".join(self._screen.display)) is is_gone:
            if time.monotonic() > deadline:
                raise SystemExit(f"waited for {text!r} in vain: {self._screen.display}")
            self.look(FRAME_S)

    def type(self, text: str) -> None:
        for char in text:
            self._child.send(char)
            self.look(KEY_S)

    def look(self, seconds: float) -> None:
        """Record what is to be seen after so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                self._stream.feed(self._child.read_nonblocking(65536, timeout=left))
            except pexpect.TIMEOUT:
                break
        frame = tuple(_row(self._screen.buffer[y]) for y in range(ROWS))
        if self.frames and self.frames[-1][1] == frame:
            self.frames[-1] = (self.frames[-1][0] + seconds, frame)
        else:
            self.frames.append((seconds, frame))

    def close(self) -> None:
        self._child.sendeof()
        self._child.expect(pexpect.EOF, timeout=20)


def svg(frames: list[tuple[float, Frame]], label: str) -> str:
    """Frames of (seconds, rows) as one picture."""
    width, height = round(COLUMNS * CHAR_W) + 2 * MARGIN, ROWS * LINE_H + 2 * MARGIN
    total_s = sum(seconds for seconds, _ in frames)
    names: dict[Row, str] = {}
    steps, drawn, at = [], [], 0.0
    for number, (seconds, frame) in enumerate(frames):
        steps.append(f"{at / total_s:.3%}{{transform:translateX({-number * width:.0f}px)}}")
        at += seconds
        rows = "".join(
            f'<use href="#{names.setdefault(row, f"r{len(names)}")}" y="{y * LINE_H}"/>'
            for y, row in enumerate(frame)
            if row
        )
        drawn.append(f'<g transform="translate({number * width:.0f})">{rows}</g>')
    defs = "".join(f'<g id="{name}">{_spans(row)}</g>' for row, name in names.items())
    last = f"100%{{transform:translateX({-(len(frames) - 1) * width:.0f}px)}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" role="img" aria-label="{escape(label)}">\n'
        f"<style>text{{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
        f"white-space:pre;fill:{FOREGROUND}}}.b{{font-weight:bold}}"
        f"#s{{animation:m {total_s:.1f}s step-end infinite}}@keyframes m{{{''.join(steps)}{last}}}"
        f"</style>\n<defs>{defs}</defs>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>\n'
        f'<svg x="{MARGIN}" y="{MARGIN}" width="{COLUMNS * CHAR_W:.0f}" '
        f'height="{ROWS * LINE_H}"><g id="s">{"".join(drawn)}</g></svg>\n</svg>\n'
    )


def thinned(frames: list[tuple[float, Frame]]) -> list[tuple[float, Frame]]:
    """At most `MAX_FRAMES`: of neighbours that were short the later one stays."""
    step = -(-len(frames) // MAX_FRAMES)
    parts = [frames[start : start + step] for start in range(0, len(frames), step)]
    return [(sum(seconds for seconds, _ in part), part[-1][1]) for part in parts]


def _row(line: Any) -> Row:
    cells = [(x, line[x]) for x in range(COLUMNS)]
    runs = groupby(cells, key=lambda cell: (cell[1].fg, cell[1].bold))
    spans = []
    for (color, is_bold), run in runs:
        part = list(run)
        text = "".join(char.data for _, char in part)
        if text.strip():
            start = part[0][0] + len(text) - len(text.lstrip())
            spans.append((text.strip(), str(color), bool(is_bold), start))
    return tuple(spans)


def _spans(row: Row) -> str:
    parts = []
    for text, color, is_bold, column in row:
        fill = COLORS.get(color.removeprefix("bright"))
        if fill is None and len(color) == 6:
            fill = f"#{color}"
        style = f' fill="{fill}" style="fill:{fill}"' if fill and fill != FOREGROUND else ""
        bold = ' class="b"' if is_bold else ""
        parts.append(
            f'<text x="{column * CHAR_W:.1f}" y="14" textLength="{len(text) * CHAR_W:.1f}"'
            f"{bold}{style}>{escape(text)}</text>"
        )
    return "".join(parts)


def record_chat() -> list[tuple[float, Frame]]:
    recording = Recording(
        [sys.executable, "-m", "chatserve.cli", "--no-save", "--private", "--theme", "dark",
         "--temperature", "0", "--max-new-tokens", "180"]
    )  # fmt: skip
    recording.wait_for("-bit", START_TIMEOUT_S)
    recording.look(1)
    for key in ("/", "s", "e"):
        recording.type(key)
        recording.look(0.8)
    recording.type("\x15" + QUESTION)
    recording.look(0.5)
    recording.type("\r")
    recording.wait_for("tokens/s", ANSWER_TIMEOUT_S)
    recording.wait_for(" · context ", ANSWER_TIMEOUT_S)
    recording.look(HOLD_S)
    frames = list(recording.frames)
    recording.close()
    return frames


def record_top() -> list[tuple[float, Frame]]:
    recording = Recording([sys.executable, "-m", "chatserve", "top", "--interval-s", "0.5"])
    recording.wait_for("q leaves", START_TIMEOUT_S)
    recording.look(1)
    client = [sys.executable, "-m", "chatserve", "chat", "--max-new-tokens", "300", "-p"]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    asking = []
    for number in range(TOP_QUESTIONS):
        question = f"Tell me a long story about {number + 2} foxes who cross a river."
        asking.append(subprocess.Popen([*client, question], **quiet))
        recording.look(1)
    while any(each.poll() is None for each in asking):
        recording.look(FRAME_S)
    recording.look(HOLD_S)
    frames = list(recording.frames)
    recording.type("q")
    recording.close()
    return frames


RECORDINGS = {
    "chat": (record_chat, "A chat in the terminal"),
    "top": (record_top, "chatserve top while four questions are answered"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in RECORDINGS:
        raise SystemExit(__doc__)
    images = Path(__file__).parent / "images"
    file = Path(sys.argv[2] if len(sys.argv) > 2 else images / f"{name}.svg")
    record, label = RECORDINGS[name]
    frames = record()
    picture = svg(thinned(frames), label)
    if len(picture.encode()) > MAX_BYTES:
        raise SystemExit(f"{len(picture):,} bytes, the limit is {MAX_BYTES:,}; say less")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(picture, "utf-8")
    print(f"{file}: {len(picture):,} bytes, {len(frames)} frames")


if __name__ == "__main__":
    main()
