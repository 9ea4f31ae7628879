"""From files as they were published in 2023 to a chat: base, v0 delta, no flag for a template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.deltas import base_tensors, delta_tensors, with_rotary, write_folder, write_json
from tests.processes import run_chatserve

TOKENIZER = Path(__file__).parents[2].parent / "shared/data/llama-tokenizer.model"
ROWS = 32_000


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """LLaMA's own vocabulary; v0's `[PAD]` in added_tokens.json."""
    if not TOKENIZER.exists():
        pytest.skip("needs LLaMA's tokenizer.model")
    base = with_rotary(base_tensors(vocab=ROWS))
    delta = with_rotary(delta_tensors(vocab=ROWS + 1))
    write_folder(tmp_path / "llama", base, form="bin-shards", vocab_size=ROWS)
    folder = write_folder(tmp_path / "delta-v0", delta, form="bin-shards", vocab_size=ROWS + 1)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    write_json(folder / "special_tokens_map.json", settings | {"pad_token": "[PAD]"})
    write_json(folder / "added_tokens.json", {"[PAD]": ROWS})
    return tmp_path


def test_from_base_and_delta_to_an_answer(published: Path) -> None:
    base, delta, target = (published / name for name in ("llama", "delta-v0", "made"))
    unmerged = run_chatserve("chat", delta, "-p", "Hello!", "--offline")
    assert unmerged.returncode == 3
    assert f"chatserve apply-delta BASE {delta} TARGET" in unmerged.stderr
    made = run_chatserve("apply-delta", base, delta, target, "--verify")
    assert (made.returncode, made.stdout) == (0, f"{target}\n"), made.stderr
    shown = run_chatserve("template", target, "--offline")
    assert shown.stdout.startswith("template: vicuna_v0 (verified as Vicuna v0:"), shown.stderr
    command = ["chat", target, "-p", "Hello!", "--max-new-tokens", "4", "--offline"]
    answer = run_chatserve(*command)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
