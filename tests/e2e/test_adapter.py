"""Base and adapters, from published files to an answer: served as they are, and merged first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import adapters, tiny
from tests.processes import run_chatserve

ASK = ("-p", "hello", "--max-new-tokens", "12", "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and as StackLLaMA was published: `sft` and `rl` as `.bin`, `rl` on the merge."""
    folder = tmp_path_factory.mktemp("stack")
    tiny.save_model(folder / "base")
    for seed, (name, base) in enumerate((("sft", "org/base"), ("rl", "trl-lib/llama-se-merged"))):
        adapters.write(
            folder / name, adapters.random_pairs(adapters.tiny_shapes(), seed=seed), as_bin=True,
            base_model_name_or_path=base,
        )  # fmt: skip
    return folder


def answer(folder: Path, *flags: str) -> str:
    result = run_chatserve("chat", *flags, *ASK, CHATSERVE_HOME=str(folder / "home"))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_stages_answer_alike_served_and_merged(folder: Path) -> None:
    base, sft, rl, target = (str(folder / name) for name in ("base", "sft", "rl", "merged"))
    served = answer(folder, base, "--adapter", sft, "--adapter", rl)
    result = run_chatserve(
        "merge-adapter", base, sft, rl, target, CHATSERVE_HOME=str(folder / "home")
    )
    assert (result.returncode, result.stdout) == (0, f"{target}\n"), result.stderr
    assert answer(folder, target) == served
    assert answer(folder, base) != served


def test_an_adapter_as_weights_prints_the_command(folder: Path) -> None:
    rl = str(folder / "rl")
    result = run_chatserve("chat", rl, "-p", "hello", CHATSERVE_HOME=str(folder / "home"))
    assert result.returncode == 3 and result.stdout == ""
    command = f"chatserve serve LLAMA-7B --adapter LLAMA-7B-SE-PEFT --adapter {rl}"
    assert command in " ".join(result.stderr.split())
