"""Settings: one field, four sources, one precedence; and what is set for libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatserve import environment
from chatserve.config import (
    COMMAND_CONFIGS,
    ControllerConfig,
    ServeConfig,
    adapted_name,
    build,
    sources,
    split_adapters,
)
from chatserve.errors import UsageError
from chatserve.flags import CommandParser
from chatserve.settings import fields_of


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, "utf-8")
    return path


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "heartbeat_expiry_s = 2")
    fastchat = {"FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION": "9"}
    environ = {"CHATSERVE_HEARTBEAT_EXPIRY_S": "3", **fastchat}

    def expiry_s(flags: dict[str, float], **options: Any) -> float:
        return build(ControllerConfig, flags, **options).heartbeat_expiry_s

    assert expiry_s({}, environ={}) == 10
    assert expiry_s({}, file=file, environ={}) == 2
    assert expiry_s({}, file=file, environ=environ) == 3
    assert expiry_s({"heartbeat_expiry_s": 4}, file=file, environ=environ) == 4
    assert expiry_s({}, environ=fastchat) == 9


def test_every_value_names_its_source(tmp_path: Path) -> None:
    file = write(tmp_path, 'allow_host = ["x", "y"]')
    environ = {"CHATSERVE_INSECURE_NO_AUTH": "yes"}
    found = sources(ControllerConfig, {"host": "b"}, file=file, environ=environ)
    assert found["allow_host"] == (("x", "y"), str(file))
    assert found["insecure_no_auth"] == (True, "CHATSERVE_INSECURE_NO_AUTH")
    assert found["host"] == ("b", "flag")
    assert found["port"] == (8000, "default")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CHATSERVE_SEED": "many"}, "CHATSERVE_SEED: 'many' is not a valid int"),
        ({"CHATSERVE_LOAD_8BIT": "maybe"}, "CHATSERVE_LOAD_8BIT: 'maybe'"),
        ({"CHATSERVE_DEVICE": "c"}, "'c' is not one of auto, cpu"),
    ],
)
def test_a_bad_value_names_its_source(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(ServeConfig, {}, environ=environ)


def test_paths_that_may_be_repeated_keep_their_commas(tmp_path: Path) -> None:
    parser = CommandParser("chatserve", "", ServeConfig)
    flags = parser.flags(["--adapter", "a,b", "--adapter=c"])
    file = write(tmp_path, 'adapter = ["d,e", "f"]')
    environ = {"CHATSERVE_ADAPTER": os.pathsep.join(("g,h", "i"))}
    assert build(ServeConfig, flags, file=file, environ=environ).adapter == ("a,b", "c")
    assert build(ServeConfig, {}, file=file, environ=environ).adapter == ("g,h", "i")
    assert build(ServeConfig, {}, file=file, environ={}).adapter == ("d,e", "f")
    one = write(tmp_path, 'adapter = "d"')
    assert build(ServeConfig, {}, file=one, environ={}).adapter == ("d",)
    assert build(ServeConfig, {}, environ={}).adapter == ()


INT64 = 2**63
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "port": ([0, 65535], [-1, 65536]),
    "num_gpus": ([1, 64], [0, 65]),
    "max_num_seqs": ([1, 4096], [0, 4097]),
    "max_connections": ([8, 65536], [7, 65537]),
    "max_num_batched_tokens": ([1, 65536], [0, 65537]),
    "max_num_waiting": ([1, 65536], [0, 65537]),
    "max_num_seqs_per_key": ([1, 65536], [0, 65537]),
    "context_length": ([1], [0, -1]),
    "seed": ([-INT64, INT64 - 1], [-INT64 - 1, INT64]),
    "heartbeat_interval_s": ([0.05, 3600.0], [0.04, 3601.0, -1.0, "nan", "inf"]),
    "heartbeat_expiry_s": ([0.1, 86400.0], [0.09, 86401.0, "nan", "-inf"]),
    "stall_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "resume_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "load_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "queue_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "first_token_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "token_gap_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "request_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "write_timeout_s": ([0.0, 86400.0], [-1.0, 86401.0, "nan", "inf"]),
    "drain_timeout_s": ([0.0, 3600.0], [-1.0, 3601.0, "nan", "inf"]),
    "temperature": ([0.0, 2.0], [-0.1, 2.1, "nan", "inf"]),
    "top_p": ([0.001, 1.0], [0.0, 1.1, "nan"]),
    "repetition_penalty": ([0.01, 2.0], [0.0, 10.1, "nan", "inf"]),
    "max_new_tokens": ([1, 10**400], [0, -1]),
}
"""By setting: values that are just in its range, and values that are not."""
NUMBERS = [
    (command, item.name)
    for command, config in COMMAND_CONFIGS.items()
    for item in fields_of(config)
    if item.metadata["flag"] and str(item.type).partition(" ")[0] in ("int", "float")
]


@pytest.mark.parametrize(("command", "name"), NUMBERS)
def test_a_number_has_a_range_in_environment_and_file(
    tmp_path: Path, command: str, name: str
) -> None:
    config, variable = COMMAND_CONFIGS[command], f"CHATSERVE_{name.upper()}"
    inside, outside = RANGES[name]
    for value in inside:
        file = write(tmp_path, f"{name} = {value}")
        assert getattr(build(config, {}, environ={variable: str(value)}), name) == value
        assert getattr(build(config, {}, file=file, environ={}), name) == value
    for value in outside:
        told = f"{value} is out of range: it must be "
        with pytest.raises(UsageError, match=f"^{variable}: {told}") as caught:
            build(config, {}, environ={variable: str(value)})
        assert caught.value.exit_code == 2
        with pytest.raises(UsageError, match=rf"config\.toml: {name}: {told}"):
            build(config, {}, file=write(tmp_path, f"{name} = {value}"), environ={})


@pytest.mark.parametrize(("command", "name"), NUMBERS)
def test_a_number_has_a_range_on_the_command_line(command: str, name: str) -> None:
    parser = CommandParser("chatserve", "", COMMAND_CONFIGS[command])
    flag = "--" + name.replace("_", "-")
    inside, outside = RANGES[name]
    for value in inside:
        assert parser.flags([f"{flag}={value}"]) == {name: value}
    for value in outside:
        with pytest.raises(UsageError) as caught:
            parser.flags([f"{flag}={value}"])
        assert flag in caught.value.message
        assert f"{value} is out of range: it must be " in caught.value.message
        assert caught.value.exit_code == 2


def test_an_exclusive_bound_says_so() -> None:
    with pytest.raises(UsageError, match=r"0\.0 is out of range: it must be over 0 and at most 1"):
        build(COMMAND_CONFIGS["chat"], {}, environ={"CHATSERVE_TOP_P": "0"})


@pytest.mark.parametrize("value", ["true", "1.5", "inf", "nan"])
def test_a_whole_number_in_a_file_is_one(tmp_path: Path, value: str) -> None:
    with pytest.raises(UsageError, match=r"port: .* is not a valid int"):
        build(ControllerConfig, {}, file=write(tmp_path, f"port = {value}"), environ={})


@pytest.mark.parametrize("text", ["port = ", "port = 'x'", "unknown = 1"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"config\.toml"):
        build(ControllerConfig, {}, file=write(tmp_path, text), environ={})


def test_keys_come_from_file_and_environment_without_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# laptops\nkey-a\n\n key-b \n", "utf-8")
    monkeypatch.setenv("CHATSERVE_API_KEYS", "key-c, key-d,")
    assert set(environment.api_keys(str(file))) == {"key-a", "key-b", "key-c", "key-d"}
    with pytest.raises(UsageError, match="no-such-file"):
        environment.api_keys(str(tmp_path / "no-such-file"))


@pytest.mark.parametrize(("before", "after"), [(None, "10000"), ("7", "7")])
def test_a_worker_limits_spinning_unless_the_user_has(before: str | None, after: str) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    if before is not None:
        environ["GOMP_SPINCOUNT"] = before
    # what the worker does before its engine, and torch with it, comes in
    code = (
        "import os, sys, types\n"
        "fake = types.ModuleType('chatserve.engine.serving')\n"
        "fake.load = lambda *_: sys.exit(print(os.environ['GOMP_SPINCOUNT']))\n"
        "sys.modules['chatserve.engine.serving'] = fake\n"
        "from chatserve.config import WorkerConfig\n"
        "from chatserve.server.worker_process import load_engine\n"
        "assert 'torch' not in sys.modules\n"
        "load_engine(WorkerConfig(weights='none'), None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == after


def test_adapters_with_a_name_are_served_beside_the_base(tmp_path: Path) -> None:
    values = ("sft", "sql=a/b", "./x=y", "/abs/x=y", "~/rl", "v1.2_b-c=rel")
    assert split_adapters(values) == (
        [Path("sft"), Path("./x=y"), Path("/abs/x=y"), Path.home() / "rl"],
        {"sql": Path("a/b"), "v1.2_b-c": Path("rel")},
    )
    assert adapted_name("base", "sql") == "base:sql"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (["a b=x"], "--adapter a b=x: NAME=PATH wants a name"), (["=x"], "wants a name"),
        (["a:b=x"], "wants a name"), (["x" * 65 + "=y"], "wants a name"), (["sql="], "a folder"),
        (["sql=a", "sql=b"], "two adapters would be called sql"),
        ([f"a{i}=x" for i in range(65)], "65 adapters have a name, the limit is 64"),
    ],
    ids=str,
)  # fmt: skip
def test_adapters_that_cannot_be_named(values: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        split_adapters(values)
