"""The adapters beside one base model: loaded, replaced and taken away while it serves.

Knows files and the network's form of them; no HTTP, no sequences. A sequence holds its adapter
itself, so what is taken away lives until its last sequence ends.
"""

from __future__ import annotations

import hashlib
import logging
import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chatserve.config import ADAPTER_NAME, MAX_ADAPTERS, MAX_CARDS, MAX_NAME_LEN
from chatserve.engine.reward import DEFAULT_TEMPLATE, Reward, check_template
from chatserve.engine.sequence import LoadedAdapter
from chatserve.errors import (
    AdapterConflict,
    AdapterRefused,
    DoesNotFit,
    ModelLoadError,
    ModelNotFound,
)
from chatserve.models.adapter import Adapter, load_adapter
from chatserve.models.adapter_config import merged_adapters
from chatserve.models.batch import NetworkAdapter
from chatserve.models.checkpoint import Checkpoint
from chatserve.models.config import ModelConfig
from chatserve.models.device import DevicePolicy
from chatserve.models.fingerprint import weights_fingerprint
from chatserve.models.memory import available_bytes, in_gb
from chatserve.models.merge import check_base
from chatserve.models.score_head import TRAINING_RECORD, load_score_head, training_record

logger = logging.getLogger(__name__)

_FILE_BYTES = 4  # of a number while it is read


