"""chatserve beside every peer that is installed: `make bench`.

    python -m benchmarks [--model smollm2-135m] [--mode in-process,http] [--rounds 5] …

Prints a JSON line per figure to stdout, and progress and a table to stderr. Models come from
`python -m benchmarks.models`; how to get the peers is in benchmarks/peers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.peers import chatserve, fastchat, llama_cpp, transformers
from benchmarks.peers.peer import Peer
from benchmarks.places import fastchat_python, llama_cpp_folder, models_folder
from benchmarks.rounds import run_rounds
from benchmarks.run_model import RunModel
from benchmarks.table import render
from benchmarks.tasks import TRIAL, Sizes, tasks_of

ENGINES = ("chatserve", "llama.cpp", "transformers", "fastchat")
MODES = ("in-process", "http")


def main() -> None:
    arguments = _parser().parse_args()
    model = RunModel.open(arguments.models / arguments.model)
    modes = tuple(arguments.mode.split(","))
    peers = [peer for mode in modes for peer in _installed(mode, model, arguments)]
    sizes = TRIAL if arguments.trial else _sizes(arguments)
    tasks = tasks_of(modes, sizes)
    if arguments.only:
        tasks = [task for task in tasks if task.what in arguments.only.split(",")]
    results = run_rounds(peers, tasks, arguments.rounds, one_at_a_time=arguments.one_at_a_time)
    common = {"benchmark": "peers", **describe(), "model": model.name}
    lines = [{**common, **series.as_line()} for series in results]
    for line in lines:
        print(json.dumps(line), flush=True)
    print("\n" + render(lines), file=sys.stderr)


def _installed(mode: str, model: RunModel, arguments: argparse.Namespace) -> list[Peer]:
    engines = arguments.peers.split(",")
    peers: list[Peer] = []
    if "chatserve" in engines:
        peers += chatserve.peers(mode, model, arguments.chatserve.split(","))
    folder = llama_cpp_folder()
    if "llama.cpp" in engines and folder:
        peers += llama_cpp.peers(mode, model, arguments.llama_cpp.split(","), folder)
    if "transformers" in engines:
        peers += transformers.peers(mode, model, arguments.transformers.split(","))
    python = fastchat_python()
    if "fastchat" in engines and python:
        peers += fastchat.peers(mode, model, arguments.fastchat.split(","), python)
    return peers


def _sizes(arguments: argparse.Namespace) -> Sizes:
    return Sizes(
        streams=_numbers(arguments.streams),
        prefill=_numbers(arguments.prefill),
        tokens=arguments.tokens,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="a folder of --models")
    add("--models", type=Path, default=models_folder(), help="where benchmarks.models wrote")
    add("--mode", default=",".join(MODES), help="in-process, http, or both")
    add("--rounds", type=int, default=5)
    add("--peers", default=",".join(ENGINES), help="engines; those not installed are left out")
    add(
        "--chatserve",
        default=",".join(chatserve.DEFAULT_FORMS),
        help=f"forms of chatserve: {', '.join(chatserve.FORMS)}; the first one gets the ratios",
    )
    add("--llama-cpp", default=",".join(llama_cpp.DEFAULT_FORMS), help="GGUF files by name")
    add("--transformers", default=",".join(transformers.DEFAULT_FORMS), help="bf16, fp32")
    add("--fastchat", default=",".join(fastchat.DEFAULT_FORMS), help="fp32, 8bit")
    add("--streams", default="1,4,8,16")
    add("--prefill", default="128,512,1500", help="lengths of prompts")
    add("--tokens", type=int, default=64, help="made in every stream")
    add("--only", help="tasks: prefill, decode, memory, startup, first-token, streams, idle")
    add("--one-at-a-time", action="store_true", help="for models of which two do not fit in memory")
    add("--trial", action="store_true", help="tiny sizes: shows that everything works")
    return parser


if __name__ == "__main__":
    main()
