"""`chatserve pull` as a user runs it, on a stand-in hub: to an answer, killed, on a full disk."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests import published
from tests.deltas import base_tensors, delta_tensors, with_rotary, write_folder, write_json
from tests.integration.hub_stand_in import HubStandIn, serve
from tests.processes import TIMEOUT_S, environment, run_chatserve

TOKENIZER = Path(__file__).parents[2].parent / "shared/data/llama-tokenizer.model"
ROWS = 32_000
ID = "org/tiny"
WEIGHTS = save({"w": torch.zeros(500_000)})
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with serve(HubStandIn(ID, dict(FILES))) as stand_in:
        yield stand_in


@pytest.fixture
def variables(hub: HubStandIn, tmp_path: Path) -> dict[str, str]:
    """An empty cache, and the stand-in as the only hub."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
        "CHATSERVE_HOME": str(tmp_path / "home"),
    }  # fmt: skip


def vicuna_v0(folder: Path) -> Path:
    """LLaMA's own vocabulary; the delta with v0's `[PAD]` in added_tokens.json."""
    delta = with_rotary(delta_tensors(vocab=ROWS + 1))
    write_folder(folder, delta, form="bin-shards", vocab_size=ROWS + 1)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    write_json(folder / "special_tokens_map.json", settings | {"pad_token": "[PAD]"})
    write_json(folder / "added_tokens.json", {"[PAD]": ROWS})
    return folder


@pytest.mark.skipif(not TOKENIZER.exists(), reason="needs LLaMA's tokenizer.model")
def test_from_an_alias_to_an_answer(
    hub: HubStandIn, variables: dict[str, str], tmp_path: Path
) -> None:
    """Vicuna v0 over a line that breaks twice; the refusal names the command that is run."""
    delta = vicuna_v0(tmp_path / "delta")
    base = write_folder(
        tmp_path / "llama-7b", with_rotary(base_tensors(vocab=ROWS)), form="bin", vocab_size=ROWS
    )
    hub.others[published.V0] = published.contents(delta)
    ask = ("chat", "vicuna-7b-v0", "-p", "Hello!", "--max-new-tokens", "4", "--offline")
    unmade = run_chatserve(*ask, **variables)
    assert unmade.returncode == 3
    assert "`chatserve pull vicuna-7b-v0 --base PATH_OR_ID`" in unmade.stderr
    hub.drop_after, hub.num_drops = 300_000, 2
    made = run_chatserve("pull", "vicuna-7b-v0", "--base", base, **variables)
    folder = tmp_path / "home" / "models" / "vicuna-7b-v0"
    assert (made.returncode, made.stdout) == (0, f"{folder}\n"), made.stderr
    assert [request.range for request in hub.requests].count("bytes=300000-") == 2
    answer = run_chatserve(*ask, **variables)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


def start(variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "chatserve", "pull", ID],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables),
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_stopped_leaves_no_model_and_goes_on(
    hub: HubStandIn, variables: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    hub.hold_after = 1_000_000
    process = start(variables)
    assert hub.held.wait(TIMEOUT_S)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    hub.release.set()
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in err
    models = tmp_path / "home" / "models"
    assert [path.name for path in models.iterdir() if not path.name.startswith(".")] == []
    hub.hold_after = 0
    again = run_chatserve("pull", ID, **variables)
    assert (again.returncode, again.stdout) == (0, f"{models / 'org--tiny'}\n"), again.stderr
    assert (models / "org--tiny" / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched().count("config.json") == 1


def test_a_file_that_cannot_grow_is_one_line_and_what_came_is_used(
    hub: HubStandIn, variables: dict[str, str], tmp_path: Path
) -> None:
    """The system's own limit stands for a disk that is full: the write itself fails."""
    result = subprocess.run(
        [sys.executable, "-m", "chatserve", "pull", ID],
        capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(**variables),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    last = result.stderr.splitlines()[-1]
    assert f"cannot write to {tmp_path / 'home' / 'models'} (File too large)" in last
    assert "CHATSERVE_HOME" in last and "Traceback" not in result.stderr
    assert run_chatserve("pull", ID, **variables).returncode == 0
    assert "bytes=1000000-" in hub.ranges("model.safetensors")


def test_refusals_have_their_exit_codes(hub: HubStandIn, variables: dict[str, str]) -> None:
    nameless = run_chatserve("pull", "stackllama-7b", **variables)
    assert nameless.returncode == 2 and "licence" in nameless.stderr
    hub.status, hub.headers = 403, {"X-Error-Code": "GatedRepo"}
    gated = run_chatserve("pull", ID, **variables)
    assert gated.returncode == 1 and f"HF_TOKEN=YOUR_TOKEN chatserve pull {ID}" in gated.stderr
    assert len(gated.stderr.splitlines()) == 1
