"""`chatserve plan WEIGHTS`: whether a model fits, and in which form, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatserve import config
from chatserve.cli.commands.plan_table import Place, Row, as_json, in_words, show, why
from chatserve.errors import DoesNotFit, ModelLoadError, UsageError
from chatserve.flags import CommandParser
from chatserve.settings import setting

if TYPE_CHECKING:
    from chatserve.models.checkpoint import Checkpoint
    from chatserve.models.form import PlainForm
    from chatserve.models.packing import Packing
    from chatserve.models.spread import Room


@dataclass(frozen=True)
class PlanConfig:
    """Settings of `chatserve plan`."""

    context: int | None = setting(
        None, "tokens of a sequence; default: all that the model holds",
        flags=("--context-length",), metavar="N", ge=1,
    )  # fmt: skip
    concurrency: int = setting(
        1, "sequences at once, as a worker's --max-num-seqs", flags=("--max-num-seqs",),
        metavar="M", ge=1, le=4096,
    )  # fmt: skip
    memory: tuple[str, ...] = setting(
        (), "plan for so much instead of what is free here, as in 16GB or 8GB,24GiB",
        metavar="SIZE,…",
    )  # fmt: skip
    device: str = setting(
        "auto", "plan for this kind; default: all that are here",
        choices=("auto", "cpu", "cuda", "mps"),
    )  # fmt: skip
    adapter: tuple[str, ...] = setting(
        (), "LoRA adapters as a worker's --adapter: those with a name take memory of their own",
        metavar="PATH", repeated=True,
    )  # fmt: skip
    num_gpus: int | None = setting(
        None, "spread the model over so many GPUs; each has what --memory says", metavar="N",
        ge=1, le=64,
    )  # fmt: skip
    max_gpu_memory: str | None = setting(
        None, "weights on each GPU take at most so much, as in 13GiB", metavar="SIZE"
    )
    cpu_offloading: bool = setting(
        False, "keep layers that no GPU has room for in this machine's main memory"
    )
    train: bool = setting(
        False, "plan `chatserve train sft` by the published recipe instead of serving"
    )
    batch_size: int | None = setting(
        None, "with --train: sequences of a step, instead of the recipe's", ge=1
    )
    max_length: int | None = setting(
        None, "with --train: tokens of a sequence, instead of the recipe's", ge=8
    )
    json: bool = setting(False, "print JSON: bytes of each part in each form on each device")
    revision: str = setting("main", "revision of a hub id")


def main(argv: Sequence[str]) -> int:
    """Print the plan. Raises `DoesNotFit` when no form fits anywhere, other `StartupError`s."""
    parser = CommandParser(
        "chatserve plan",
        "Say before loading how much memory a model takes in each form, and whether it fits. "
        "Reads headers only, and never downloads.",
        PlanConfig,
    )
    parser.add_argument(
        "weights", nargs="?", help="a folder, .gguf file, or the name of a downloaded model"
    )
    flags = parser.flags(argv)
    weights = flags.pop("weights", None)
    options = config.build(PlanConfig, flags)
    sizes = [_parse_memory("--memory", text) for text in options.memory]

    from chatserve import hub
    from chatserve.models.checkpoint import open_checkpoint
    from chatserve.models.planned_weights import has_only_config, plan_from_config

    path = hub.find_here(weights, options.revision)
    is_planned = has_only_config(path)
    checkpoint = plan_from_config(path) if is_planned else open_checkpoint(path, headers_only=True)
    with closing(checkpoint.weights):
        if options.train:
            from chatserve.cli.commands.plan_train import plan_train

            plan_train(
                checkpoint, _places(options, sizes), batch_size=options.batch_size,
                max_length=options.max_length, as_json=options.json,
            )  # fmt: skip
            return 0
        tables = {place: _rows(checkpoint, place, options) for place in _places(options, sizes)}
        if options.json:
            table = as_json(checkpoint, tables)
            print(json.dumps({**table, "is_computed_from_config": is_planned}, indent=1))
        else:
            show(checkpoint, tables)
            if is_planned:
                print("\nno weights here yet: sizes are worked out from config.json")
    if not any(row.fits for rows in tables.values() for row in rows):
        raise DoesNotFit(why(path.name, tables))
    return 0


def _parse_memory(flag: str, text: str) -> int:
    from chatserve.models.memory import parse_size

    num_bytes = parse_size(text)
    if num_bytes is None:
        raise UsageError(f"{flag} {text!r} is no size of memory; write it as 16GB or 24GiB")
    return num_bytes


def _places(options: PlanConfig, sizes: Sequence[int]) -> list[Place]:
    from chatserve.models.hardware import gpu_kinds

    device = options.device
    if (options.num_gpus or 1) > 1 or options.max_gpu_memory or options.cpu_offloading:
        return [_several(options, sizes)]
    if sizes:
        kind = device if device != "auto" else [*gpu_kinds(), "cpu"][0]
        return [Place(f"{in_words(size)} of {kind} memory", kind, size) for size in sizes]
    here = ["cpu"] if device == "cpu" else [*gpu_kinds(), "cpu"]
    if device != "auto" and device not in here:
        raise UsageError(f"no {device} device is here; say how much it has, as in --memory 16GB")
    return [place for kind in here if device in ("auto", kind) for place in _free(kind)]


def _several(options: PlanConfig, sizes: Sequence[int]) -> Place:
    """The GPUs over which a worker with these flags would spread the model."""
    from chatserve.models.hardware import gpu_kinds
    from chatserve.models.memory import available_host_bytes
    from chatserve.models.spread import Room

    if options.device not in ("auto", "cuda"):
        raise UsageError(f"--device {options.device}: models are spread over CUDA devices alone")
    count = options.num_gpus or max(1, len(sizes))
    if not sizes:
        here = _free("cuda") if "cuda" in gpu_kinds() else []
        sizes = [place.memory_bytes for place in here[:count]]
    elif len(sizes) == 1:
        sizes = [sizes[0]] * count
    if len(sizes) < count or not sizes:
        raise UsageError(
            f"{count} CUDA devices are wanted and {len(sizes)} are known; say how much each has, "
            "as in --memory 24GB"
        )
    limit = options.max_gpu_memory
    host_bytes = available_host_bytes() if options.cpu_offloading else 0
    room = Room(
        tuple((f"cuda:{index}", size) for index, size in enumerate(sizes[:count])),
        limit_bytes=_parse_memory("--max-gpu-memory", limit) if limit else None,
        host_bytes=host_bytes,
    )
    name = f"{' + '.join(map(in_words, sizes[:count]))} of cuda memory"
    if host_bytes:
        name += f", {in_words(host_bytes)} of main memory free"
    return Place(name, "cuda", sum(sizes[:count]) + host_bytes, room)


def _free(kind: str) -> list[Place]:
    """What the devices of a kind have free."""
    from chatserve.models import memory

    if kind == "cpu":
        free = memory.available_host_bytes()
        return [Place(f"cpu, {in_words(free)} free", kind, free)]
    import torch

    places: list[Place] = []
    count = torch.cuda.device_count() if kind == "cuda" else 1
    for index in range(count):
        one = torch.device(kind, index) if count > 1 else torch.device(kind)
        free = memory.available_bytes(one)
        places.append(Place(f"{one}, {in_words(free)} free", kind, free))
    return places


def _rows(checkpoint: Checkpoint, place: Place, options: PlanConfig) -> list[Row]:
    from chatserve.models.memory_plan import adapter_bytes, plan_memory

    num_adapted = _adapter_values(checkpoint, options)
    rows: list[Row] = []
    for form, flags in _flags(checkpoint, place.kind).items():
        try:
            held = _form(checkpoint, place.kind, form)
        except (UsageError, ModelLoadError) as error:
            packing = _packing(form, place.kind)
            held_as = str(packing) if packing else ""
            rows.append(Row(form, flags, None, False, error.message, held_as))
            continue
        plan = plan_memory(
            checkpoint, held, context=options.context, concurrency=options.concurrency
        )
        plan = replace(plan, adapter_bytes=adapter_bytes(held, num_adapted))
        if place.room is None:
            rows.append(Row(form, flags, plan, plan.fits(place.memory_bytes)))
        else:
            rows.append(_spread_row(checkpoint, Row(form, flags, plan, False), held, place.room))
    return rows


def _adapter_values(checkpoint: Checkpoint, options: PlanConfig) -> int:
    """How many numbers the adapters have that are served beside the base; merged ones have none.

    Raises `ModelLoadError` for those that do not fit it, `UsageError` beside networks without.
    """
    if not options.adapter:
        return 0
    from chatserve.models.adapter import count_values
    from chatserve.models.config import is_native
    from chatserve.models.form import native_config

    merged, named = config.split_adapters(options.adapter)
    if not is_native(checkpoint.config):
        raise UsageError("--adapter: only the Llama family's networks take adapters")
    network = native_config(checkpoint)
    for path in merged:
        count_values(path, network)
    return sum(count_values(path, network) for path in named.values())


def _spread_row(checkpoint: Checkpoint, row: Row, held: PlainForm, room: Room) -> Row:
    from chatserve.models.config import is_native
    from chatserve.models.form import native_config
    from chatserve.models.memory_plan import part_bytes
    from chatserve.models.spread import spread

    assert row.plan is not None
    if not is_native(checkpoint.config):
        raise UsageError("only the Llama family's networks are spread over several devices")
    # on each: the driver's own, and its share of the adapters
    taken = row.plan.process_bytes + row.plan.adapter_bytes // len(room.gpus)
    left = replace(room, gpus=tuple((name, size - taken) for name, size in room.gpus))
    device_map = spread(checkpoint, held, row.plan, left, row.plan.num_kv_tokens)
    if device_map is None:
        return row
    network = native_config(checkpoint)
    num_bytes = device_map.bytes_by_home(part_bytes(network, held), is_tied=network.is_tied)
    return replace(row, fits=True, device_map=device_map.describe(), device_bytes=num_bytes)


def _flags(checkpoint: Checkpoint, kind: str) -> dict[str, str]:
    """The forms that a worker can hold the weights in, and what asks for each."""
    flags = {"half": "", "8-bit": "--load-8bit", "4-bit": "--load-4bit"}
    if kind != "cpu":
        return flags
    usual = _form(checkpoint, kind, "file")
    if usual.packing:
        return {"file": "", **flags, "half": "--dtype bfloat16"}
    return flags if usual.dtype_name == "bfloat16" else {**flags, "half": "--dtype bfloat16"}


def _form(checkpoint: Checkpoint, kind: str, form: str) -> PlainForm:
    """How a worker would hold the weights; "file": without any flag. The device need not be here.

    Raises `UsageError` or `ModelLoadError` where it would refuse them.
    """
    from chatserve.models.config import is_native
    from chatserve.models.form import form_on_cpu, form_on_gpu

    packing = _packing(form, kind)
    if form == "4-bit" and not is_native(checkpoint.config):
        raise UsageError("only the Llama family's weights are packed in 4 bits")
    if kind == "cpu":
        return form_on_cpu(checkpoint, "bfloat16" if form == "half" else None, packing)
    return form_on_gpu(checkpoint, kind, packing)


def _packing(form: str, kind: str) -> Packing | None:
    from chatserve.models.packing import Packing, four_bits

    return {"8-bit": Packing(), "4-bit": four_bits(kind)}.get(form)
