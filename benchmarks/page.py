"""What the web page costs in a real browser: first paint, bytes, frames while an answer streams.

    python -m benchmarks.page [--tokens-per-s 200] [--seconds 10]

Chromium on this machine against a controller with a fake worker, over loopback; the page has to be
built (`make page`). Prints one JSON line: first contentful paint (ms, median of fresh profiles) and
bytes over the wire until then and in all; frames a second, the longest gap between two frames and
long tasks (over 50 ms) while Markdown streams at a fixed rate; and of an answer of 10,000 tokens,
as fast as the page takes it, processor time of the page for the last thousand tokens over that for
the first thousand.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks import machine
from benchmarks.terminal import markdown
from chatserve.server.page import built
from tests.browser.conftest import FLAGS
from tests.browser.house import House, Reply, house

NUM_TOKENS = 10_000
# of the fake worker and the loop it shares, a token; the line says what the rate really was
OVERHEAD_S = 0.001
WATCH = """
window.frames_at = [];
window.long_ms = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.long_ms.push(entry.duration);
}).observe({ entryTypes: ["longtask"] });
const look = (at) => { window.frames_at.push(at); requestAnimationFrame(look); };
requestAnimationFrame(look);
"""
IS_BUSY = "article.answer[aria-busy=true]"


@contextlib.contextmanager
def fresh(browser: Browser, home: House) -> Iterator[Page]:
    context = browser.new_context()
    try:
        page = context.new_page()
        page.add_init_script(WATCH)
        yield page
    finally:
        context.close()


def start(browser: Browser, home: House) -> dict[str, float]:
    """A profile that knows nothing: paint and bytes."""
    with fresh(browser, home) as page:
        devtools = page.context.new_cdp_session(page)
        devtools.send("Network.enable")
        sizes: list[float] = []
        devtools.on(
            "Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"])
        )
        page.goto(home.url)
        page.get_by_role("textbox", name="Your question").wait_for()
        paint = page.evaluate(
            """() => new Promise((resolve) => {
              const found = () => performance.getEntriesByName("first-contentful-paint")[0];
              const look = () => found() ? resolve(found().startTime) : setTimeout(look, 10);
              look();
            })"""
        )
        page.wait_for_load_state("networkidle")
        return {"first_paint_ms": paint, "num_bytes": sum(sizes)}


def stream(browser: Browser, home: House, tokens_per_s: float, seconds: float) -> dict[str, Any]:
    """Markdown at a fixed rate, as the page draws it."""
    tokens = markdown(random.Random(1))
    pieces = [next(tokens) for _ in range(round(tokens_per_s * seconds))]
    home.answers(Reply(pieces, step_s=1 / tokens_per_s - OVERHEAD_S))
    with fresh(browser, home) as page:
        page.goto(home.url)
        question = page.get_by_role("textbox", name="Your question")
        question.fill("all of it?")
        question.press("Enter")
        page.locator(IS_BUSY).wait_for()
        page.wait_for_function(
            "() => document.querySelector('article.answer > .markdown').textContent"
        )
        page.evaluate("() => { frames_at.length = long_ms.length = 0; }")
        page.evaluate("() => { window.from_at = performance.now(); }")
        page.locator(IS_BUSY).wait_for(state="detached", timeout=1000 * (10 * seconds + 30))
        frames, long_ms, elapsed = page.evaluate(
            "() => [frames_at, long_ms, (performance.now() - from_at) / 1000]"
        )
    gaps = [after - before for before, after in itertools.pairwise(frames)]
    return {
        "tokens_per_s": round(len(pieces) / elapsed, 1),
        "frames_per_s": round(1000 * len(gaps) / sum(gaps), 1),
        "gap_p99_ms": round(statistics.quantiles(gaps, n=100)[98], 1),
        "longest_gap_ms": round(max(gaps), 1),
        "num_long_tasks": len(long_ms),
        "longest_task_ms": round(max(long_ms, default=0), 1),
    }


def growth(browser: Browser, home: House) -> dict[str, float]:
    """Processor time of the page's thread for each thousand of 10,000 tokens."""
    tokens = markdown(random.Random(2))
    pieces = [next(tokens) for _ in range(NUM_TOKENS)]
    marks = [f"mark{index}end" for index in range(11)]
    for index, mark in enumerate(marks):
        pieces.insert(index * 1001, f"\n\n{mark}\n\n")
    home.answers(Reply(pieces, step_s=0.002))
    with fresh(browser, home) as page:
        devtools = page.context.new_cdp_session(page)
        devtools.send("Performance.enable")

        def busy_s() -> float:
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            return next(each["value"] for each in metrics if each["name"] == "TaskDuration")

        page.goto(home.url)
        question = page.get_by_role("textbox", name="Your question")
        question.fill("all of it?")
        question.press("Enter")
        times = []
        for mark in marks:
            page.wait_for_function(
                "mark => document.querySelector('article.answer > .markdown')"
                "?.textContent.includes(mark)", arg=mark, timeout=300_000, polling=100,
            )  # fmt: skip
            times.append(busy_s())
    each = [after - before for before, after in itertools.pairwise(times)]
    return {
        "first_1000_s": round(each[0], 3),
        "last_1000_s": round(each[-1], 3),
        "last_over_first": round(each[-1] / each[0], 2),
        "cpu_ms_per_token": round(1000 * sum(each) / NUM_TOKENS, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens-per-s", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None or built()["/"].status != 200:
        parser.exit(1, "this needs chromium and a built page (make page)\n")
    with (
        sync_playwright() as driver,
        tempfile.TemporaryDirectory() as folder,
        house(Path(folder), "alpha") as home,
    ):
        browser = driver.chromium.launch(executable_path=executable, args=[*FLAGS])
        starts = [start(browser, home) for _ in range(options.starts)]
        line = {
            "benchmark": "page",
            **machine.describe(),
            "chromium": browser.version,
            "first_paint_ms": round(
                statistics.median(each["first_paint_ms"] for each in starts), 1
            ),
            "num_bytes": round(starts[0]["num_bytes"]),
            "streaming": stream(browser, home, options.tokens_per_s, options.seconds),
            "growth": growth(browser, home),
        }
        browser.close()
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