class AdaptableNetwork(Protocol):
    """A network that computes rows with and without adapters in one step."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def policy(self) -> DevicePolicy: ...
    def build_adapter(self, adapter: Adapter) -> NetworkAdapter: ...


@dataclass(frozen=True)
class AdapterPlace:
    """How many adapters a heartbeat can name beside a base, and how long their names may be."""

    most: int = MAX_ADAPTERS
    longest: int = MAX_NAME_LEN

    @staticmethod
    def beside(names: Sequence[str]) -> AdapterPlace:
        """Each adapter is named with each of the base's `names`."""
        return AdapterPlace(
            min(MAX_ADAPTERS, MAX_CARDS // len(names) - 1),
            MAX_NAME_LEN - 1 - max(map(len, names)),
        )

    def check(self, name: str, number: int) -> None:
        """Raises `AdapterRefused` where `name` cannot be one of `number`."""
        if number > self.most:
            few = "" if self.most == MAX_ADAPTERS else " with so many --model-names"
            raise AdapterRefused(
                f"{number - 1} adapters are loaded, the limit is {self.most}{few}; unload one first"
            )
        if len(name) > self.longest:
            raise AdapterRefused(
                f"BASE:{name} would be longer than {MAX_NAME_LEN} characters; choose a shorter "
                "name, or shorter --model-names",
                param="lora_name",
            )


class Adapters:
    """Adapters by name. Loading and unloading may be called from any thread, one at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: AdaptableNetwork | None,
        root: Path | None = None,
        place: AdapterPlace | None = None,
    ) -> None:
        """`network`: None where it can take none. `root`: the folder below which `load_below` may
        look, None for nowhere."""
        self._checkpoint = checkpoint
        self._network = network
        self._root = root
        self._place = place or AdapterPlace()
        self._lock = threading.Lock()
        # replaced as a whole: whoever reads it needs no lock
        self._loaded: Mapping[str, LoadedAdapter] = {}
        self._staged: LoadedAdapter | None = None

    def loaded(self) -> Mapping[str, LoadedAdapter]:
        return self._loaded

    def load_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter:
        """`load` for a caller who may not name any folder of this machine, but one below the root.

        A relative path begins at the root. Raises `AdapterRefused` for another one.
        """
        return self.load(name, self._below_root(path), replace=replace)

    def stage_below(self, name: str, path: str, *, replace: bool = False) -> LoadedAdapter:
        """As `load_below`, but it is served from `settle` on. There is place for one."""
        folder = self._below_root(path)
        with self._lock:
            self._staged = None
            self._check_place(name, replace=replace)
            staged = self._staged = self._read(name, folder)
        return staged

    def settle(self, name: str, *, is_wanted: bool) -> None:
        """Serve the adapter that is staged as `name`, or let go of it.

        Raises `AdapterRefused` where it can be served no more.
        """
        with self._lock:
            staged = self._staged
            if staged is None or staged.name != name:
                if is_wanted:
                    raise AdapterConflict(
                        f"no adapter {name[:80]} is staged any more; load it again",
                        param="lora_name",
                    )
                return
            self._staged = None
            if is_wanted:
                self._check_place(name, replace=True)
                self._loaded = {**self._loaded, name: staged}
                logger.info("adapter %s loaded (%s)", name, staged.fingerprint)

    def _below_root(self, path: str) -> Path:
        if self._root is None:
            raise AdapterRefused(
                "this server loads no adapters by request; start it with --adapter-root FOLDER, "
                "below which they lie",
                param="lora_path",
            )
        root = self._root.resolve()
        try:
            folder = (root / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a null byte
            raise AdapterRefused(f"{path[:200]!r} is no path: {error}", param="lora_path") from None
        if not folder.is_relative_to(root) or folder == root:
            raise AdapterRefused(
                f"{path[:200]!r} does not lie below the folder of --adapter-root; copy the adapter "
                "there",
                param="lora_path",
            )
        return folder

    def load(self, name: str, path: Path, *, replace: bool = False) -> LoadedAdapter:
        """Read the adapter in the folder `path` and serve it as `name`; `replace` one of that name.

        Whatever fails changes nothing. Raises `AdapterRefused` for a name that cannot be used,
        `ModelLoadError` for an adapter that cannot, `DoesNotFit`.
        """
        with self._lock:
            self._check_place(name, replace=replace)
            loaded = self._read(name, path)
            self._loaded = {**self._loaded, name: loaded}
        logger.info("adapter %s loaded from %s (%s)", name, path, loaded.fingerprint)
        return loaded

    def unload(self, name: str) -> None:
        """Serve `name` no more; sequences that use it go on. Raises `ModelNotFound`."""
        with self._lock:
            if name not in self._loaded:
                there = ", ".join(self._loaded) or "none"
                raise ModelNotFound(
                    f"there is no adapter {name[:80]!r}; loaded are: {there}", param="lora_name"
                )
            self._loaded = {key: value for key, value in self._loaded.items() if key != name}
        logger.info("adapter %s unloaded", name)

    def _check_place(self, name: str, *, replace: bool) -> None:
        """Raises `AdapterRefused` where there is none for `name`."""
        if not ADAPTER_NAME.fullmatch(name):
            raise AdapterRefused(
                f"{name[:80]!r} is no name for an adapter: up to 64 letters, digits, '.', '_' and "
                "'-'",
                param="lora_name",
            )
        if name in self._loaded:
            if not replace:
                raise AdapterConflict(
                    f"there is an adapter {name} already; unload it first, or send load_inplace: "
                    "true to put another one in its place",
                    param="lora_name",
                )
            return
        self._place.check(name, len(self._loaded) + 1)

    def load_reward(self, name: str, path: Path, special_ids: Mapping[str, int]) -> LoadedAdapter:
        """`load` for a reward model; `special_ids` of the tokenizer, for what ends its texts."""
        with self._lock:
            self._check_place(name, replace=False)
            loaded = self._read_reward(name, path, special_ids)
            self._loaded = {**self._loaded, name: loaded}
        logger.info("reward model %s loaded from %s (%s)", name, path, loaded.fingerprint)
        return loaded

    def _read_reward(self, name: str, path: Path, special_ids: Mapping[str, int]) -> LoadedAdapter:
        network = self._adaptable(path)
        # the head first: it is the smaller part, and what most folders lack
        head = load_score_head(path, network.config)
        adapter = load_adapter(
            path, network.config, name=name, admit=self._admitting(path, network), is_reward=True
        )
        check_base(adapter, self._checkpoint, merged_adapters(self._checkpoint.config))
        self._check_trained_on(path, head.base_fingerprint)
        reward = Reward(
            head.weight.double().numpy(),
            check_template(head.template or DEFAULT_TEMPLATE, f"{path}/{TRAINING_RECORD}"),
            _end_ids(path, special_ids),
        )
        return LoadedAdapter(
            name, _fingerprint(adapter, head.fingerprint, reward), network.build_adapter(adapter),
            adapter.base, reward,
        )  # fmt: skip

    def _check_trained_on(self, path: Path, trained_on: str | None) -> None:
        """Raises `ModelLoadError` where the record names other weights than the base's."""
        own = weights_fingerprint(self._checkpoint) if trained_on is not None else None
        if trained_on != own:
            raise ModelLoadError(
                f"{path}: was trained on the weights {trained_on}, this base's are {own}; serve it "
                "with its own base and the adapters that were merged into that, or, if these are "
                f"the same weights in another form, take base_fingerprint out of {TRAINING_RECORD}"
            )

    def _read(self, name: str, path: Path) -> LoadedAdapter:
        network = self._adaptable(path)
        adapter = load_adapter(
            path, network.config, name=name, admit=self._admitting(path, network)
        )
        check_base(adapter, self._checkpoint, merged_adapters(self._checkpoint.config))
        return LoadedAdapter(
            name, adapter.fingerprint, network.build_adapter(adapter), adapter.base
        )

    def _adaptable(self, path: Path) -> AdaptableNetwork:
        if self._network is None:
            raise ModelLoadError(
                f"{path}: adapters are served beside networks of the Llama family; this model runs "
                "through transformers: merge it with peft's merge_and_unload, and serve the result"
            )
        return self._network

    def _admitting(self, path: Path, network: AdaptableNetwork) -> Callable[[int], None]:
        """Raises `DoesNotFit` where there is no room for so many numbers."""

        def admit(num_values: int) -> None:
            needed = num_values * (_FILE_BYTES + network.policy.dtype.itemsize)
            free = available_bytes(network.policy.device)
            if needed > free:
                raise DoesNotFit(
                    f"{path}: the adapter needs {in_gb(needed)}, {network.policy.device.type} has "
                    f"{in_gb(free)} free; unload another one, or train it with a smaller rank"
                )

        return admit


def _end_ids(path: Path, special_ids: Mapping[str, int]) -> tuple[int, ...]:
    """What the record beside an adapter says that its texts ended with."""
    text = training_record(path).get("ends_with")
    if text is None:
        return ()
    if not isinstance(text, str) or text not in special_ids:
        known = ", ".join(list(special_ids)[:8]) or "none"
        raise ModelLoadError(
            f"{path}/{TRAINING_RECORD}: ends_with is {reprlib.repr(text)}, which is no special "
            f"token of this base; it has {known}; correct it, or take it out where texts ended "
            "without one"
        )
    return (special_ids[text],)


def _fingerprint(adapter: Adapter, head: str, reward: Reward) -> str:
    """Of all that a score depends on beside the base."""
    parts = (adapter.fingerprint, head, reward.template, *map(str, reward.end_ids))
    return f"rm_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
