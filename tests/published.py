"""Tiny repositories as those of Vicuna and StackLLaMA are, for a stand-in hub; and their bases."""

from __future__ import annotations

from pathlib import Path

from tests import adapters, deltas, tiny

ROWS = deltas.VOCAB
V0, V11, MERGED = "lmsys/vicuna-7b-delta-v0", "lmsys/vicuna-7b-delta-v1.1", "lmsys/vicuna-7b-v1.1"
SFT, RL, RM = (f"trl-lib/llama-7b-se-{kind}peft" for kind in ("", "rl-", "rm-"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def llama(folder: Path, **sizes: int) -> Path:
    """The base of the deltas, in the layout of 2023."""
    base = deltas.with_rotary(deltas.base_tensors(**sizes))
    return deltas.write_folder(folder, base, form="bin-shards", vocab_size=sizes.get("vocab", ROWS))


def vicuna(scratch: Path) -> dict[str, dict[str, bytes]]:
    """Deltas for `llama`, v0 with its row for `[PAD]`, and v1.1 merged."""
    v0 = deltas.with_rotary(deltas.delta_tensors(1, vocab=ROWS + 1))
    v11 = deltas.delta_tensors(2)
    folders = {
        V0: deltas.write_folder(scratch / "v0", v0, form="bin-shards", vocab_size=ROWS + 1),
        V11: deltas.write_folder(scratch / "v11", v11, form="bin-shards", vocab_size=ROWS),
        MERGED: deltas.write_folder(
            scratch / "merged", deltas.expected(deltas.base_tensors(), v11), vocab_size=ROWS
        ),
    }
    return {model_id: contents(folder) for model_id, folder in folders.items()}


def stackllama(scratch: Path) -> dict[str, dict[str, bytes]]:
    """Adapters for `tiny.save_model`; beside the policy the value head that TRL left there."""
    repositories = {}
    for seed, model_id in enumerate((SFT, RL, RM)):
        pairs = adapters.random_pairs(adapters.tiny_shapes(), seed=seed)
        folder = adapters.write(
            scratch / model_id, pairs, as_bin=True,
            base_model_name_or_path="org/llama" if model_id == SFT else "trl-lib/llama-se-merged",
            task_type="SEQ_CLS" if model_id == RM else "CAUSAL_LM",
        )  # fmt: skip
        repositories[model_id] = contents(folder)
    repositories[RL]["pytorch_model.bin"] = b"value head"
    return repositories


def tiny_base(folder: Path) -> Path:
    tiny.save_model(folder)
    return folder
