"""`chatserve list`: what the cache holds, what it is, how large, and how to chat with it."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatserve import cache, config, hub
from chatserve.cli.escapes import one_line
from chatserve.errors import ModelLoadError, UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

if TYPE_CHECKING:
    from chatserve.models.receipt import Receipt
    from chatserve.models.weights_summary import WeightsSummary


@dataclass(frozen=True)
class ListConfig:
    """Settings of `chatserve list`."""

    json: bool = setting(
        False,
        "print JSON: name, revision, num_bytes, path, kind, architecture, num_parameters, dtype, "
        "dtypes, fingerprint, receipt, fault",
    )
    names: bool = setting(
        False, "list the short names that `pull` and `chat` know instead, be they here or not"
    )


def main(argv: list[str]) -> int:
    """Print the cached models on stdout. Raises `UsageError`."""
    parser = CommandParser(
        "chatserve list",
        "List the downloaded models: size, dtype, architecture, fingerprint, receipt, place.",
        ListConfig,
    )
    options = config.build(ListConfig, parser.flags(argv))
    if options.names:
        names = hub.known_names()
        print(json.dumps(names, indent=1) if options.json else "\n".join(names))
        return 0
    rows = [_Row.of(model) for model in hub.cached_models()]
    if options.json:
        print(json.dumps([row.as_json() for row in rows], default=str, indent=1))
        return 0
    if not rows:
        print(f"no models in {cache.models_folder()}; `chatserve pull` fetches {hub.DEFAULT_NAME}")
        return 0
    cells = [row.cells() for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row, texts in zip(rows, cells, strict=True):
        aligned = [text.ljust(width) for text, width in zip(texts, widths, strict=True)]
        print("  ".join([*aligned, one_line(str(row.model.path))]))
        if row.fault:
            print(f"  damaged: {one_line(row.fault)}")
    whole = [row.model for row in rows if row.model.kind == "model" and not row.fault]
    if hint := next(filter(None, map(_hint, whole)), None):
        print(f"chat with one: {hint}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class _Row:
    """A cached model and what its headers say, or why they say nothing."""

    model: hub.CachedModel
    summary: WeightsSummary | None
    fault: str | None

    @staticmethod
    def of(model: hub.CachedModel) -> _Row:
        if model.kind != "model":
            return _Row(model, None, None)
        from chatserve.models.weights_summary import summarise

        try:
            return _Row(model, summarise(model.path), None)
        except ModelLoadError as error:
            return _Row(model, None, error.message)

    def cells(self) -> list[str]:
        size = f"{self.model.num_bytes / 1e6:,.1f} MB".rjust(13)
        if self.model.kind != "model":
            return [_title(self.model), size, self.model.kind, *["-"] * 4]
        if self.summary is None:
            return [_title(self.model), size, *["?"] * 5]
        about = self.summary
        return [
            _title(self.model),
            size,
            about.dtype,
            one_line(about.architecture),
            f"{about.num_parameters / 1e6:,.0f}M",
            about.fingerprint,
            _receipt(about.receipt),
        ]

    def as_json(self) -> dict[str, Any]:
        about = self.summary
        known = {"dtype": about.dtype, **dataclasses.asdict(about)} if about else {}
        names = (
            "architecture", "num_parameters", "dtype", "dtypes", "fingerprint",
        )  # fmt: skip
        return {
            **dataclasses.asdict(self.model),
            **{name: known.get(name) for name in names},
            "receipt": about.receipt.as_json() if about and about.receipt else None,
            "fault": self.fault,
        }


def _receipt(receipt: Receipt | None) -> str:
    """Each form and its mean KL divergence, where that still holds."""
    if receipt is None:
        return "no receipt"
    if not receipt.is_current:
        return "old receipt"
    forms = [f"{each.form.name} KL {each.mean_kl:.4f}" for each in receipt.measurements]
    return one_line(", ".join(forms))


def _title(model: hub.CachedModel) -> str:
    is_plain = model.revision == hub.DEFAULT_REVISION
    return model.name if is_plain else f"{model.name} ({model.revision})"


def _hint(model: hub.CachedModel) -> str | None:
    """The command to chat with it; None for a base, which nobody knows how to ask."""
    from chatserve.cli.commands.template import open_tokenizer
    from chatserve.models.chat_template import choose_template

    try:
        choose_template(None, *open_tokenizer(model.path))
    except (UsageError, ModelLoadError):
        return None
    return f"chatserve chat {_argument(model)}"


def _argument(model: hub.CachedModel) -> str:
    is_plain = model.revision == hub.DEFAULT_REVISION
    return model.name if is_plain else f"{model.name} --revision {model.revision}"
