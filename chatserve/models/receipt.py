"""What a model loses by being compressed, as `chatserve quality` has measured it: the file format.

The one owner of `quality.json`: who measures writes it here; who lists, loads or serves reads it
here. It lies beside the weights, or, where nothing can be written there, in the cache under the
weights' fingerprint. Knows no network and no arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chatserve
from chatserve import environment
from chatserve.errors import CannotWrite, ModelLoadError
from chatserve.models.form import Form
from chatserve.models.weight_files import read_json

RECEIPT_NAME = "quality.json"
PLOT_NAME = "quality.svg"
FORMAT = 1
"""Raised when a field changes its meaning; receipts of another format are not read."""
ROUNDING = 1
"""Raised when the same weights would be packed to other values, so that old receipts go stale."""
NUM_QUANTILES = 100


@dataclass(frozen=True)
class MeasuredForm:
    """What is compared with the reference: how weights and activations are held while serving.

    `name` is short and unique among the forms of a receipt. All levels of the CPU kernels compute
    the same, so it does not say which.
    """

    name: str
    device: str
    dtype: str
    on_kernels: bool
    rounding: int

    @staticmethod
    def of(form: Form) -> MeasuredForm:
        packing = form.packing
        name = form.dtype_name if packing is None else str(packing)
        if packing is not None and packing.activation_bits != 8:
            name += f" a{packing.activation_bits}"
        return MeasuredForm(name, form.kind, form.dtype_name, form.on_kernels, ROUNDING)


@dataclass(frozen=True)
class LayerError:
    """How far one layer strays. Both are relative, mean over positions.

    `added`: of what the layer adds to its input, given the reference's input. `drift`: of what
    has become of the text after it, all layers before it compressed, too.
    """

    layer: int
    added: float
    drift: float


@dataclass(frozen=True)
class Measurement:
    """One form against the reference. KL divergences in nats; `quantiles` of them, 0 to 1."""

    form: MeasuredForm
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    top1_error: float
    perplexity: float
    quantiles: tuple[float, ...]
    layers: tuple[LayerError, ...]

    @property
    def worst_layers(self) -> tuple[LayerError, ...]:
        """Up to three, worst first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.added)[:3])

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.form.name}: mean KL {self.mean_kl:.4f}, p99 {self.p99_kl:.3f}, same top token "
            f"{self.top1_agreement:.1%}, perplexity {self.perplexity:.3f}"
        )


@dataclass(frozen=True)
class Text:
    """What was read. `sha256`: of the token ids, so that another tokenizer is another text."""

    name: str
    sha256: str
    num_positions: int
    window: int


@dataclass(frozen=True)
class Receipt:
    """All forms of one model that were measured on the same text by the same chatserve."""

    fingerprint: str
    version: str
    text: Text
    reference: str
    reference_perplexity: float
    measured_at: str
    measurements: tuple[Measurement, ...]

    def joined(self, older: Receipt | None) -> Receipt:
        """This one and the forms that `older` has beside it, if they are comparable."""
        if older is None or older._comparable() != self._comparable():
            return self
        mine = {each.form for each in self.measurements}
        kept = tuple(
            each
            for each in older.measurements
            if each.form not in mine and each.form.rounding == ROUNDING
        )
        return dataclasses.replace(self, measurements=(*kept, *self.measurements))

    def of_form(self, form: MeasuredForm) -> Measurement | None:
        """The figures that hold for weights served in `form` by this chatserve."""
        if self.version != chatserve.__version__:
            return None
        return next((each for each in self.measurements if each.form == form), None)

    @property
    def is_current(self) -> bool:
        """Whether this chatserve would still compute what was measured."""
        return self.version == chatserve.__version__ and all(
            each.form.rounding == ROUNDING for each in self.measurements
        )

    def _comparable(self) -> tuple[Any, ...]:
        return (self.fingerprint, self.version, self.text, self.reference)

    def as_json(self) -> dict[str, Any]:
        table = {"format": FORMAT, **dataclasses.asdict(self)}
        for row, each in zip(table["measurements"], self.measurements, strict=True):
            row["worst_layers"] = [layer.layer for layer in each.worst_layers]
        return table


def receipt_of(table: Mapping[str, Any]) -> Receipt | None:
    """The receipt that was a table by `as_json`; None when it is damaged or of another format."""
    try:
        if table["format"] != FORMAT:
            return None
        receipt = Receipt(
            fingerprint=_text(table["fingerprint"]),
            version=_text(table["version"]),
            text=Text(
                _text(table["text"]["name"]), _text(table["text"]["sha256"]),
                int(table["text"]["num_positions"]), int(table["text"]["window"]),
            ),
            reference=_text(table["reference"]),
            reference_perplexity=_number(table["reference_perplexity"]),
            measured_at=_text(table["measured_at"]),
            measurements=tuple(_measurement(each) for each in table["measurements"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return receipt if receipt.measurements else None


def read_receipt(path: Path, fingerprint: str) -> Receipt | None:
    """The receipt of the weights at `path`; None without one, or where it is of other weights."""
    for folder in _places(path, fingerprint):
        try:
            receipt = receipt_of(read_json(folder, RECEIPT_NAME))
        except ModelLoadError:
            continue
        if receipt is not None and receipt.fingerprint == fingerprint:
            return receipt
    return None


def write_receipt(path: Path, receipt: Receipt, plot: str) -> Path:
    """Store receipt and plot for the weights at `path`, and return their folder.

    What was there is replaced at once or not at all. Raises `CannotWrite`.
    """
    *places, last = _places(path, receipt.fingerprint)
    for folder in places:
        with contextlib.suppress(OSError):
            _write(folder, receipt, plot)
            return folder
    try:
        last.mkdir(parents=True, exist_ok=True)
        _write(last, receipt, plot)
    except OSError as error:
        raise CannotWrite(
            f"cannot write the receipt to {last} ({error.strerror or error}); free some space or "
            "set CHATSERVE_HOME to another folder"
        ) from error
    return last


def _places(path: Path, fingerprint: str) -> Iterator[Path]:
    """Where a receipt may lie: beside the weights of a folder, and in the cache.

    A `.gguf` file has no folder of its own: its neighbours may be other models.
    """
    if path.is_dir():
        yield path
    yield environment.home() / "receipts" / fingerprint


def _write(folder: Path, receipt: Receipt, plot: str) -> None:
    # the plot first: it shows less than the receipt, and never more than what is true
    _replace(folder / PLOT_NAME, plot)
    _replace(folder / RECEIPT_NAME, json.dumps(receipt.as_json(), indent=1))


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # as other files; mkstemp's are private
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _measurement(table: Mapping[str, Any]) -> Measurement:
    form = table["form"]
    if len(table["quantiles"]) != NUM_QUANTILES + 1:
        raise ValueError("other quantiles")
    return Measurement(
        form=MeasuredForm(
            _text(form["name"]), _text(form["device"]), _text(form["dtype"]),
            bool(form["on_kernels"]), int(form["rounding"]),
        ),
        quantiles=tuple(_number(each) for each in table["quantiles"]),
        layers=tuple(
            LayerError(int(each["layer"]), _number(each["added"]), _number(each["drift"]))
            for each in table["layers"]
        ),
        **{name: _number(table[name]) for name in (
            "mean_kl", "p99_kl", "top1_agreement", "top1_error", "perplexity",
        )},
    )  # fmt: skip


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError("no text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no finite number")
    return float(value)
