"""Command lines: mistakes are one line with the way out; what is unsupported is refused by name."""

from __future__ import annotations

import pytest

from chatserve.config import (
    ChatConfig,
    ServeConfig,
    WorkerConfig,
)
from chatserve.errors import UsageError
from chatserve.flags import REFUSED_FLAGS, CommandParser
from chatserve.options import EngineConfig, ModelOptions
from chatserve.settings import flags_of


def flags(*argv: str) -> dict[str, object]:
    return CommandParser("chatserve chat", "", ChatConfig).flags(argv)


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        flags(*argv)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_only_given_flags_are_returned() -> None:
    assert flags() == {}
    assert flags("--load-8bit", "-p", "hi") == {"load_8bit": True, "prompt": "hi"}


def test_what_is_on_by_default_can_be_switched_off_and_on() -> None:
    parser = CommandParser("x", "", WorkerConfig)
    assert parser.flags(["--no-speculation"]) == {"speculation": False}
    assert parser.flags(["--speculation"]) == {"speculation": True}
    # the child inherits the environment that the parent's flag has overruled
    assert "--speculation" in flags_of(WorkerConfig(), EngineConfig)
    assert "--no-speculation" in flags_of(WorkerConfig(speculation=False), EngineConfig)


def test_a_repeated_flag_is_repeated_for_the_child() -> None:
    config = WorkerConfig(adapter=("a,b", "c"))
    assert [flag for flag in flags_of(config, ModelOptions) if "adapter" in flag] == [
        "--adapter=a,b", "--adapter=c",
    ]  # fmt: skip
    assert not [flag for flag in flags_of(WorkerConfig(), ModelOptions) if "adapter" in flag]


def test_fastchats_spellings_and_abbreviations() -> None:
    assert flags("--model-name", "w") == flags("--model-path", "w") == {"model": "w"}
    assert flags("--repetition_penalty", "1.1") == {"repetition_penalty": 1.1}
    assert flags("--max-new", "5", "--temp", "0") == {"max_new_tokens": 5, "temperature": 0.0}
    assert flags("--num-gpus", "2", "--gpus", "0,2", "--max-gpu-memory", "13Gib") == {
        "num_gpus": 2, "gpus": "0,2", "max_gpu_memory": "13Gib",
    }  # fmt: skip


def test_an_unknown_flag_names_the_nearest() -> None:
    assert refusal("--load-8bits") == (
        "unknown flag --load-8bits; did you mean --load-8bit? "
        "`chatserve chat --help` lists the flags"
    )
    assert "did you mean" not in refusal("--zzzzzz")
    assert refusal("--zzzzzz=secret").startswith("unknown flag --zzzzzz;")


def test_wrong_values_are_told_in_one_line() -> None:
    assert "--temperature: invalid float value: 'hot'" in refusal("--temperature", "hot")
    assert "expected one argument" in refusal("--device")
    assert "invalid choice: 'tpu'" in refusal("--device", "tpu")
    assert "could match" in refusal("--no", "x")
    assert "unexpected argument 'extra'" in refusal("extra")


@pytest.mark.parametrize("name", REFUSED_FLAGS)
def test_fastchats_unsupported_flags_are_refused_by_name_with_a_reason(name: str) -> None:
    for argv in ([name], [name, "value"], [f"{name}=value"]):
        message = refusal(*argv)
        assert message == f"{name} is not supported: {REFUSED_FLAGS[name]}"
        assert "value" not in message.replace(REFUSED_FLAGS[name], "")


def test_secrets_on_the_command_line_are_refused_without_repeating_them() -> None:
    message = refusal("--api-keys", "sk-canary")
    assert "canary" not in message
    assert "CHATSERVE_API_KEYS" in message
    assert "CHATSERVE_CONTROL_TOKEN" in refusal("--control-token=canary")


def test_devices_without_kernels_are_refused_with_a_reason() -> None:
    assert refusal("--device", "xpu").startswith("xpu is not supported: there are no kernels")
    assert refusal("--device", "npu").startswith("npu is not supported: there are no kernels")


def test_other_commands_refuse_them_too() -> None:
    with pytest.raises(UsageError, match="--gptq-ckpt is not supported"):
        CommandParser("chatserve serve", "", ServeConfig).flags(["--gptq-ckpt", "x"])
