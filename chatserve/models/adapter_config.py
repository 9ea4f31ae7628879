"""What an adapter_config.json says, read as of today and as of 2023: `AdapterConfig`. No tensors.

Keys that do not change W + scale * B A are not looked at, so files with keys that nobody writes any
more (`enable_lora`, `merge_weights`) and with keys to come are read; the others are refused by
name. Source: LoraConfig of peft 0.21 and of 0.2 to 0.4.
"""

from __future__ import annotations

import math
import re
import reprlib
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from chatserve.errors import ModelLoadError
from chatserve.models.weight_files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MERGED_KEY = "merged_adapters"
"""In the config.json of a merged model: name, base and fingerprint of each adapter, in order."""
MAX_RANK = 1 << 16
# A base that never was published, and what it is made of (StackLLaMA, facts of its model card).
UNPUBLISHED_BASES = {"llama-se-merged": ("LLAMA-7B", "LLAMA-7B-SE-PEFT")}

_MAX_CONFIG_BYTES = 1 << 20
_MERGED_BY_PEFT = "merge it with peft's merge_and_unload where it was trained, and serve the result"
# Keys under which the network computes something else than W + scale * B A, with what they mean.
_OTHER_MATHEMATICS = {
    "use_dora": "DoRA scales the merged rows by magnitudes of its own",
    "lora_bias": "it adds biases to the network",
    "use_qalora": "QA-LoRA groups the inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are no matrices of the Llama family",
    "trainable_token_indices": "it changes rows of the embedding",
    "kasa_config": "it has singular values between B and A",
    "monteclora_config": "it samples its weights",
    "arrow_config": "it routes between several adapters",
    "modules_to_save": "it replaces whole modules of the base",
}
# These initialisations move a part of the base's weights into the adapter.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LITERAL = re.compile(r"(\^?)((?:\w|\\?\.)+)\$?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

# PEFT's prefix; and what raw state dicts put around a module that is trained as a whole.
_SCORE_HEAD = re.compile(
    r"(?:base_model\.model\.)?(?:score|classifier)(?:\.modules_to_save\.\w+)?\.weight"
)

