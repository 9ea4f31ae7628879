"""`chatserve quality WEIGHTS`: what compression costs, measured and kept as a receipt."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatserve import config, hub
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.options import DTYPES
from chatserve.settings import setting

if TYPE_CHECKING:
    from chatserve.models.device import DevicePolicy
    from chatserve.quality.assess import Assessment


@dataclass(frozen=True)
class QualityConfig:
    """Settings of `chatserve quality`."""

    load_8bit: bool = setting(False, "measure packed int8")
    load_4bit: bool = setting(False, "measure packed int4; with --load-8bit: both in one go (CPU)")
    quant_group: str | None = setting(
        None, "with --load-8bit: a scale per 32 weights, and 16-bit activations (CPU)",
        choices=("32",),
    )  # fmt: skip
    text: str | None = setting(
        None, "read this UTF-8 file instead of the shipped texts", metavar="FILE"
    )
    tokens: int = setting(4096, "read no more than so many tokens", metavar="N", ge=128, le=1 << 16)
    json: bool = setting(False, "print the receipt as JSON")
    device: str = setting("auto", "where the model runs", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = setting("auto", "of what is not packed", choices=DTYPES)
    revision: str = setting("main", "revision of a hub id")
    offline: bool = setting(False, "never touch the network")
    debug: bool = setting(False, "show tracebacks")


def main(argv: list[str]) -> int:
    """Print the figures on stdout and store them. Raises `StartupError`."""
    parser = CommandParser(
        "chatserve quality",
        "Measure how far compressed weights stray from full precision: KL divergence, same top "
        "token, perplexity, worst layers. One layer is in memory at a time. The figures are kept "
        "beside the weights (quality.json, quality.svg) and shown when they are served. Without "
        "--load-8bit or --load-4bit: the form in which the weights are served without them.",
        QualityConfig,
    )
    parser.add_argument(
        "weights", nargs="?", default=config.DEFAULT_WEIGHTS, metavar="WEIGHTS",
        help=f"folder, .gguf file, alias or hub id; default: {config.DEFAULT_WEIGHTS}",
    )  # fmt: skip
    flags = parser.flags(argv)
    weights = flags.pop("weights")
    options = config.build(QualityConfig, flags)
    if options.quant_group and not options.load_8bit:
        raise UsageError("--quant-group is a finer form of --load-8bit; give both")
    path = hub.resolve_weights(weights, revision=options.revision, offline=options.offline)

    from chatserve.byte_bar import ByteBar
    from chatserve.models.receipt import PLOT_NAME, RECEIPT_NAME, write_receipt
    from chatserve.quality.assess import Question, assess
    from chatserve.quality.plot import draw

    question = Question(
        path=path,
        policies=_policies(options),
        dtype=options.dtype,
        text=Path(options.text).expanduser() if options.text else None,
        num_tokens=options.tokens,
    )
    name = config.served_names(weights)[0]
    with ByteBar(f"measuring {name}", sys.stderr) as bar:
        found = assess(question, bar)
    folder = write_receipt(path, found.receipt, draw(found.receipt, name))
    if options.json:
        table = {**found.receipt.as_json(), "measured": found.measured, "folder": str(folder)}
        print(json.dumps(table, indent=1))
    else:
        _print(name, found)
        print(f"kept as {folder / RECEIPT_NAME} and {PLOT_NAME}", file=sys.stderr)
    return 0


def _policies(options: QualityConfig) -> list[DevicePolicy]:
    from chatserve.models.device import choose_policy

    device, dtype = options.device, options.dtype
    policies = []
    if options.load_8bit:
        group = options.quant_group
        policies.append(choose_policy(device, dtype, load_8bit=True, quant_group=group))
    if options.load_4bit:
        policies.append(choose_policy(device, dtype, load_4bit=True))
    return policies or [choose_policy(device, dtype)]


def _print(name: str, found: Assessment) -> None:
    from chatserve.cli.escapes import one_line

    receipt = found.receipt
    text = receipt.text
    left = f" ({found.num_left:,} more were not read)" if found.num_left else ""
    print(
        one_line(
            f"{name} against {receipt.reference}, {text.num_positions:,} tokens of "
            f"{text.name} text{left}"
        )
    )
    header = ("form", "mean KL", "p99 KL", "same top token", "perplexity")
    rows = [header]
    for each in receipt.measurements:
        top = f"{each.top1_agreement:.1%} ± {each.top1_error:.1%}"
        figures = f"{each.mean_kl:.4f}", f"{each.p99_kl:.4f}", top, f"{each.perplexity:.3f}"
        rows.append((each.form.name, *figures))
    rows.append(("reference", "", "", "", f"{receipt.reference_perplexity:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    for each in receipt.measurements:
        worst = ", ".join(f"{layer.layer} ({layer.added:.2%})" for layer in each.worst_layers)
        print(f"worst layers of {each.form.name}, by error in what they add: {worst}")
