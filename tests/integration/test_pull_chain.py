"""Models that are made of parts: fetched from a stand-in hub, applied, verified, published."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from huggingface_hub import constants

from chatserve import chains, hub_client
from chatserve.catalogue import ALIASES, CHAINS
from chatserve.cli.commands import apply_delta, merge_adapter, pull
from chatserve.cli.commands import list as list_command
from chatserve.errors import CannotWrite, HubError, ModelLoadError, UsageError
from chatserve.hub import cached_models, resolve_weights
from chatserve.hub_reference import RECORD
from chatserve.models import safetensors_writer
from tests import published
from tests.integration.hub_stand_in import HubStandIn, serve
from tests.published import MERGED, RL, RM, SFT, V0, V11, contents

Repositories = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Repositories]:
    """Folders `llama` and `tiny`, the bases, and what the hub holds."""
    folder = tmp_path_factory.mktemp("published")
    published.llama(folder / "llama")
    published.tiny_base(folder / "tiny")
    repositories = published.vicuna(folder / "hub") | published.stackllama(folder / "hub")
    repositories["org/llama"] = contents(folder / "llama")
    return folder, repositories


@pytest.fixture
def llama(files: tuple[Path, Repositories]) -> str:
    return str(files[0] / "llama")


@pytest.fixture
def tiny_base(files: tuple[Path, Repositories]) -> str:
    return str(files[0] / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, no login, and no waiting."""
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)

    async def no_wait(duration_s: float) -> None:
        pass

    monkeypatch.setattr(hub_client, "sleep", no_wait)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def hub(files: tuple[Path, Repositories], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serve(HubStandIn("org/other", {}, dict(files[1]))) as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        yield stand_in


def visible(home: Path) -> list[str]:
    folder = home / "models"
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def left(home: Path) -> list[str]:
    """What is hidden in the cache beside locks."""
    hidden = [path.name for path in (home / "models").glob(".*")]
    return [name for name in hidden if not name.startswith(".lock-")]


def made(home: Path, name: str) -> dict[str, bytes]:
    """The files of the model that pull made, without its record."""
    found = contents(home / "models" / name)
    del found[RECORD]
    return found


def by_hand(command: Callable[[list[str]], int], *arguments: str) -> dict[str, bytes]:
    """What the command makes of the repositories that `pull` fetches alone."""
    places = [
        str(resolve_weights(each)) if each.startswith(("lmsys/", "trl-lib/")) else each
        for each in arguments
    ]
    assert command([*places, "by-hand"]) == 0
    return contents(Path("by-hand"))


def test_vicuna_v0_is_what_apply_delta_makes_by_hand(
    hub: HubStandIn, home: Path, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull.main(["vicuna-7b-v0", "--base", llama]) == 0
    out, err = capsys.readouterr()
    assert out == f"{home / 'models' / 'vicuna-7b-v0'}\n"
    assert "chat with it: chatserve chat vicuna-7b-v0" in err
    assert (visible(home), left(home)) == (["vicuna-7b-v0"], [])
    assert made(home, "vicuna-7b-v0") == by_hand(apply_delta.main, llama, V0)


def test_stackllama_is_what_merge_adapter_makes_by_hand(home: Path, tiny_base: str) -> None:
    assert pull.main(["stackllama-7b", "--base", tiny_base]) == 0
    assert (visible(home), left(home)) == (["stackllama-7b"], [])
    both = by_hand(merge_adapter.main, tiny_base, SFT, RL)
    assert made(home, "stackllama-7b") == both
    shutil.rmtree("by-hand")
    assert pull.main(["stackllama-7b-sft", "--base", tiny_base]) == 0
    first = by_hand(merge_adapter.main, tiny_base, SFT)
    assert made(home, "stackllama-7b-sft") == first != both


def test_v11_comes_whole_or_is_made_of_its_delta(hub: HubStandIn, home: Path, llama: str) -> None:
    assert pull.main(["vicuna-7b-v1.1"]) == 0
    whole = home / "models" / MERGED.replace("/", "--")
    assert resolve_weights("vicuna-7b-v1.1", offline=True) == whole
    assert pull.main(["vicuna-7b-v1.1", "--base", llama]) == 0
    assert made(home, "vicuna-7b-v1.1") == by_hand(apply_delta.main, llama, V11)
    assert resolve_weights("vicuna-7b-v1.1", offline=True) == home / "models" / "vicuna-7b-v1.1"


def test_what_is_made_is_found_listed_and_not_made_again(
    hub: HubStandIn, home: Path, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pull.main(["vicuna-7b-v0", "--base", llama])
    folder = home / "models" / "vicuna-7b-v0"
    hub.requests = []
    assert resolve_weights("vicuna-7b-v0") == folder
    assert pull.main(["vicuna-7b-v0"]) == pull.main(["vicuna-7b-v0", "--base", "org/llama"]) == 0
    assert f"there already; delete {folder} to make it again" in capsys.readouterr().err
    assert hub.requests == []
    (model,) = cached_models()
    assert (model.name, model.path) == ("vicuna-7b-v0", folder)
    assert model.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
    list_command.main([])
    out = capsys.readouterr().out
    assert out.startswith("vicuna-7b-v0 ") and "float16  LlamaForCausalLM" in out
    record = json.loads((folder / RECORD).read_text())
    assert record["base"] == os.path.realpath(llama)
    assert record["parts"] == [{"id": V0, "commit": hub.commit}]


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_says_what_it_needs(hub: HubStandIn, home: Path, name: str) -> None:
    chain = CHAINS[name]
    command = f"`chatserve pull {name} --base PATH_OR_ID`"
    if name not in ALIASES:
        with pytest.raises(UsageError) as unbased:
            pull.main([name])
        assert chain.base in unbased.value.message and "licence" in unbased.value.message
        assert command in unbased.value.message
        with pytest.raises(ModelLoadError) as unmade:
            resolve_weights(name)
        assert chain.recipe in unmade.value.message and command in unmade.value.message
    assert set(chain.parts) <= set(ALIASES.values()), "the parts can be pulled alone, too"
    assert hub.requests == []


def test_the_command_that_a_refusal_names_works(home: Path, llama: str) -> None:
    with pytest.raises(ModelLoadError) as unmade:
        resolve_weights("vicuna-7b-v0")
    command = unmade.value.message.partition("`")[2].partition("`")[0]
    words = command.replace("PATH_OR_ID", llama).split()
    assert words[:2] == ["chatserve", "pull"] and pull.main(words[2:]) == 0
    assert resolve_weights("vicuna-7b-v0").is_dir()


def test_parts_are_kept_when_asked_and_then_used(
    hub: HubStandIn, home: Path, tiny_base: str
) -> None:
    pull.main(["stackllama-7b-sft", "--base", tiny_base, "--keep"])
    assert visible(home) == ["stackllama-7b-sft", SFT.replace("/", "--")]
    pull.main(["stackllama-7b", "--base", tiny_base])
    assert visible(home) == ["stackllama-7b", "stackllama-7b-sft", SFT.replace("/", "--")]
    assert hub.fetched().count("adapter_model.bin") == 2  # each once


def test_a_part_that_was_there_before_stays(hub: HubStandIn, home: Path, llama: str) -> None:
    pull.main([V0])
    num_fetched = len(hub.fetched())
    pull.main(["vicuna-7b-v0", "--base", llama])
    assert visible(home) == [V0.replace("/", "--"), "vicuna-7b-v0"]
    assert len(hub.fetched()) == num_fetched


def test_a_base_may_be_a_hub_id_and_stays(hub: HubStandIn, home: Path, llama: str) -> None:
    pull.main(["vicuna-7b-v0", "--base", "org/llama"])
    assert visible(home) == ["org--llama", "vicuna-7b-v0"]
    base = str(home / "models" / "org--llama")
    assert made(home, "vicuna-7b-v0") == by_hand(apply_delta.main, base, V0)
    record = json.loads((home / "models" / "vicuna-7b-v0" / RECORD).read_text())
    assert record["base"] == "org/llama"


class Interrupted(BaseException):
    """Stands for Ctrl-C or the end of the process at one place."""


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Let a pull end where it begins with the step `name`."""

    def stop(*args: Any) -> NoReturn:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(chains, name, stop)
        with pytest.raises(Interrupted):
            pull.main(list(arguments))


STEPS = [
    ("vicuna-7b-v0", "_apply_delta", "_verify_sum"),
    ("stackllama-7b", "_merge", "_verify_merge"),
]


@pytest.mark.parametrize(("name", "step"), [(name, step) for name, *both in STEPS for step in both])
def test_an_interrupted_pull_goes_on_where_it_stopped(
    hub: HubStandIn, home: Path, files: tuple[Path, Repositories],
    monkeypatch: pytest.MonkeyPatch, name: str, step: str,
) -> None:  # fmt: skip
    base = str(files[0] / ("llama" if name.startswith("vicuna") else "tiny"))
    interrupt(monkeypatch, step, name, "--base", base)
    assert visible(home) == []
    hub.requests = []
    if "verify" in step:  # then nothing is computed again
        for apply in ("_apply_delta", "_merge"):
            monkeypatch.setattr(chains, apply, None)
    assert pull.main([name, "--base", base, "--offline"]) == 0
    assert hub.requests == [] and left(home) == []
    assert resolve_weights(name) == home / "models" / name


def test_a_merge_whose_hashes_are_lost_is_made_again(
    home: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the merge and before its hashes were on disk: it could not be verified."""
    interrupt(monkeypatch, "_verify_merge", "stackllama-7b", "--base", tiny_base)
    (home / "models" / ".chain-stackllama-7b" / "hashes.json").unlink()
    pull.main(["stackllama-7b", "--base", tiny_base, "--offline"])
    assert made(home, "stackllama-7b") == by_hand(merge_adapter.main, tiny_base, SFT, RL)


def test_a_part_that_broke_off_is_resumed(hub: HubStandIn, home: Path, llama: str) -> None:
    hub.drop_after, hub.num_drops, hub.range_status = 2000, 1, 503
    with pytest.raises(HubError, match="what has come is kept"):
        pull.main(["vicuna-7b-v0", "--base", llama])
    hub.range_status, hub.requests = 200, []
    pull.main(["vicuna-7b-v0", "--base", llama])
    assert "bytes=2000-" in [request.range for request in hub.requests]
    assert made(home, "vicuna-7b-v0") == by_hand(apply_delta.main, llama, V0)


def test_another_base_the_second_time_is_taken(
    home: Path, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = published.deltas.write_folder(
        tmp_path / "other", published.deltas.base_tensors(7), vocab_size=published.ROWS
    )
    interrupt(monkeypatch, "_verify_sum", "vicuna-7b-v0", "--base", llama)
    pull.main(["vicuna-7b-v0", "--base", str(other)])
    assert made(home, "vicuna-7b-v0") == by_hand(apply_delta.main, str(other), V0)


def test_what_a_finished_run_could_not_remove_is_removed_by_the_next(
    home: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> NoReturn:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(chains._Work, "clear", stop)
        with pytest.raises(Interrupted):
            pull.main(["vicuna-7b-v0", "--base", llama])
    assert left(home) == [".chain-vicuna-7b-v0"]
    pull.main(["vicuna-7b-v0"])
    assert left(home) == []


@pytest.mark.parametrize(("name", "apply", "reason"), [
    ("vicuna-7b-v0", "_apply_delta", "has the SHA-256"),
    ("stackllama-7b", "_merge", "is not what was merged into it"),
])  # fmt: skip
def test_a_model_that_reads_back_wrong_is_thrown_away(
    home: Path, files: tuple[Path, Repositories], monkeypatch: pytest.MonkeyPatch,
    name: str, apply: str, reason: str,
) -> None:  # fmt: skip
    """As a disk does that loses a bit."""
    base = str(files[0] / ("llama" if name.startswith("vicuna") else "tiny"))
    real = getattr(chains, apply)

    def flip(base: Path, parts: Any, made: Path, bar: Any) -> Any:
        result = real(base, parts, made, bar)
        with open(made / "model.safetensors", "rb+") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(chains, apply, flip)
        with pytest.raises(ModelLoadError) as error:
            pull.main([name, "--base", base])
    assert reason in error.value.message and f"chatserve pull {name}" in error.value.message
    assert visible(home) == []
    assert pull.main([name, "--base", base, "--offline"]) == 0


def test_a_damaged_model_is_made_again(home: Path, llama: str) -> None:
    pull.main(["vicuna-7b-v0", "--base", llama])
    before = made(home, "vicuna-7b-v0")
    (home / "models" / "vicuna-7b-v0" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="not there yet"):
        resolve_weights("vicuna-7b-v0")
    pull.main(["vicuna-7b-v0", "--base", llama])
    assert made(home, "vicuna-7b-v0") == before


def test_the_room_on_disk_is_told_and_checked_before_weights_come(
    hub: HubStandIn, home: Path, llama: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    leftover = home / "models" / ".chain-vicuna-7b-v0" / "vicuna-7b-v0.partial-1"
    leftover.mkdir(parents=True)  # of a killed run: its room counts as free
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
        with pytest.raises(HubError, match=r"needs 34 MB, its disk has 1 MB free; free some"):
            pull.main(["vicuna-7b-v0", "--base", llama])
    assert not [name for name in hub.fetched() if name.endswith(".bin")]
    assert not leftover.exists()
    told = f"vicuna-7b-v0 = LLaMA-7B + {V0}: 0 MB to download, 34 MB to write; {home / 'models'}"
    assert told in capsys.readouterr().err
    pull.main(["vicuna-7b-v0", "--base", llama])


def test_a_disk_that_fills_up_while_writing_keeps_what_came(
    hub: HubStandIn, home: Path, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer, "_write_all", fail)
        with pytest.raises(CannotWrite) as error:
            pull.main(["vicuna-7b-v0", "--base", llama])
    assert "(No space left on device); what was fetched is kept" in error.value.message
    assert "CHATSERVE_HOME" in error.value.message and "name a target" not in error.value.message
    assert visible(home) == []
    assert pull.main(["vicuna-7b-v0", "--base", llama, "--offline"]) == 0


def test_a_base_of_another_size_is_refused_before_weights_come(
    hub: HubStandIn, home: Path, tmp_path: Path
) -> None:
    base = published.llama(tmp_path / "13b", layers=3)
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 3}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError) as error:
        pull.main(["vicuna-7b-v0", "--base", str(base)])
    assert "num_hidden_layers is 3" in error.value.message and "LLaMA-7B" in error.value.message
    assert not [name for name in hub.fetched() if name.endswith(".bin")]


def test_a_base_that_does_not_fit_is_named_by_apply_delta(home: Path, tmp_path: Path) -> None:
    """Without a config to compare, tensors are compared when the delta is there."""
    base = published.llama(tmp_path / "13b", layers=3)
    (base / "config.json").unlink()
    with pytest.raises(ModelLoadError, match="has 3 layers"):
        pull.main(["vicuna-7b-v0", "--base", str(base)])
    assert visible(home) == []


@pytest.mark.parametrize(
    ("base", "kind", "reason"),
    [
        ("./none", ModelLoadError, "no such folder"),
        ("empty", ModelLoadError, "no weights found"),
        ("x.gguf", UsageError, "is a .gguf file; the base has to be LLaMA-7B"),
        ("smollm2-135m", UsageError, "the base has to be LLaMA-7B"),
        ("llama-7b", UsageError, "unknown model 'llama-7b'"),
        ("vicuna-13b-v0", ModelLoadError, "vicuna-13b-v0 is made on your machine"),
        ("org/none", HubError, "has no org/none"),
    ],
)
def test_a_base_that_is_none_is_refused(
    hub: HubStandIn, tmp_path: Path, base: str, kind: type[Exception], reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").touch()
    with pytest.raises(kind, match=reason):
        pull.main(["vicuna-7b-v0", "--base", base])
    assert hub.fetched() == []


def test_a_gated_base_names_the_whole_command(hub: HubStandIn) -> None:
    hub.statuses, hub.headers = {"config.json": [401]}, {"X-Error-Code": "GatedRepo"}
    with pytest.raises(HubError) as error:
        pull.main(["vicuna-7b-v0", "--base", "org/llama"])
    command = "`HF_TOKEN=YOUR_TOKEN chatserve pull vicuna-7b-v0 --base org/llama`"
    assert "org/llama (revision main) is gated" in error.value.message
    assert command in error.value.message


def test_offline_says_which_part_is_missing(hub: HubStandIn, llama: str) -> None:
    with pytest.raises(HubError, match=f"{V0} .*network is off"):
        pull.main(["vicuna-7b-v0", "--base", llama, "--offline"])
    assert hub.requests == []


def test_a_second_process_does_not_make_the_same(home: Path, llama: str) -> None:
    (home / "models").mkdir(parents=True)
    with open(home / "models" / ".lock-vicuna-7b-v0", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HubError, match="another process"):
            pull.main(["vicuna-7b-v0", "--base", llama])


def test_flags_that_mean_nothing_are_refused(llama: str) -> None:
    with pytest.raises(UsageError, match="--base is for models that are made of one"):
        pull.main(["tinyllama", "--base", llama])
    with pytest.raises(UsageError, match="smollm2-135m is whole as it is"):
        pull.main(["--base", llama])
    with pytest.raises(UsageError, match="vicuna-7b-v0 has no revisions, it is made of LLaMA-7B"):
        pull.main(["vicuna-7b-v0@v2", "--base", llama])
    with pytest.raises(UsageError, match=r"did you mean vicuna-7b-v0 or "):
        pull.main(["vicuna-7b-v00", "--base", llama])
    with pytest.raises(UsageError, match="--revision v2 is for hub ids"):
        pull.main(["vicuna-7b-v0", "--base", llama, "--revision", "v2"])


def test_a_base_in_the_settings_does_not_hinder_whole_models(
    hub: HubStandIn, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATSERVE_BASE", llama)
    hub.others["TinyLlama/TinyLlama-1.1B-Chat-v1.0"] = hub.others[MERGED]
    assert pull.main(["tinyllama"]) == 0
    assert pull.main(["vicuna-7b-v0"]) == 0


@pytest.mark.parametrize(("name", "note"), [
    ("llama-7b-se-rm-peft", "without the head that gives the score"),
    ("vicuna-7b-delta-v0", "`chatserve pull vicuna-7b-v0 --base"),
    (RL, "`chatserve pull stackllama-7b --base"),
])  # fmt: skip
def test_a_part_that_is_pulled_alone_says_what_it_is(
    home: Path, capsys: pytest.CaptureFixture[str], name: str, note: str
) -> None:
    assert pull.main([name]) == 0
    out, err = capsys.readouterr()
    assert note in err.splitlines()[-1]
    assert out == f"{home / 'models' / ALIASES.get(name, name).replace('/', '--')}\n"


def test_the_value_head_of_the_policy_is_not_fetched(hub: HubStandIn, tiny_base: str) -> None:
    pull.main(["stackllama-7b", "--base", tiny_base])
    assert "pytorch_model.bin" not in hub.fetched()
    assert RM not in str(hub.requests)
