"""Short names: all that was published of Vicuna and StackLLaMA, and the guide's table of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatserve.catalogue import ALIASES, CHAINS, DELTAS, NOTES

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "pull.md"
OURS = {name: model_id for name, model_id in ALIASES.items() if "vicuna" in name or "-se-" in name}


def lines() -> list[str]:
    """The rows of the guide's table."""
    return [line for line in GUIDE.read_text("utf-8").splitlines() if line.startswith("| ")]


def rows() -> list[set[str]]:
    """What stands in backquotes in each."""
    return [set(re.findall(r"`([^`]+)`", line)) for line in lines()]


def test_everything_that_was_published_has_a_name() -> None:
    kinds = ("delta-v0", "delta-v1.1", "v1.1", "v1.3", "v1.5", "v1.5-16k")
    vicuna = {f"lmsys/vicuna-{size}-{kind}" for size in ("7b", "13b") for kind in kinds}
    stackllama = {f"trl-lib/llama-7b-se-{kind}" for kind in ("peft", "rl-peft", "rm-peft")}
    assert vicuna | stackllama | {"lmsys/vicuna-33b-v1.3"} == set(OURS.values())
    assert all(model_id.endswith(f"/{name}") for name, model_id in OURS.items())


def test_the_chains_are_those_of_the_model_cards() -> None:
    parts = {name: chain.parts for name, chain in CHAINS.items()}
    assert parts["vicuna-13b-v0"] == ("lmsys/vicuna-13b-delta-v0",)
    assert parts["stackllama-7b"] == ("trl-lib/llama-7b-se-peft", "trl-lib/llama-7b-se-rl-peft")
    assert {chain.base for chain in CHAINS.values() if "13b" in chain.name} == {"LLaMA-13B"}
    deltas = {name for name, model_id in OURS.items() if "delta" in name}
    assert {ALIASES[name] for name in deltas} == DELTAS <= NOTES.keys()


@pytest.mark.parametrize("name", CHAINS)
def test_what_a_chain_makes_is_known_by_its_folders_name(name: str) -> None:
    """The template of Vicuna v0 and StackLLaMA follows from it."""
    from chatserve.models.registry import FAMILIES

    family = {"v0": "Vicuna v0", "v1.1": "Vicuna v1.1 to v1.5"}.get(name.rpartition("-")[2])
    row = next(row for row in FAMILIES if row.name == (family or "StackLLaMA"))
    assert any(part in name for part in row.names)
    assert not any(part in name for part in row.not_names)


def test_the_guide_names_them_all() -> None:
    named = set[str]().union(*rows())
    assert {*OURS, *OURS.values(), *CHAINS} <= named
    for name, chain in CHAINS.items():
        assert any(chain.base in line and f"`{name}`" in line for line in lines()), name
        assert any(set(chain.parts) <= row for row in rows()), name


def test_the_guide_names_nothing_else() -> None:
    known = {*ALIASES, *ALIASES.values(), *CHAINS, "--base"}
    assert set[str]().union(*rows()) <= known
