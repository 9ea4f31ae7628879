"""A process that prepares data again and again and lets each run die of SIGKILL at a chosen call.

    python -m tests.killed_preparation SOURCE FOLDER KILLS

Every killed run is followed by one that goes on. Prints one JSON line per kill.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

from chatserve.train.data import buckets
from chatserve.train.data.preparation import Settings, prepare
from chatserve.train.data.source import open_source
from tests.killer import Killer, Moment

END = ("finish", "work_folder")  # where names appear
SETTINGS = Settings(pairs=10, shares=(40, 30, 20, 10), seed=0, text="html")


def run(source: Path, out: Path, told: list[str]) -> None:
    prepare(
        open_source(source, None, "CC BY-SA 4.0"), out, SETTINGS, skip_bad=True, num_workers=1,
        bar=lambda _: nullcontext(lambda *_: None), tell=told.append,
    )  # fmt: skip


def contents(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def resumed(source: Path, out: Path, whole: Path) -> None:
    told: list[str] = []
    run(source, out, told)
    print(json.dumps({"same": contents(out) == contents(whole), "told": told}), flush=True)


def in_child(killer: Killer, source: Path, out: Path, count: Path) -> bool:
    """True when it was killed; how many calls there were is left in `count`.

    The parent never runs what it forks: threads of Arrow would be half there in its children.
    """

    def work() -> None:
        run(source, out, [])
        sys.setprofile(None)
        count.write_text(f"{killer.num_calls} {killer.num_end_calls}")

    return killer.watch_in_child(work)


def main() -> None:
    source, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    buckets.BUCKET_BYTES = buckets.MAX_BUFFER_BYTES = 3000  # several of each in a small source
    whole, out, count = folder / "whole", folder / "out", folder / "count"
    assert not in_child(Killer(END), source, whole, count)
    num_calls, num_end_calls = map(int, count.read_text().split())
    ends = kills // 4
    moments = [Moment(True, num_end_calls * k // ends) for k in range(ends)]
    moments += [Moment(False, num_calls * k // (kills - ends)) for k in range(1, kills - ends)]
    for moment in moments:
        shutil.rmtree(out, ignore_errors=True)
        killed = in_child(Killer(END, moment), source, out, count)
        print(json.dumps({"killed": killed}), flush=True)
        pid = os.fork()
        if pid == 0:
            resumed(source, out, whole)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main()
