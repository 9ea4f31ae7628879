"""Short names of published models: hub ids, and chains that are made of several of them. Data only.

A chain is what nobody may publish whole: the original LLaMA, whose licence its holder has to have,
plus the delta or the adapters that were published for it.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIASES = {
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
    "vicuna-13b-v1.5": "lmsys/vicuna-13b-v1.5",
    "vicuna-7b-v1.5-16k": "lmsys/vicuna-7b-v1.5-16k",
    "vicuna-13b-v1.5-16k": "lmsys/vicuna-13b-v1.5-16k",
    "vicuna-7b-v1.3": "lmsys/vicuna-7b-v1.3",
    "vicuna-13b-v1.3": "lmsys/vicuna-13b-v1.3",
    "vicuna-33b-v1.3": "lmsys/vicuna-33b-v1.3",
    "vicuna-7b-v1.1": "lmsys/vicuna-7b-v1.1",
    "vicuna-13b-v1.1": "lmsys/vicuna-13b-v1.1",
    "vicuna-7b-delta-v0": "lmsys/vicuna-7b-delta-v0",
    "vicuna-13b-delta-v0": "lmsys/vicuna-13b-delta-v0",
    "vicuna-7b-delta-v1.1": "lmsys/vicuna-7b-delta-v1.1",
    "vicuna-13b-delta-v1.1": "lmsys/vicuna-13b-delta-v1.1",
    "llama-7b-se-peft": "trl-lib/llama-7b-se-peft",
    "llama-7b-se-rl-peft": "trl-lib/llama-7b-se-rl-peft",
    "llama-7b-se-rm-peft": "trl-lib/llama-7b-se-rm-peft",
}


@dataclass(frozen=True)
class Chain:
    """A model that is made on the user's machine.

    base: what the user has to have, in words. parts: hub ids of one delta, or of adapters in the
    order in which they are merged.
    """

    name: str
    base: str
    parts: tuple[str, ...]
    is_delta: bool = False

    @property
    def command(self) -> str:
        """What makes it, whatever the base is."""
        return f"chatserve pull {self.name} --base PATH_OR_ID"

    @property
    def recipe(self) -> str:
        return " + ".join([self.base, *self.parts])


_CHAINS = (
    Chain("vicuna-7b-v0", "LLaMA-7B", ("lmsys/vicuna-7b-delta-v0",), is_delta=True),
    Chain("vicuna-13b-v0", "LLaMA-13B", ("lmsys/vicuna-13b-delta-v0",), is_delta=True),
    # also published whole, see ALIASES
    Chain("vicuna-7b-v1.1", "LLaMA-7B", ("lmsys/vicuna-7b-delta-v1.1",), is_delta=True),
    Chain("vicuna-13b-v1.1", "LLaMA-13B", ("lmsys/vicuna-13b-delta-v1.1",), is_delta=True),
    # the base that the published StackLLaMA adapters name, trl-lib/llama-se-merged
    Chain("stackllama-7b-sft", "LLaMA-7B", ("trl-lib/llama-7b-se-peft",)),
    Chain("stackllama-7b", "LLaMA-7B", ("trl-lib/llama-7b-se-peft", "trl-lib/llama-7b-se-rl-peft")),
)
CHAINS = {chain.name: chain for chain in _CHAINS}
DELTAS = frozenset(chain.parts[0] for chain in _CHAINS if chain.is_delta)
"""Hub ids of delta weights."""

NOTES = {
    "trl-lib/llama-7b-se-rm-peft": (
        "the reward model's adapter as it was published: without the head that gives the score, "
        "so the reward model cannot be rebuilt from it"
    ),
    **{
        part: f"a part, not a whole model; `{chain.command}` makes {chain.name} of it"
        for chain in _CHAINS
        for part in chain.parts
    },
}
"""What a user should know of a repository that is no whole model, by hub id."""
