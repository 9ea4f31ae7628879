"""`chatserve train data SOURCE --out DIR`: questions with voted answers, as training data."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatserve import config
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

LIBRARIES = ("pyarrow", "markdownify")
SAMPLE = "sample"


@dataclass(frozen=True)
class TrainDataConfig:
    """Settings of `chatserve train data`."""

    out: str | None = setting(None, "folder for what is made", metavar="FOLDER")
    pairs: int = setting(
        10, "compare at most so many pairs of a question's answers", metavar="N", ge=1, le=1000
    )
    shares: str = setting(
        "40,30,20,10", "parts of the questions for fine-tuning, the reward model, "
        "reinforcement learning and evaluation", metavar="A,B,C,D",
    )  # fmt: skip
    seed: int = setting(0, "of the splits, the order and the choice of pairs", ge=0, le=1 << 63)
    text: str = setting("html", "what the source's texts are", choices=("html", "markdown"))
    site: str | None = setting(
        None, "address of the site that a dump is from, for attribution; default: the name of its "
        "folder", metavar="URL",
    )  # fmt: skip
    license: str = setting("CC BY-SA 4.0", "of texts whose rows name none", metavar="NAME")
    skip_bad: bool = setting(False, "leave out rows that cannot be read, and count them")
    workers: int = setting(
        0, "processes that turn HTML into Markdown; 0: one per processor", metavar="N",
        ge=0, le=256,
    )  # fmt: skip
    debug: bool = setting(False, "show tracebacks")


def main(argv: list[str]) -> int:
    """Prepare the data; their folder goes to stdout. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve train data",
        "Make the tables that the recipe's steps read from questions with voted answers: Posts.xml "
        "of a Stack Exchange dump, stack-exchange-preferences (Parquet), or JSONL with the same "
        "columns. Scores are round(log2(1 + votes)), 1 more for the accepted answer, -1 for "
        "negative votes. A killed run goes on where it was.",
        TrainDataConfig,
    )
    parser.add_argument(
        "source", nargs="?", metavar="PATH",
        help=f"file or folder; `{SAMPLE}`: a few questions that come with chatserve",
    )  # fmt: skip
    flags = parser.flags(argv)
    path = flags.pop("source", None)
    options = config.build(TrainDataConfig, flags)
    if path is None or options.out is None:
        raise UsageError("both are needed: chatserve train data PATH --out FOLDER")

    from chatserve.cli.commands.train import need

    need(*LIBRARIES)
    from chatserve.byte_bar import ByteBar
    from chatserve.train.data import source as sources
    from chatserve.train.data.preparation import Settings, prepare

    place = sources.SAMPLE if path == SAMPLE else Path(path).expanduser()
    out = Path(options.out).expanduser()
    settings = Settings(options.pairs, _shares(options.shares), options.seed, options.text)
    source = sources.open_source(place, _site(options.site), options.license)
    if source.is_dump and source.site is None:
        _tell(
            "attribution will lack addresses, which the license asks for: say --site, as "
            "https://ai.stackexchange.com"
        )
    manifest = prepare(
        source, out, settings,
        skip_bad=options.skip_bad, num_workers=options.workers or os.cpu_count() or 1,
        bar=lambda label: ByteBar(label, sys.stderr), tell=_tell,
    )  # fmt: skip
    for line in _summary(manifest):
        _tell(line)
    print(out)
    return 0


def _shares(text: str) -> tuple[int, ...]:
    try:
        shares = tuple(map(int, text.split(",")))
    except ValueError:
        shares = ()
    if len(shares) != 4 or min(shares) < 1 or max(shares) > 1_000_000:
        raise UsageError(
            f"--shares {text}: must be four whole numbers from 1 to 1,000,000, for fine-tuning, "
            "reward, rl and evaluation"
        )
    return shares


def _site(site: str | None) -> str | None:
    from urllib.parse import urlsplit

    if site is not None and (urlsplit(site).scheme not in ("http", "https") or " " in site):
        raise UsageError(f"--site {site}: must be an address, as https://ai.stackexchange.com")
    return site


def _summary(manifest: dict[str, Any]) -> list[str]:
    lines = ["rows: " + ", ".join(f"{name} {n:,}" for name, n in manifest["rows"].items())]
    empty = [name for name, n in manifest["rows"].items() if not n]
    lines += [f"no row for {name}: too few questions" for name in empty]
    told = {name: n for name, n in manifest["counts"].items() if n}
    lines.append("counted: " + ", ".join(f"{name} {n:,}" for name, n in told.items()))
    lines += [f"left out: {each}" for each in manifest["bad rows"]]
    licenses = manifest["licenses"]
    if licenses:
        lines.append(
            f"license of the texts: {', '.join(licenses)}; {manifest['attribution']} says who "
            "wrote them and goes wherever they go"
        )
    return lines


def _tell(line: str) -> None:
    from chatserve.cli.escapes import one_line

    print(one_line(line), file=sys.stderr)
