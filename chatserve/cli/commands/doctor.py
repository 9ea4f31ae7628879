"""`chatserve doctor [WEIGHTS]`: what chatserve finds on this machine, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatserve import config, environment
from chatserve.config import ServeConfig
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.options import ModelOptions
from chatserve.settings import setting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chatserve.doctor.finding import Finding


@dataclass(frozen=True)
class DoctorConfig(ModelOptions):
    """Settings of `chatserve doctor`."""

    json: bool = setting(False, "print JSON: a status and the findings", group="doctor")
    debug: bool = setting(False, "show tracebacks", group="doctor")
    online: bool = setting(
        False, "ask the model hub, and fetch WEIGHTS that are not in the cache", group="doctor"
    )


def main(argv: list[str]) -> int:
    """Print the findings on stdout; 1 when one of them is a failure. Raises `UsageError`."""
    parser = CommandParser(
        "chatserve doctor",
        "Look at devices, kernels, memory, settings and cache, and at the speed of a model.",
        DoctorConfig,
    )
    parser.add_argument(
        "weights", nargs="?", metavar="WEIGHTS",
        help="folder, .gguf file or name; default: the default model if it is in the cache",
    )  # fmt: skip
    flags = parser.flags(argv)
    weights = flags.pop("weights", None)
    file = environment.settings_file()
    options = config.build(DoctorConfig, flags, file=file)
    if options.online and options.offline:
        raise UsageError("--online and --offline exclude each other; choose one")
    options = dataclasses.replace(options, offline=not options.online)
    serve = config.build(ServeConfig, {}, file=file)

    from chatserve.doctor.finding import worst

    findings = []
    for finding in _examine(weights, options, serve):
        findings.append(finding)
        if not options.json:
            _print(finding)
    status = worst(findings)
    if options.json:
        found = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"status": status, "findings": found}, indent=1, default=str))
    else:
        _print_sum(findings)
    return 1 if status == "fail" else 0


def _examine(weights: str | None, options: DoctorConfig, serve: ServeConfig) -> Iterator[Finding]:
    """Each finding as soon as it is there."""
    from chatserve.doctor.setup import check_setup

    yield from check_setup(serve, is_online=options.online)

    from chatserve.doctor.software import check_software

    software = check_software()
    yield from software
    if software[0].status != "fail":  # without torch nothing else can be looked at
        yield from _examine_machine(weights, options)


def _examine_machine(weights: str | None, options: DoctorConfig) -> Iterator[Finding]:
    from chatserve.doctor import machine

    yield from machine.check_devices()
    yield machine.check_load()
    policy, findings = machine.check_operators(options)
    yield from findings
    if policy is None:
        return
    yield machine.check_memory(policy.device)

    from chatserve import hub
    from chatserve.doctor.finding import Finding
    from chatserve.doctor.speed import check_speed, try_model

    decode = None
    if weights is None and not any(m.name == hub.DEFAULT_NAME for m in hub.cached_models()):
        text = "no model was tried: none is given, and the default model is not in the cache"
        yield Finding("weights", "ok", f"{text}; `chatserve pull` fetches it")
    else:
        decode, findings = try_model(weights or hub.DEFAULT_NAME, options)
        yield from findings
    # after the model: both then see the same neighbours
    per_token = decode.weights.read_per_token if decode else None
    bandwidth, finding = machine.check_bandwidth(policy.device, per_token)
    yield finding
    if decode is not None:
        yield check_speed(decode, bandwidth)


def _print(finding: Finding) -> None:
    from chatserve.cli.escapes import one_line

    print(f"{finding.status:<4}  {finding.name}: {one_line(finding.text)}", flush=True)
    if finding.way_out:
        print(f"      → {one_line(finding.way_out)}", flush=True)


def _print_sum(findings: Sequence[Finding]) -> None:
    counts = {status: 0 for status in ("ok", "warn", "fail")}
    for finding in findings:
        counts[finding.status] += 1
    print(", ".join(f"{number} {status}" for status, number in counts.items()))