Value = TypeVar("Value")


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter's settings.

    targets: names of modules, whole or their ends; None where the file has a pattern or nothing.
    excluded: likewise. layers: those with an adapter, None for all. base: which model it was
    trained on, a name that its author chose.
    """

    rank: int
    alpha: float
    is_rank_stabilised: bool
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...] | None
    layers: frozenset[int] | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    base: str | None

    @staticmethod
    def read(folder: Path, *, is_reward: bool = False) -> AdapterConfig:
        """`is_reward`: of a reward model, whose score head lies beside the pairs; else of text.

        Raises `ModelLoadError` naming the key that is wrong, or that asks for more than LoRA.
        """
        table = read_json(folder, ADAPTER_CONFIG, max_bytes=_MAX_CONFIG_BYTES)
        return _Reader(folder / ADAPTER_CONFIG, table, is_reward).read()

    def rank_of(self, module: str) -> int:
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by in this module."""
        alpha, rank = _matching(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank

    def expected(self, modules: Iterable[str]) -> list[str] | None:
        """Which of a network's matrices must have a pair; None where a pattern leaves it open."""
        if self.targets is None or self.excluded is None:
            return None
        return [
            module
            for module in modules
            if _is_named(module, self.targets)
            and not _is_named(module, self.excluded)
            and (self.layers is None or _layer_of(module) in self.layers)
        ]


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, whatever else is in it."""
    return (folder / ADAPTER_CONFIG).exists()


def merged_adapters(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The adapters that a config.json says are in its weights; anything else there is ignored."""
    records = config.get(MERGED_KEY)
    if not isinstance(records, list):
        return []
    return [record for record in records if isinstance(record, Mapping)]


def is_score_head(name: str) -> bool:
    """Whether a tensor is what makes a reward model's number of a hidden state."""
    return _SCORE_HEAD.fullmatch(name) is not None


def is_value_head(name: str) -> bool:
    """Whether a tensor belongs to what TRL trains beside a policy; serving does not need it."""
    return name.startswith("v_head.") or ".v_head." in name


def serve_command(folder: Path, base: object) -> str:
    """The command that serves this adapter, with the base as far as it is known."""
    name = base if isinstance(base, str) and _HUB_ID.fullmatch(base) else "BASE"
    parts = UNPUBLISHED_BASES.get(name.rpartition("/")[2], (name,))
    adapters = [*parts[1:], shlex.quote(str(folder))]
    return " ".join(["chatserve serve", parts[0], *(f"--adapter {path}" for path in adapters)])


def _are_score_heads(value: object) -> bool:
    """PEFT lists both names that transformers has for such a head, whichever a network uses."""
    return isinstance(value, list) and all(name in ("score", "classifier") for name in value)


def _matching(table: Mapping[str, Value], module: str, default: Value) -> Value:
    for key, value in table.items():
        name = key.removeprefix("^")
        if module == name or (name == key and module.endswith(f".{name}")):
            return value
    return default


def _is_named(module: str, names: Iterable[str]) -> bool:
    return any(
        module == name or module.endswith(f".{name}") or (name == "*" and module != "lm_head")
        for name in names
    )


def _layer_of(module: str) -> int | None:
    found = re.search(r"\.(\d+)\.", module)
    return int(found[1]) if found else None


class _Reader:
    """One file's content, with messages that name it and the key."""

    def __init__(self, path: Path, table: Mapping[str, Any], is_reward: bool) -> None:
        self._path = path
        self._table = table
        self._is_reward = is_reward

    def read(self) -> AdapterConfig:
        self._refuse_other_methods()
        base = self._table.get("base_model_name_or_path")
        return AdapterConfig(
            rank=self._rank("r", self._table.get("r")),
            alpha=self._alpha("lora_alpha", self._table.get("lora_alpha")),
            is_rank_stabilised=self._flag("use_rslora"),
            targets=self._targets(),
            excluded=self._names("exclude_modules", default=()),
            layers=self._layers(),
            ranks={
                name: self._rank("rank_pattern", value)
                for name, value in self._pattern("rank_pattern")
            },
            alphas={
                name: self._alpha("alpha_pattern", value)
                for name, value in self._pattern("alpha_pattern")
            },
            base=base if isinstance(base, str) and base and base.isprintable() else None,
        )

    def _refuse_other_methods(self) -> None:
        method = self._table.get("peft_type", "LORA")
        if method != "LORA":
            self._refuse("peft_type", method, f"only LORA is read; {_MERGED_BY_PEFT}")
        task = self._table.get("task_type")
        if self._is_reward:
            if task != "SEQ_CLS":
                self._refuse("task_type", task, "a reward model's is 'SEQ_CLS'; take another")
        elif task not in (None, "CAUSAL_LM"):
            what = "a reward model or classifier" if task == "SEQ_CLS" else "another kind of model"
            self._refuse("task_type", task, f"it makes {what}, which writes no text; take another")
        for key, meaning in _OTHER_MATHEMATICS.items():
            value = self._table.get(key)
            if self._is_reward and key == "modules_to_save" and _are_score_heads(value):
                continue
            if value:
                self._refuse(key, value, f"{meaning}; {_MERGED_BY_PEFT}")
        start = self._table.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGED_BASES):
            self._refuse(
                "init_lora_weights", start,
                "it was trained on a changed base; save it with peft's "
                "path_initial_model_for_weight_conversion",
            )  # fmt: skip
        bias = self._table.get("bias", "none")
        if bias not in ("none", None):
            self._refuse("bias", bias, f"it trains biases of the base, too; {_MERGED_BY_PEFT}")

    def _rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 0 < value <= MAX_RANK:
            self._wrong(key, value, f"a rank from 1 to {MAX_RANK}")
        return value

    def _alpha(self, key: str, value: Any) -> float:
        # integers are compared before they could overflow a float
        if type(value) not in (int, float) or not 0 < value < 1e9:
            self._wrong(key, value, "a positive number")
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self._table.get(key)
        if value is not None and not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return bool(value)

    def _targets(self) -> tuple[str, ...] | None:
        if self._table.get("target_modules") == "all-linear":
            return ("*",)
        return self._names("target_modules", default=None)

    def _names(self, key: str, default: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """A list of names; None for a pattern, which is not evaluated: it may take for ever."""
        value = self._table.get(key)
        if value is None:
            return default
        if isinstance(value, str):
            return None
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._wrong(key, value, "a list of names")
        return tuple(value)

    def _layers(self) -> frozenset[int] | None:
        value = self._table.get("layers_to_transform")
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in layers):
            self._wrong("layers_to_transform", value, "a list of layers")
        return frozenset(layers)

    def _pattern(self, key: str) -> list[tuple[str, Any]]:
        """Names of modules and their values; a `^` in front stays, as it means the whole name."""
        value = self._table.get(key) or {}
        if not isinstance(value, dict):
            self._wrong(key, value, "an object")
        pairs = []
        for pattern, number in value.items():
            name = _LITERAL.fullmatch(pattern)
            if name is None:
                self._refuse(key, pattern, f"only plain names are read there; {_MERGED_BY_PEFT}")
            pairs.append((name[1] + name[2].replace("\\", ""), number))
        return pairs

    def _wrong(self, key: str, value: Any, wanted: str) -> NoReturn:
        # reprlib keeps the line short, whatever the file holds
        raise ModelLoadError(
            f"{self._path}: {key} is {reprlib.repr(value)}, not {wanted}; get the file again"
        )

    def _refuse(self, key: str, value: Any, reason: str) -> NoReturn:
        raise ModelLoadError(f"{self._path}: {key} {reprlib.repr(value)} is refused: {reason}")
