"""The whole chain on real weights: client, controller, worker, engine; and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest

from tests import tiny
from tests.processes import assert_gone, descendants, environment, run_chatserve
from tests.weights import default_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save_model(folder)
    return folder


@contextmanager
def serving(*arguments: str | Path, **variables: str) -> Iterator[tuple[psutil.Popen, str]]:
    """`chatserve serve` until its line `ready: URL`; killed at the end if it still runs."""
    process = psutil.Popen(
        [sys.executable, "-m", "chatserve", "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment(**variables),
    )  # fmt: skip
    try:
        for line in process.stdout:
            if match := re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+/v1) \(.*\)\n", line):
                yield process, match[1]
                return
        raise AssertionError(f"the server ended with {process.wait()}")
    finally:
        children = descendants(process.pid) if process.is_running() else []
        for item in [process, *children]:
            if item.is_running():
                item.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.weights
def test_the_default_model_answers_once_on_stdout() -> None:
    default_model()
    result = run_chatserve("chat", "-p", "What is 2+2?", "--max-new-tokens", "24")
    assert (result.returncode, result.stderr) == (0, "")
    assert "4" in result.stdout and result.stdout.endswith("\n")
    assert "\x1b" not in result.stdout


@pytest.mark.weights
def test_a_pipe_is_answered_once_and_8_bits_too() -> None:
    default_model()
    result = run_chatserve(
        "chat", "--load-8bit", "--max-new-tokens", "5", stdin="Tell me a long story."
    )
    assert result.returncode == 0
    assert len(result.stdout.split()) >= 3
    # an answer cut by the limit says so, apart from the answer
    assert "--max-new-tokens 5" in result.stderr


def test_a_folder_of_ones_own_in_8_bits(tiny_model: Path, tmp_path: Path) -> None:
    result = run_chatserve(
        "chat", tiny_model, "--load-8bit", "-p", "hi", "--max-new-tokens", "8",
        CHATSERVE_HOME=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


AUDIT = """
import sys, os
def hook(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    with open(os.environ["AUDIT_FILE"], "a") as file:
        file.write(f"{host}\\n")
sys.addaudithook(hook)
"""


def test_a_path_never_opens_a_socket_to_elsewhere(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(AUDIT, "utf-8")
    seen = tmp_path / "hosts"
    result = run_chatserve(
        "chat", tiny_model, "-p", "hi", "--max-new-tokens", "4", CHATSERVE_HOME=str(tmp_path),
        PYTHONPATH=str(tmp_path), AUDIT_FILE=str(seen), HF_HUB_OFFLINE="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    hosts = set(seen.read_text("utf-8").split())
    assert hosts and hosts <= {"127.0.0.1"}


def test_the_api_of_a_real_server_streams_and_counts(tiny_model: Path) -> None:
    with serving(tiny_model) as (_, url):
        client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=12,
                seed=7,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        whole = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=12, seed=7
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_two_models_behind_one_door(tiny_model: Path) -> None:
    with serving(tiny_model, tiny_model, "--model-names", "one,two") as (_, url):
        client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
        assert {model.id for model in client.models.list()} == {"one", "two"}
        for name in ("one", "two"):
            assert client.completions.create(model=name, prompt="a", max_tokens=2).model == name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_server_leaves_no_process(tiny_model: Path, number: signal.Signals) -> None:
    with serving(tiny_model) as (process, _):
        children = descendants(process.pid)
        assert children
        process.send_signal(number)
        assert_gone([process, *children], timeout_s=15)


def test_kill_9_of_the_client_leaves_no_process(tiny_model: Path, tmp_path: Path) -> None:
    client = psutil.Popen(
        [sys.executable, "-m", "chatserve", "chat", str(tiny_model), "-p", "go on",
         "--max-new-tokens", "400"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=environment(CHATSERVE_HOME=str(tmp_path)),
    )  # fmt: skip
    assert os.read(client.stdout.fileno(), 1)  # the answer has begun: all processes are there
    children = descendants(client.pid)
    assert len(children) >= 2
    client.kill()
    assert_gone([client, *children], timeout_s=10)
    client.wait()
    client.stdout.close()
