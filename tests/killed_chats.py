"""Two chats that save their turns at once and die of SIGKILL at random times, again and again.

    python -m tests.killed_chats FILE ROUNDS [--careless]

Prints one JSON line per round: how many turns were acknowledged until then, how many of them are
not in the file, and what SQLite says of it. `--careless` chats acknowledge turns that they save
only with the fifth.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path

from chatserve.cli.session_store import Session, SessionStore
from chatserve.cli.transcript import Transcript

NUM_CHATS = 2
MAX_ACKS = 6
MAX_DELAY_S = 0.004


def chat(file: Path, name: str, pipe: int, *, is_careless: bool) -> None:
    """Go on with the chat of that name, or begin it, for ever."""
    store = SessionStore(file)
    found = store.find(name)
    session, transcript = found or (Session(name), Transcript())
    while True:
        turn = f"{name} {len(transcript.turns)} " + "word " * 200
        transcript.ask(turn)
        transcript.answer(turn, is_partial=False)
        if not is_careless or len(transcript.turns) % 10 == 0:
            assert store.save(session, transcript, "m")
        os.write(pipe, f"{name} {len(transcript.turns)}\n".encode())


def start(file: Path, name: str, pipe: int, *, is_careless: bool) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            chat(file, name, pipe, is_careless=is_careless)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def main() -> None:
    file, rounds, is_careless = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["--careless"]
    choose = random.Random(rounds)
    names = [f"chat{index}" for index in range(NUM_CHATS)]
    acknowledged = dict.fromkeys(names, 0)
    for _ in range(rounds):
        theirs, ours = os.pipe()
        pids = [start(file, name, ours, is_careless=is_careless) for name in names]
        os.close(ours)
        with os.fdopen(theirs) as acks:
            for _ in range(choose.randint(1, MAX_ACKS)):
                take(acks.readline(), acknowledged)
            time.sleep(choose.random() * MAX_DELAY_S)
            for pid in choose.sample(pids, NUM_CHATS):
                os.kill(pid, signal.SIGKILL)
            codes = [os.waitpid(pid, 0)[1] for pid in pids]
            for line in acks:
                take(line, acknowledged)
        line = {
            "acknowledged": sum(acknowledged.values()),
            "lost": lost(file, acknowledged),
            "integrity": integrity(file),
            "killed": codes == [signal.SIGKILL] * NUM_CHATS,
        }
        print(json.dumps(line), flush=True)
        if is_careless:
            acknowledged = dict.fromkeys(names, 0)


def take(line: str, acknowledged: dict[str, int]) -> None:
    name, number = line.split()
    acknowledged[name] = max(acknowledged[name], int(number))


def lost(file: Path, acknowledged: dict[str, int]) -> int:
    """Turns that are not there, or not what was said."""
    number = 0
    for name, num_turns in acknowledged.items():
        found = SessionStore(file).find(name)
        turns = found[1].turns if found else []
        for place in range(num_turns):
            said = f"{name} {place // 2 * 2} "
            number += place >= len(turns) or not turns[place].content.startswith(said)
    return number


def integrity(file: Path) -> str:
    with closing(sqlite3.connect(file)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


if __name__ == "__main__":
    main()
