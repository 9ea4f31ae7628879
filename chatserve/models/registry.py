"""The families whose prompts are known by their fingerprint. Data only.

`chat_template.choose_template` verifies a row against weights: the model type, the rows of the
vocabulary, the ids that the tokenizer gives a probe text, and a name that says so. A folder's name
alone never decides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One family of weights.

    names: parts of a folder's or config's name, lower case; not_names: parts that speak against it.
    pad_token: a further token, with its id, that the vocabulary must have; weights that have it and
    bring no chat template of their own need no name.
    """

    name: str
    template: str
    names: tuple[str, ...]
    vocab_rows: int
    model_type: str = "llama"
    not_names: tuple[str, ...] = ()
    pad_token: tuple[str, int] | None = None


# LLaMA-1 and Llama-2 share one vocabulary: "USER: Hello!" is 3148 1001 29901 15043 29991 in it.
LLAMA_PROBE = ("USER: Hello!", (3148, 1001, 29901, 15043, 29991))

FAMILIES: tuple[Family, ...] = (
    Family(
        name="Vicuna v0",
        template="vicuna_v0",
        names=("vicuna",),
        vocab_rows=32001,
        pad_token=("[PAD]", 32000),
    ),
    Family(
        name="Vicuna v1.1 to v1.5",
        template="vicuna_v1.1",
        names=("vicuna",),
        not_names=("v0",),
        vocab_rows=32000,
    ),
    Family(
        name="StackLLaMA",
        template="stackllama",
        names=(
            "stackllama", "stack-llama", "llama-7b-se-peft", "llama-7b-se-rl", "llama-se-rl",
            "llama-se-merged",
        ),
        vocab_rows=32000,
    ),
)  # fmt: skip

# In the config.json of a model that `apply-delta` made: the name of the delta.
APPLIED_DELTA = "applied_delta"

# Names of other families on LLaMA with 32001 rows; they are not Vicuna v0.
OTHER_NAMES = ("alpaca", "koala", "wizard", "guanaco", "gpt4all")
